"""One of the two processes of test_processes, with two devices each: all cases on meshes over both, in one file."""

import pickle
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":  # before anything else asks JAX for its devices
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import linen, nnx
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_one
from lora_one.backends import processes
from lora_one.backends.jax import LinenModel, PytreeModel
from tests.backends.jax.mesh_script import Unfolded, collectives
from tests.backends.jax.models import regression
from tests.outcome import outcome

RANK = jax.process_index()
FAILING = 1  # the rank
DATA = regression(count=2, rows=8, ins=16, outs=16)
SPECS = {"fsdp": (P("data", None), P("data", None)), "tensor": (P(None, "model"), P("model", None))}
EXACT = lora_one.Config(rank=4, gradient="exact")
TWO_PASSES = lora_one.Config(rank=4, oversample=4, passes=2)
WITHOUT_DATA = lora_one.Config(rank=4)
Arrays = dict[str, np.ndarray]


class Net(nnx.Module):
    """An MLP whose kernels lie as `specs` says; on Explicit axes `out` says where its products go."""

    def __init__(self, specs: tuple[P, P] | None = None, out: tuple[P | None, P | None] = (None, None)):
        placed: list[dict] = [{}, {}] if specs is None else [{"out_sharding": spec} for spec in specs]
        options = {"use_bias": False, "rngs": nnx.Rngs(0)}
        self.up = nnx.Linear(16, 32, kernel_metadata=placed[0], **options)
        self.down = nnx.Linear(32, 16, kernel_metadata=placed[1], **options)
        self.out = out

    def __call__(self, x):
        hidden = jnp.tanh(self.up(x, out_sharding=self.out[0]))
        return self.down(hidden, out_sharding=self.out[1])


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(16, use_bias=False, name="down")(
            jnp.tanh(linen.Dense(32, use_bias=False, name="up")(x))
        )  # fmt: skip


def loss_fn(model, batch):
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def loss_of_tree(params, batch):
    hidden = jnp.tanh(batch[0] @ params["up"]["kernel"])
    return jnp.mean((hidden @ params["down"]["kernel"] - batch[1]) ** 2)


def mesh_of(shape=(2, 2), kind=AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(kind,) * 2)


def net_on(mesh, spec: str) -> Net:
    with jax.set_mesh(mesh):
        if mesh.axis_types[0] == AxisType.Auto:
            return Net(SPECS[spec])
        rows = P("data", None)
        return Net(SPECS[spec], (P("data", "model") if spec == "tensor" else rows, rows))


def global_batches(mesh) -> list:
    """The batches, made of the rows that this process has: half of each."""
    places = NamedSharding(mesh, P("data", None))
    own = slice(4 * RANK, 4 * RANK + 4)
    return [tuple(jax.make_array_from_process_local_data(places, x[own]) for x in batch) for batch in DATA]


def host(x) -> np.ndarray:
    return np.asarray(x if x.is_fully_addressable else process_allgather(x, tiled=True))


def products(model) -> Arrays:
    if isinstance(model, nnx.Module):
        pairs = {name: (layer.kernel_lora_a[...], layer.kernel_lora_b[...]) for name, layer in layers(model)}
    else:
        pairs = {name.removesuffix(".kernel"): tuple(factors.values()) for name, factors in model.lora.items()}
    return {name: host(a) @ host(b) for name, (a, b) in pairs.items()}


def layers(model: Net) -> list[tuple[str, Any]]:
    return [("up", model.up), ("down", model.down)]


@nnx.jit
def step(model, optimizer, batch):
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batch)
    optimizer.update(model, grads)
    return loss


def train(model, data, **options) -> tuple[nnx.Optimizer, list[float]]:
    optimizer = nnx.Optimizer(model, lora_one.optimizer(model, learning_rate=1e-3, **options), wrt=nnx.LoRAParam)
    return optimizer, [float(step(model, optimizer, batch)) for batch in data * 2]


# Name -> the config, and the options of the optimizer.
TRAININGS: dict[str, tuple[lora_one.Config, dict]] = {
    "two passes": (TWO_PASSES, {}),
    "exact, preconditioned": (EXACT, {"precondition": True, "reg": 1e-2}),
    "without data": (WITHOUT_DATA, {"start_steps": 2}),
}


def trained(net: Net, data, name: str) -> tuple[Net, Any, dict[str, Any]]:
    config, options = TRAININGS[name]
    if config is WITHOUT_DATA:
        model, report = lora_one.init(net, config=config)
    else:
        model, report = lora_one.init(net, data, loss_fn, config)
    start = products(model)
    _, losses = train(model, data, **options)
    return model, report, {"start": start, "losses": losses, "end": products(model)}


def alone(name: str) -> dict[str, Any]:
    """A training in this process alone, on one device, with the passes that a mesh needs."""
    from lora_one.backends import jax as backend

    whole, backend.open_session = backend.open_session, Unfolded
    try:
        return trained(Net(), DATA, name)[2]
    finally:
        backend.open_session = whole


def fsdp(folder: Path) -> dict[str, Any]:
    """Auto axes: start, training, then everything that writes or reads files."""
    mesh = mesh_of()
    model, _, result = trained(net_on(mesh, "fsdp"), global_batches(mesh), "two passes")
    lora_one.save(model, folder / "adapter")
    result["written"] = (folder / "adapter" / "adapter_model.safetensors").exists()
    result["loaded alone"] = products(lora_one.load(Net(), folder / "adapter"))
    other = lora_one.load(net_on(mesh, "tensor"), folder / "adapter")
    result["loaded"], result["spec"] = products(other), str(other.up.kernel_lora_b[...].sharding.spec)
    result["restored"] = restored(model, folder / "orbax")
    lora_one.merge(model)
    result["merged"] = {name: host(layer.kernel[...]) for name, layer in layers(model)}
    result["unwritable"] = outcome(lambda: lora_one.save(other, Path("/dev/null/adapter")))
    path = folder / "adapter" if RANK == 0 else folder / "no such folder"
    result["missing"] = outcome(lambda: lora_one.load(net_on(mesh, "tensor"), path))
    return result


def restored(model: Net, path: Path) -> Arrays:
    """The factors out of a checkpoint of orbax, on a mesh of another shape."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam)))
    mesh = mesh_of((1, 4))
    with jax.set_mesh(mesh):
        fresh, _ = lora_one.init(net_on(mesh, "tensor"), config=WITHOUT_DATA)
    state = nnx.state(fresh, nnx.LoRAParam)
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
    with ocp.StandardCheckpointer() as checkpointer:
        nnx.replace_by_pure_dict(state, checkpointer.restore(path, target))
    nnx.update(fresh, state)
    assert fresh.up.kernel_lora_b[...].sharding.mesh.shape["model"] == 4
    return products(fresh)


def tensor() -> dict[str, Any]:
    """Explicit axes, and what the devices send each other in a step of the optimizer."""
    mesh = mesh_of(kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        model, _, result = trained(net_on(mesh, "tensor"), global_batches(mesh), "exact, preconditioned")
        lora = nnx.state(model, nnx.LoRAParam)
        tx = lora_one.optimizer(model, precondition=True)
        update = jax.jit(tx.update).lower(lora, tx.init(lora), lora)
    return {**result, "sent": collectives(update.compile().as_text())}


def without_data() -> dict[str, Any]:
    mesh = mesh_of(kind=AxisType.Explicit)
    with jax.set_mesh(mesh):
        model, report, result = trained(net_on(mesh, "fsdp"), global_batches(mesh), "without data")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a process that has not heard of the start would warn
        lora_one.merge(model)
    return {**result, "report": report.summary()}


def trees(folder: Path) -> dict[str, Arrays]:
    """A tree and a Linen module, with the exact start; and a model that every process has whole."""
    mesh, net = mesh_of(), Net()
    data = global_batches(mesh)
    kernels = {name: np.asarray(layer.kernel[...]) for name, layer in layers(net)}
    params = {
        name: {"kernel": jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)}
        for (name, x), spec in zip(kernels.items(), SPECS["tensor"], strict=True)
    }
    tree, _ = lora_one.init(PytreeModel(params), data, loss_of_tree, EXACT)
    module, _ = lora_one.init(LinenModel(LinenNet(), {"params": params}), data, loss_fn, EXACT)
    results = {"tree": products(tree), "Linen": products(module)}
    for name, model, fresh in (
        ("tree", tree, PytreeModel(params)),
        ("Linen", module, LinenModel(LinenNet(), {"params": params})),
    ):
        lora_one.save(model, folder / name)
        results[f"{name}, loaded"] = products(lora_one.load(fresh, folder / name))
    merged = lora_one.merge(tree).params
    results["tree, merged"] = {name: host(merged[name]["kernel"]) for name in kernels}
    results["kernels"] = kernels
    results["the same numbers on each host"] = products(lora_one.init(net_on(mesh, "tensor"), DATA, loss_fn, EXACT)[0])
    results["a model on each host"] = products(lora_one.init(net, data, loss_fn, EXACT)[0])
    return results


def raising(*_):
    raise KeyError("no such column")


def broken(data):
    yield data[0]
    raise OSError("the disk is gone")


def errors() -> dict[str, tuple[str, str]]:
    """What happens in both processes if one does something else."""
    mesh = mesh_of()
    data = global_batches(mesh)
    own = [tuple(x[4 * RANK : 4 * RANK + 4] for x in batch) for batch in DATA]

    def start(batches=data, loss=loss_fn):
        return lora_one.init(net_on(mesh, "tensor"), batches, loss, EXACT)

    cases: dict[str, Callable[[], object]] = {
        "an exception of the loss": partial(start, loss=raising),
        "an exception of the batches": partial(start, broken(data)),
        "no batches": partial(start, []),
        "a batch less": partial(start, data[:1]),
        "an unsuitable model": lambda: lora_one.init(net_on(mesh, "tensor"), data, loss_fn, lora_one.Config(rank=99)),
    }
    outcomes = {name: outcome(fails if RANK == FAILING else start) for name, fails in cases.items()}
    nan = [tuple(jnp.nan * x for x in batch) for batch in data]
    outcomes["nan in all"] = outcome(lambda: start(nan))
    outcomes["shares"] = outcome(lambda: start(own))
    processes.ARRIVAL_SECONDS = processes.LEAVING_SECONDS = 0.5
    outcomes["one process alone"] = outcome(start if RANK == 0 else lambda: None)
    process_allgather(np.zeros(1))
    outcomes["the other comes too late"] = outcome(start if RANK == 1 else lambda: None)
    processes.ARRIVAL_SECONDS = 60.0
    outcomes["after that"] = outcome(start)
    return outcomes


if __name__ == "__main__":
    out = Path(sys.argv[3])
    # The references are shared out: no process waits for the other.
    results: dict[str, Any] = {f"alone: {x}": alone(x) for i, x in enumerate(TRAININGS) if i % 2 == RANK}
    results |= {"fsdp": fsdp(out), "tensor": tensor(), "without data": without_data()}
    results |= {"trees": trees(out), "errors": errors()}
    (out / f"{RANK}.pickle").write_bytes(pickle.dumps(results))
