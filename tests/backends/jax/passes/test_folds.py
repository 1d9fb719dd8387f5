"""The fold pass: states are those of the true gradients, and models that cannot be folded are seen in time."""

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, open_session
from lora_one.errors import GradientError
from tests.backends.jax.models import counted_compilations, gradients, regression, squared_error
from tests.backends.jax.passes.reference import assert_folded, start_of

BATCHES = regression(3)
CONFIG = lora_one.Config(rank=2)


class Net(nnx.Module):
    """Each kind of layer once; several axes of input and output; an einsum that sums over tokens; recomputation."""

    def __init__(self, dtype=jnp.float32):
        options = {"rngs": nnx.Rngs(0), "param_dtype": dtype, "dtype": dtype}
        self.up = nnx.Linear(8, 12, **options)
        self.fused = nnx.LinearGeneral(12, (3, 2, 4), **options)
        self.mix = nnx.Einsum("...cnh,ncdh->...d", (2, 3, 9, 4), (9,), **options)
        self.total = nnx.Einsum("bti,oi->bo", (5, 9), **options)
        self.down = nnx.Linear(5, 7, **options)

    def __call__(self, x):
        h = nnx.remat(lambda layer, x: jnp.tanh(layer(x)))(self.up, jnp.stack([x, x * x], axis=1))
        return self.down(jnp.tanh(self.total(jnp.tanh(self.mix(jnp.tanh(self.fused(h)))))))


# From a kernel's gradient to G, (out, in).
MATRICES = {
    "up": lambda g: g.T,
    "fused": lambda g: g.reshape(12, 24).T,
    "mix": lambda g: g.transpose(2, 0, 1, 3).reshape(9, 24),  # as "...cnh,ncdh->...d": its axes n, c, h are the input
    "total": lambda g: g,
    "down": lambda g: g.T,
}


def true_gradients(model) -> dict[str, list[np.ndarray]]:
    each = [gradients(model, [batch], squared_error) for batch in BATCHES]
    return {name: [matrix(g[name, "kernel"]) for g in each] for name, matrix in MATRICES.items()}


def test_nnx_states_are_those_of_the_true_gradients():
    model = Net()
    truth = true_gradients(model)
    with open_session(model, BATCHES, squared_error, CONFIG) as session:
        assert session.folds
        result, states = session.fold_pass(start_of(session))
        assert_folded(session, states, truth)
        expected = np.mean([squared_error(model, batch) for batch in BATCHES])
        assert result.loss == pytest.approx(expected, rel=1e-6)
        assert (result.batches, result.not_folded) == (3, frozenset())


@pytest.mark.parametrize("x64", [("jax", "float64")])
def test_float64_states_are_as_exact_as_the_gradients(x64):
    model = Net("float64")
    batches = [tuple(part.astype("float64") for part in batch) for batch in BATCHES]
    each = [gradients(model, [batch], squared_error) for batch in batches]
    truth = {name: [matrix(g[name, "kernel"]) for g in each] for name, matrix in MATRICES.items()}
    with open_session(model, batches, squared_error, CONFIG) as session:
        assert session.folds
        assert_folded(session, session.fold_pass(start_of(session))[1], truth, atol=1e-12)
        assert session.attached.gradient_function.fold_step._cache_size() == 1


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        h = jnp.tanh(linen.remat(linen.Dense)(12, name="up")(x))
        y = linen.DenseGeneral(9, axis=(-2, -1), name="join")(jnp.tanh(linen.DenseGeneral((3, 4), name="heads")(h)))
        y = y + linen.Einsum((9, 12), "bi,oi->bo", name="ein")(h)
        return linen.Dense(7, name="down")(jnp.tanh(y))


def test_linen_states_are_those_of_the_true_gradients():
    variables = LinenNet().init(jax.random.key(0), BATCHES[0][0])
    truth = [
        jax.grad(lambda p, b: squared_error(lambda x: LinenNet().apply({"params": p}, x), b))(
            variables["params"], batch
        )
        for batch in BATCHES
    ]
    shapes = {"up": (8, 12), "heads": (12, 12), "join": (12, 9), "down": (9, 7)}
    expected = {name: [g[name]["kernel"].reshape(shape).T for g in truth] for name, shape in shapes.items()}
    expected["ein"] = [g["ein"]["kernel"] for g in truth]
    with open_session(LinenModel(LinenNet(), variables), BATCHES, squared_error, CONFIG) as session:
        assert session.folds
        assert_folded(session, session.fold_pass(start_of(session))[1], expected)


class Tree(equinox.Module):
    """`shared` is called twice, for one example at a time: a weight's tap sees the gradient of all uses together."""

    up: equinox.nn.Linear
    shared: equinox.nn.Linear
    heads: jax.Array

    def __init__(self):
        keys = jax.random.split(jax.random.key(0), 3)
        self.up, self.shared = equinox.nn.Linear(8, 12, key=keys[0]), equinox.nn.Linear(12, 12, key=keys[1])
        self.heads = 0.2 * jax.random.normal(keys[2], (3, 7, 4))

    def __call__(self, x):
        h = jnp.tanh(self.shared(jnp.tanh(self.shared(jnp.tanh(self.up(x))))))
        return jnp.einsum("ni,noi->o", h.reshape(3, 4), self.heads)


def test_pytree_states_are_those_of_the_true_gradients():
    def loss(tree, batch):
        return squared_error(jax.vmap(tree), batch)

    truth = [equinox.filter_grad(loss)(Tree(), batch) for batch in BATCHES]
    expected = {
        "up.weight": [g.up.weight for g in truth],
        "shared.weight": [g.shared.weight for g in truth],
        "heads": [g.heads.transpose(1, 0, 2).reshape(7, 12) for g in truth],
    }
    with open_session(PytreeModel(Tree(), axes={"heads": "ioi"}), BATCHES, loss, CONFIG) as session:
        assert session.folds
        assert_folded(session, session.fold_pass(start_of(session))[1], expected)


def test_one_compilation_and_one_trace_serve_all_batches():
    traces = []

    def loss(model, batch):
        traces.append(None)
        return squared_error(model, batch)

    with open_session(Net(), iter(BATCHES), loss, lora_one.Config(rank=2, gradient="exact")) as session:
        assert session.folds
        start = start_of(session)
        with counted_compilations() as compiled:
            result, _ = session.fold_pass(start)
        assert result.batches == 3  # the iterator was not used up
        assert len(traces) == 1
        assert session.attached.gradient_function.fold_step._cache_size() == 1
        assert len(compiled) <= 4  # the step, a zero, a finite loss, the mean


class One(nnx.Module):
    def __init__(self):
        self.d, self.other = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1))


def twice(model, x):
    return model.d(jnp.tanh(model.d(x)))


def twice_in_one_jit(model, x):
    layer = nnx.jit(lambda layer, x: jnp.tanh(layer(x)))
    return layer(model.d, layer(model.d, x))


def once_in_jit_and_remat(model, x):
    return nnx.jit(nnx.remat(lambda layer, x: jnp.tanh(layer(x))))(model.d, x)


def by_example(model, x):
    return jax.vmap(model.d)(x)


def in_a_loop(model, x):
    return jax.lax.scan(lambda x, _: (jnp.tanh(model.d(x)), None), x, None, length=3)[0]


def in_a_branch(model, x):
    return jax.lax.cond(x[0, 0] > 0, model.d, lambda x: x, x)


def in_a_loop_with_remat(model, x):
    return jax.lax.scan(lambda x, _: (jax.checkpoint(lambda x: jnp.tanh(model.d(x)))(x), None), x, None, length=3)[0]


@pytest.mark.parametrize(
    ("use", "folds"),
    [
        (lambda model, x: model.d(x), True),
        (once_in_jit_and_remat, True),
        (twice, False),
        (twice_in_one_jit, False),
        (by_example, False),
        (in_a_loop, False),
        (in_a_loop_with_remat, False),
        (in_a_branch, False),
        (lambda model, x: nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0))(model.d, x), False),
    ],
)
def test_a_layer_must_be_called_once_in_a_forward_pass(use, folds):
    batch = regression(1, outs=8)[0]

    def loss(model, batch):
        return squared_error(lambda x: use(model, x), batch)

    with open_session(One(), [batch], loss, CONFIG) as session:
        assert session.folds == folds


def test_layers_that_no_forward_pass_calls_have_no_state():
    batches = regression(2, outs=8)

    def loss(model, batch):
        return squared_error(model.d, batch)

    with open_session(One(), batches, loss, CONFIG) as session:
        assert session.folds
        result, states = session.fold_pass(start_of(session))
    assert states["other"] is None
    assert float(states["d"].s[0]) > 0
    assert result.not_folded == frozenset()


def test_batches_unlike_the_first_are_told_apart():
    """One calls a layer that the first does not call, another calls one twice."""
    x, y = regression(1, outs=8)[0]

    def loss(model, batch):
        h = model.d(batch["x"])
        if "other" in batch:
            h = model.other(h)
        return jnp.mean((h - batch["y"]) ** 2)

    batches = [{"x": x, "y": y}, {"x": x, "y": y, "other": 1}, {"x": x, "y": y}]
    truth = [gradients(One(), [batch], loss) for batch in batches]
    with open_session(One(), batches, loss, CONFIG) as session:
        _, states = session.fold_pass(start_of(session))
        expected = {"d": [g["d", "kernel"].T for g in truth]}
        assert_folded(session, {"d": states["d"]}, expected)
        np.testing.assert_allclose(
            (states["other"].u * states["other"].s) @ states["other"].v.T, truth[1]["other", "kernel"].T / 3, atol=1e-5
        )

    def later_twice(model, batch):
        h = model.other(model.d(batch["x"]))
        return jnp.mean(((model.d(h) if "other" in batch else h) - batch["y"]) ** 2)

    with open_session(One(), batches, later_twice, CONFIG) as session:
        assert session.folds
        result, states = session.fold_pass(start_of(session))
    assert result.not_folded == {"d"}
    assert states["d"] is None
    assert states["other"] is not None


def stacked():
    class Stack(nnx.Module):
        def __init__(self):
            self.layers = nnx.vmap(lambda rngs: nnx.Linear(8, 8, rngs=rngs), in_axes=0)(nnx.Rngs(0).fork(split=2))

        def __call__(self, x):
            @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            def run(x, layer):
                return jnp.tanh(layer(x))

            return run(x, self.layers)

    return Stack()


def adopted():
    return nnx.Sequential(nnx.LoRALinear(8, 8, lora_rank=2, rngs=nnx.Rngs(0)))


def around():
    return nnx.Sequential(nnx.LoRA(8, 2, 8, base_module=nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1)))


class Own(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jax.random.normal(jax.random.key(0), (8, 8)))

    def __call__(self, x):
        return x @ self.weight[...]


class LoraOwn(Own):
    """A layer of a user's, which multiplies by its factors itself."""

    def __call__(self, x):
        return super().__call__(x) + self.weight_lora_scale * (x @ self.weight_lora_a[...] @ self.weight_lora_b[...])


def own():
    from lora_one.backends.jax import register_layer
    from lora_one.backends.jax.layout import plain_layout

    register_layer(Own, LoraOwn, lambda layer: plain_layout(layer.weight.shape, 1, 1), "weight")
    return nnx.Sequential(Own())


@pytest.mark.parametrize("make", [stacked, adopted, around, own])
def test_layers_whose_rows_no_tap_sees_are_not_folded(make):
    with open_session(make(), regression(1, outs=8), squared_error, CONFIG) as session:
        assert not session.folds


@pytest.mark.parametrize("scale", [1e-7, 1.0, 3e4])
def test_float16_is_folded_without_the_losss_scale(scale):
    model, wide = Net("float16"), Net()
    for name in MATRICES:
        getattr(wide, name).kernel[...] = getattr(model, name).kernel[...].astype("float32")
    truth = true_gradients(wide)

    def loss(model, batch):
        return scale * squared_error(model, batch)

    with open_session(model, BATCHES, loss, CONFIG) as session:
        result, states = session.fold_pass(start_of(session))
    assert max(result.rounded_away.values()) < 1e-2
    for name, state in states.items():
        g = scale * np.mean(truth[name], axis=0)
        got = np.asarray((state.u * state.s) @ state.v.T, np.float64)
        assert np.linalg.norm(got - g) < 2e-2 * np.linalg.norm(g), name


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model_as_it_was():
    model = Net()
    bad = [BATCHES[0], (BATCHES[1][0] * np.nan, BATCHES[1][1])]
    with pytest.raises(GradientError, match="batch 2"), open_session(model, bad, squared_error, CONFIG) as session:
        session.fold_pass(start_of(session))
    assert type(model.up) is nnx.Linear
    assert not hasattr(model.up, "kernel_lora_a")
