"""The start that the optimizer makes for a model, and the report of it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
import qwix
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, lora_adamw
from lora_one.backends.jax.deferred import DeferredState
from lora_one.errors import ModelError, UnfinishedStartWarning, ZeroGradientWarning
from tests.backends.jax.models import regression, squared_error

CONFIG = lora_one.Config(rank=3)
BATCHES = regression(10, outs=8)


class Net(nnx.Module):
    """Layers of one shape, since each shape is compiled: a plain one, a stack of two, and one that is never called."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(8, 8, rngs=rngs)
        self.stack = nnx.vmap(lambda r: nnx.Linear(8, 8, rngs=r))(rngs.fork(split=2))
        self.idle = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        def layer(x, block):
            return jnp.tanh(block(x))

        return nnx.scan(layer, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(self.up(x), self.stack)


@nnx.jit
def train(model, optimizer, batch):
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    loss, grads = nnx.value_and_grad(squared_error, argnums=wrt)(model, batch)
    optimizer.update(model, grads)
    return loss


def pure(model, optimizer):
    state = nnx.to_pure_dict(nnx.state((nnx.state(model, nnx.LoRAParam), nnx.state(optimizer))))
    return jax.tree.map(jnp.array, state)  # a copy


def test_the_report_of_an_nnx_model_tells_what_was_done_and_orbax_resumes_in_the_middle(tmp_path):
    model, report = lora_one.init(Net(nnx.Rngs(0)), config=CONFIG)
    assert "4 layers have plain LoRA's start" in report.summary()
    tx = lora_one.optimizer(model, 1e-2)
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx), wrt=nnx.LoRAParam)
    for batch in BATCHES[:2]:
        train(model, optimizer, batch)
    assert "first 6 to 16 steps of training, 2 so far" in report.summary()
    with pytest.warns(UnfinishedStartWarning, match="is not made yet, after 2 steps"):
        lora_one.save(model, tmp_path / "adapter")
    with orbax.checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", pure(model, optimizer))

    def go_on(model, optimizer):
        for batch in BATCHES[2:] * 2:
            train(model, optimizer, batch)
        jax.effects_barrier()

    with pytest.warns(
        ZeroGradientWarning, match=r"1 of 4 layers had no gradient in the \d+ steps .* plain LoRA's: idle"
    ):
        go_on(model, optimizer)
    printed = str(report)
    assert report.done and report.start_steps == "auto" and 6 <= report.steps <= 16
    assert [layer.start for layer in report.layers] == ["plain", "spectral", "spectral", "spectral"]
    assert [layer.name for layer in report.layers] == ["idle", "stack.0", "stack.1", "up"]
    assert f"started from the gradients of the first {report.steps} steps" in printed
    kind = optimizer.opt_state[1].starts[0]  # in the order of the tree, which is that of the layers here
    for layer, s, agreement in zip(report.layers[1:], kind.s[...][1:], kind.agreement[...][1:], strict=True):
        np.testing.assert_allclose(layer.singular_values, s / s[0], rtol=1e-6)
        assert layer.agreement == pytest.approx(float(agreement))

    fresh, _ = lora_one.init(Net(nnx.Rngs(0)), config=CONFIG)
    again = nnx.Optimizer(fresh, optimizer.tx, wrt=nnx.LoRAParam)
    with orbax.checkpoint.StandardCheckpointer() as saver:
        restored = saver.restore(tmp_path / "state", jax.tree.map(jnp.zeros_like, pure(fresh, again)))
    states = nnx.state((nnx.state(fresh, nnx.LoRAParam), nnx.state(again)))
    nnx.replace_by_pure_dict(states, restored)
    nnx.update(fresh, states[0])
    nnx.update(again, states[1])
    with pytest.warns(ZeroGradientWarning):
        go_on(fresh, again)
    for got, expected in zip(*map(jax.tree.leaves, (pure(fresh, again), pure(model, optimizer))), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_only_a_model_that_waits_for_its_start_gets_one_by_default():
    model, report = lora_one.init(Net(nnx.Rngs(0)), config=CONFIG)
    factors = nnx.state(model, nnx.LoRAParam)
    assert isinstance(lora_one.optimizer(model).init(factors), DeferredState)
    assert not isinstance(lora_one.optimizer(model, start_steps=0).init(factors), DeferredState)
    with pytest.warns(ZeroGradientWarning):
        explicit, _ = lora_one.init(Net(nnx.Rngs(0)), BATCHES[:1], squared_error, CONFIG)
    assert not isinstance(lora_one.optimizer(explicit).init(factors), DeferredState)
    with pytest.raises(ModelError, match=r"needs plain LoRA's start, B = 0, got another B in 2 layers: stack, up"):
        lora_one.optimizer(explicit, start_steps=6)
    abstract = nnx.eval_shape(lambda: lora_one.backends.jax.attach_plain(Net(nnx.Rngs(0)), CONFIG))
    with pytest.raises(ModelError, match="a start from the first steps needs the model's weights, got shapes alone"):
        lora_one.optimizer(abstract, start_steps=6)
    tx = lora_one.optimizer(model)
    other = {"head": {"kernel_lora_a": jnp.ones((8, 3)), "kernel_lora_b": jnp.zeros((3, 8))}}
    with pytest.raises(ModelError, match=r"made for another model: that has no head\.kernel_lora_a"):
        tx.update(other, tx.init(other), other)
    with pytest.raises(ModelError, match=r"init without batches must come before lora_one\.optimizer"):
        lora_one.init(model, config=CONFIG)
    assert not report.done


class Wrapped(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.LoRA(8, 3, 8, base_module=nnx.Linear(8, 8, rngs=rngs), rngs=rngs)
        self.down = nnx.LoRALinear(8, 8, lora_rank=3, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def with_qwix() -> nnx.Module:
    rule = qwix.LoraRule(module_path=".*", rank=3, alpha=6.0)
    return qwix.apply_lora_to_model(
        nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0))), qwix.LoraProvider([rule]), BATCHES[0][0]
    )


@pytest.mark.parametrize("attach", [lambda: Wrapped(nnx.Rngs(0)), with_qwix], ids=["flax", "qwix"])
@pytest.mark.parametrize("asked", [False, True], ids=["init", "start_steps"])
def test_lora_of_others_is_started_as_it_is_from_batches(attach, asked):
    """In its own scale: one batch, so that six readings of its gradient know as much as the passes of `init`."""
    model, explicit = attach(), attach()
    if not asked:
        model, _ = lora_one.init(model)
    optimizer = nnx.Optimizer(
        model, lora_one.optimizer(model, 0.0, start_steps=8 if asked else None), wrt=nnx.LoRAParam
    )
    explicit, _ = lora_one.init(explicit, BATCHES[:1], squared_error, lora_one.Config(passes=4))
    for _ in range(10):
        train(model, optimizer, BATCHES[0])
    factors = [jax.tree.leaves(nnx.state(m, nnx.LoRAParam)) for m in (model, explicit)]
    for got, expected in zip(*factors, strict=True):
        assert np.linalg.norm(got, 2) == pytest.approx(np.linalg.norm(expected, 2), rel=1e-3)


def test_a_pytree_is_started_too_and_a_linen_module_says_what_it_needs():
    params = {"up": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((8, 8)), jnp.float32)}}

    def loss(lora):
        x, y = BATCHES[0]
        return jnp.mean((jnp.tanh(x @ model.replace(lora=lora).effective()["up"]["kernel"]) - y) ** 2)

    model, report = lora_one.init(PytreeModel(params), config=CONFIG)
    tx = lora_one.optimizer(model, start_steps=2)

    @jax.jit
    def step(tree, state):
        grads = jax.grad(lambda tree: loss(tree["lora"]) + jnp.sum(tree["other"]))(tree)
        updates, state = tx.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state

    tree = {"lora": model.lora, "other": jnp.zeros(2)}  # the model's factors as a part of a tree
    state = tx.init(tree)
    for _ in range(2):
        tree, state = step(tree, state)
    assert str(report).splitlines()[-1].startswith("up.kernel") and report.done
    product = model.replace(lora=tree["lora"]).effective()["up"]["kernel"] - params["up"]["kernel"]
    assert np.linalg.norm(product, 2) == pytest.approx(model.scaling / 128, rel=1e-3)

    module = linen.Dense(8)
    with pytest.raises(ModelError, match=r"only in a call: pass batches and loss_fn to init, or .* PytreeModel\(var"):
        lora_one.init(LinenModel(module, module.init(jax.random.key(0), BATCHES[0][0])), config=CONFIG)


def test_only_a_step_with_a_report_has_a_callback():
    """Which JAX compiles for the machine at hand only; test_lowering.py has the other for all platforms."""
    model, _ = lora_one.init(Net(nnx.Rngs(0)), config=CONFIG)
    factors = nnx.state(model, nnx.LoRAParam)
    for tx, callbacks in ((lora_one.optimizer(model), 1), (lora_adamw(start_steps="auto"), 0)):
        text = jax.jit(tx.update).lower(factors, tx.init(factors), factors).as_text()
        assert text.count("custom_call @xla_ffi_python_cpu_callback") == callbacks
