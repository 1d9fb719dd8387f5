"""Run by test_mesh.py in a process with 8 forced host devices; prints what it measured as JSON."""

import json
import math
import re
import sys
import time
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_one
from lora_one.backends.jax import JaxSession, lora_adamw, open_session
from lora_one.backends.jax.passes.batches import arrays_and_rest
from lora_one.backends.jax.passes.totals import Scale
from lora_one.backends.jax.sites import Leaves
from lora_one.core.factors import Factors
from lora_one.errors import LoraOneError
from lora_one.initialization import initialize

IN = HIDDEN = 64  # one shape for all kernels: each costs compilations
WIDTH = 8
CONFIG = lora_one.Config(rank=4, oversample=WIDTH - 4, passes=2)
DATA = [
    (rng.standard_normal((16, IN)).astype("f"), rng.standard_normal((16, 8, 8)).astype("f"))
    for rng in map(np.random.default_rng, range(2))
]


class Net(nnx.Module):
    """Megatron's pair: columns over the model axis, then rows, then an attention-like kernel of three axes."""

    def __init__(self, rngs: nnx.Rngs, sharded: bool, explicit: bool):
        def metadata(*spec):
            return {"out_sharding": spec} if sharded else {}

        self.up = nnx.Linear(IN, HIDDEN, use_bias=False, rngs=rngs, kernel_metadata=metadata(None, "model"))
        self.down = nnx.Linear(HIDDEN, IN, use_bias=False, rngs=rngs, kernel_metadata=metadata("model", None))
        self.heads = nnx.LinearGeneral(
            IN, (8, 8), use_bias=False, rngs=rngs, kernel_metadata=metadata(None, "model", None)
        )
        self.explicit = explicit

    def __call__(self, x):
        h = self.down(jnp.tanh(self.up(x)), out_sharding=P("data", None) if self.explicit else None)
        return self.heads(jnp.tanh(h))


traces = []  # one entry per trace of the loss


def loss_fn(model, batch):
    traces.append(None)
    x, y = batch
    return jnp.mean((model(x) - y) ** 2)


class Unfolded(JaxSession):
    """A session on one device that makes the passes that a mesh needs."""

    @property
    def folds(self) -> bool:
        return False


def collectives(text: str) -> dict[str, int]:
    """The largest array, in elements, that each kind of collective makes."""
    found: dict[str, int] = {}
    for shape, kind in re.findall(
        r"= \(?\w+\[([\d,]*)\][^=]*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(",
        text,
    ):
        size = math.prod(int(n) for n in shape.split(",") if n)
        found[kind] = max(found.get(kind, 0), size)
    return found


def products(model) -> dict[str, np.ndarray]:
    return {
        name: np.asarray(getattr(model, name).kernel_lora_a[...], np.float64)
        @ np.asarray(getattr(model, name).kernel_lora_b[...], np.float64).reshape(4, -1)
        for name in ("up", "down", "heads")
    }


def probes(session) -> dict[str, Leaves]:
    """Factors as wide as the sketch's, where the session puts them."""
    given = {}
    for name, site in session.attached.binding.sites.items():
        pair = Factors(jnp.ones((WIDTH, site.layout.in_features)), jnp.ones((site.layout.out_features, WIDTH)))
        given[name] = site.place(Leaves(*site.layout.leaves([pair])))
    return given


def compiled_step(session, batch, factors: dict[str, Leaves]) -> str:
    """The compiled function with gradients as text: what each device does, collectives included."""
    attached = session.attached
    zeros = jax.tree.map(lambda x: jnp.zeros_like(x, device=x.sharding), factors)
    scale = Scale(np.float32(1), np.bool_(True))
    arguments = (zeros, factors, attached.binding.frozen, scale, *arrays_and_rest(batch))
    return attached.gradient_function.step.lower(*arguments).compile().as_text()


def specs(model) -> dict[str, list]:
    return {
        f"{name}.{side}": [
            list(getattr(layer, f"kernel_lora_{side}").get_raw_value().sharding.spec),
            list(getattr(layer, f"kernel_lora_{side}").get_metadata()["out_sharding"]),
        ]
        for name in ("up", "down", "heads")
        for layer in [getattr(model, name)]
        for side in "ab"
    }


def run(shape: tuple[int, int], kind: str, expected: dict[str, np.ndarray]) -> dict:
    explicit = kind == "explicit"
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model = Net(nnx.Rngs(0), True, explicit)
        placed = placed_data(mesh)
        bases = {name: getattr(model, name).kernel.get_raw_value() for name in ("up", "down", "heads")}
        with open_session(model, placed, loss_fn, CONFIG) as session:
            traces.clear()
            folds = session.folds
            initialize(session, CONFIG, "jax", time.perf_counter())
            counts = [len(traces), session.attached.gradient_function.step._cache_size()]
            gradients = collectives(compiled_step(session, placed[0], probes(session)))
        got = products(model)
        tx = lora_one.optimizer(model, 1e-3, precondition=True, reg=1e-2, loraplus_lr_ratio=4.0)
        lora = nnx.state(model, nnx.LoRAParam)
        state = tx.init(lora)

        def update(lora, state):
            updates, state = tx.update(jax.tree.map(lambda x: 0.1 * x, lora), state, lora)
            return optax.apply_updates(lora, updates), state

        step = jax.jit(update, donate_argnums=())
        new, _ = step(lora, state)
        kept = all(
            old.sharding.is_equivalent_to(moved.sharding, old.ndim)
            for old, moved in zip(jax.tree.leaves(lora), jax.tree.leaves(new), strict=True)
        )
        host = [nnx.to_pure_dict(jax.tree.map(np.asarray, tree)) for tree in (lora, new)]
        optimizer = collectives(step.lower(lora, state).compile().as_text())
        same = all(
            np.array_equal(np.asarray(getattr(model, name).kernel.get_raw_value()), np.asarray(base))
            and getattr(model, name).kernel.get_raw_value().sharding == base.sharding
            for name, base in bases.items()
        )
    stepped = max(
        float(np.abs(a - b).max()) for a, b in zip(jax.tree.leaves(host[1]), single_step(host[0]), strict=True)
    )
    error = {name: float(np.abs(got[name] - value).max() / np.abs(value).max()) for name, value in expected.items()}
    return {
        "error": error, "specs": specs(model), "gradients": gradients, "optimizer": optimizer,
        "traces": counts, "folds": folds,
        "base_kept": bool(same), "sharding_kept": kept, "stepped": stepped,
    }  # fmt: skip


def single_step(lora) -> list[np.ndarray]:
    """The same step on one device."""
    alone = jax.tree.map(jnp.asarray, lora)
    tx = lora_adamw(1e-3, reg=1e-2, loraplus_lr_ratio=4.0)
    updates, _ = tx.update(jax.tree.map(lambda x: 0.1 * x, alone), tx.init(alone), alone)
    return [np.asarray(x) for x in jax.tree.leaves(optax.apply_updates(alone, updates))]


def placed_data(mesh) -> list:
    """The batches, their rows sharded: on an explicit mesh they must be for the model to be called at all."""
    shardings = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P("data", "model", None))
    return [tuple(map(jax.device_put, batch, shardings)) for batch in DATA]


def deferred_training(model, data) -> nnx.Optimizer:
    """Two steps of the start, and two of AdamW."""
    tx = lora_one.optimizer(model, 1e-3, start_steps=2, loraplus_lr_ratio=4.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
        optimizer.update(model, grads)

    for batch in data * 2:
        step(model, optimizer, batch)
    return optimizer


def deferred(kind: str) -> dict:
    """A start by the optimizer and steps after it, beside those of one device."""
    explicit = kind == "explicit"
    alone, _ = lora_one.init(Net(nnx.Rngs(0), False, False), config=lora_one.Config(rank=4))
    deferred_training(alone, DATA)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit if explicit else AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        model, report = lora_one.init(Net(nnx.Rngs(0), True, explicit), config=lora_one.Config(rank=4))
        before = [x.sharding for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam))]
    with nullcontext() if kind == "no context" else jax.set_mesh(mesh):
        optimizer = deferred_training(model, placed_data(mesh))
    kept = [
        x.sharding.is_equivalent_to(sharding, x.ndim)
        for state in (nnx.state(model, nnx.LoRAParam), optimizer.opt_state.pairs.inner_state[1].mu)
        for x, sharding in zip(jax.tree.leaves(state), before, strict=True)
    ]
    pairs = zip(products(model).values(), products(alone).values(), strict=True)
    error = max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in pairs)
    return {"error": error, "kept": all(kept), "report": report.summary()}


def indivisible() -> str:
    """Logical axes that the mesh does not divide: what is said."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    layer = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    layer.kernel.set_metadata("out_sharding", (None, "model"))
    layer.kernel.set_raw_value(jax.device_put(layer.kernel.get_raw_value(), NamedSharding(mesh, P())))
    try:
        lora_one.init(nnx.Sequential(layer), [np.ones((2, 8), "f")], lambda m, x: jnp.mean(m(x)), CONFIG)
    except LoraOneError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


if __name__ == "__main__":
    with Unfolded(Net(nnx.Rngs(0), False, False), DATA, loss_fn, CONFIG) as single:
        initialize(single, CONFIG, "jax", time.perf_counter())
    alone = products(single.model)
    result = {}
    for case in sys.argv[1:]:
        shape, kind = case.split(":")
        if shape == "indivisible":
            result[case] = indivisible()
        elif shape == "deferred":
            result[case] = deferred(kind)
        else:
            data, model = map(int, shape.split("x"))
            result[case] = run((data, model), kind, alone)
    print(json.dumps(result))
