"""LoRA in nnx.Embed and nnx.Conv: against gradients of the plain model in float64, and PEFT on the same weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from flax import nnx

import lora_one
from lora_one.backends.jax.nnx.adopt import find_adapters
from lora_one.backends.numpy import NumpyOps
from lora_one.core.factors import Factors
from lora_one.core.precondition import precondition
from lora_one.errors import CheckpointError, ModelError
from tests.arrays import best_rank

RANK = 3
TARGETS = ["table", "line", "plane", "head"]
EPS = 1e-8  # Adam's


class Model(nnx.Module):
    def __init__(self, tied: bool = False):
        options = {"param_dtype": jnp.float64, "rngs": nnx.Rngs(0)}
        self.table = nnx.Embed(40, 12, **options)
        self.line = nnx.Conv(12, 16, (3,), strides=2, padding="VALID", **options)
        self.plane = nnx.Conv(1, 10, (3, 5), strides=(1, 2), padding=((1, 1), (2, 2)), **options)
        self.head = nnx.Linear(10, 12, **options)
        self.tied = tied

    def __call__(self, x: jax.Array) -> jax.Array:
        h = jnp.tanh(self.line(self.table(x)))  # (n, t, 16)
        h = jnp.tanh(self.plane(h[..., None]))  # (n, t, 8, 10)
        h = self.head(h.mean((1, 2)))
        return self.table.attend(h) if self.tied else h


class Same(torch.nn.Module):
    """The same model in PyTorch."""

    def __init__(self, model: Model):
        super().__init__()
        self.table = torch.nn.Embedding(40, 12)
        self.line = torch.nn.Conv1d(12, 16, 3, stride=2)
        self.plane = torch.nn.Conv2d(1, 10, (3, 5), stride=(1, 2), padding=(1, 2))
        self.head = torch.nn.Linear(10, 12)
        self.double()
        with torch.no_grad():
            for name in ("line", "plane", "head"):
                layer, kernel = getattr(self, name), np.asarray(getattr(model, name).kernel[...])
                layer.weight.set_(torch.tensor(np.moveaxis(kernel, (-1, -2), (0, 1))))
                layer.bias.set_(torch.tensor(np.asarray(getattr(model, name).bias[...])))
            self.table.weight.set_(torch.tensor(np.asarray(model.table.embedding[...])))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.line(self.table(x).mT)).mT[:, None]  # (n, 1, t, 16)
        return self.head(torch.tanh(self.plane(h)).mean((2, 3)))


def batches(tied: bool = False) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [(random.integers(0, 40, (4, 12)), random.standard_normal((4, 40 if tied else 12))) for _ in range(2)]


def loss(model: Model, batch: tuple[np.ndarray, np.ndarray]) -> jax.Array:
    return jnp.mean((model(batch[0]) - batch[1]) ** 2)


def matrix(layer: str, kernel: jax.Array) -> np.ndarray:
    """A kernel (size..., in, out), or a table (tokens, out), as (out, in)."""
    return np.asarray(kernel).reshape(-1, kernel.shape[-1]).T


@functools.cache
def _started(tied: bool) -> tuple[Model, Model, lora_one.Report]:
    plain = Model(tied)
    config = lora_one.Config(rank=RANK, targets=TARGETS, oversample=32)
    return plain, *lora_one.init(nnx.clone(plain), batches(tied), loss, config)


def started(tied: bool = False) -> tuple[Model, Model, lora_one.Report]:
    """A plain model, the same with a start, and the report: made once, as compiling takes seconds."""
    plain, model, report = _started(tied)
    return nnx.clone(plain), nnx.clone(model), report


@pytest.mark.feature("Embeddings")
@pytest.mark.feature("Convolutions")
@pytest.mark.parametrize(
    ("tied", "passes"),
    [(False, 1), (True, 2)],
    ids=["fold", "tied: two uses of one table"],
)
def test_a_start_is_the_truncated_svd_of_the_gradient(tied, passes):
    with jax.enable_x64(True):
        plain, model, report = started(tied)
        assert report.passes == passes
        mean = lambda model: sum(loss(model, batch) for batch in batches(tied)) / 2  # noqa: E731
        gradients = nnx.grad(mean)(plain)
        assert [layer.name for layer in report.layers] == sorted(TARGETS)
        for adapted in find_adapters(model, lora_one.Config()):
            name = adapted.site.name
            of_layer = gradients[name]
            g = matrix(name, (of_layer["embedding"] if name == "table" else of_layer["kernel"])[...])
            [pair] = adapted.site.spec_pairs(adapted.leaves)
            step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128.0
            np.testing.assert_allclose(np.asarray(pair.lora_B @ pair.lora_A), step, atol=1e-10 / 128)


def test_a_folder_opens_in_peft_and_here_and_merging_changes_nothing(tmp_path):
    with jax.enable_x64(True):
        plain, model, report = started()
        [x, _], _ = batches()
        expected = np.asarray(model(x))
        assert np.abs(expected - np.asarray(plain(x))).max() > 1e-3
        lora_one.save(model, tmp_path / "folder", report)
        theirs = peft.PeftModel.from_pretrained(Same(plain), str(tmp_path / "folder"))
        np.testing.assert_allclose(theirs(torch.tensor(x)).detach().numpy(), expected, atol=1e-12)
        again = lora_one.load(nnx.clone(plain), tmp_path / "folder")
        np.testing.assert_array_equal(np.asarray(again(x)), expected)
        merged = lora_one.merge(again)
        assert type(merged.table) is nnx.Embed and type(merged.plane) is nnx.Conv
        np.testing.assert_allclose(np.asarray(merged(x)), expected, atol=1e-12)
        other = Model()
        other.line = nnx.Linear(36, 16, rngs=nnx.Rngs(0))  # of the same size as a matrix
        with pytest.raises(CheckpointError, match=r"line: the model has a linear layer .* of a convolution of \(3,\)"):
            lora_one.load(other, tmp_path / "folder")


def test_a_preconditioned_step_takes_their_factors_as_matrices():
    with jax.enable_x64(True):
        _, model, _ = started()
        optimizer = nnx.Optimizer(
            model, lora_one.optimizer(model, learning_rate=1e-3, precondition=True, eps=EPS), wrt=nnx.LoRAParam
        )
        gradients = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, batches()[0])
        expected = {}
        for adapted in find_adapters(model, lora_one.Config()):
            layer, (a, b) = adapted.site.layout, adapted.leaves
            of_layer = gradients[adapted.site.name]
            leaves = (of_layer[adapted.a_path[-1]][...], of_layer[adapted.b_path[-1]][...])
            pair, gradient = (Factors(*map(np.asarray, layer.pairs(*x)[0])) for x in ((a, b), leaves))
            direction = precondition(NumpyOps(), pair, gradient, 1e-6, "absolute")
            steps = (1e-3 * d / (np.abs(d) + EPS) for d in direction)  # Adam's first one
            expected[adapted.site.name] = [x - step for x, step in zip(pair, steps, strict=True)]
        optimizer.update(model, gradients)
        for adapted in find_adapters(model, lora_one.Config()):
            for got, want in zip(
                adapted.site.layout.pairs(*adapted.leaves)[0], expected[adapted.site.name], strict=True
            ):
                np.testing.assert_allclose(np.asarray(got), want, atol=1e-8)


def test_all_linear_leaves_them_out_and_groups_are_refused():
    model = nnx.Sequential(nnx.Embed(9, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 6, rngs=nnx.Rngs(0)))
    mean_square = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    _, report = lora_one.init(model, [jnp.arange(5)], mean_square, lora_one.Config(rank=2))
    assert [layer.name for layer in report.layers] == ["layers.1"]
    grouped = nnx.Sequential(nnx.Conv(6, 6, (3,), feature_group_count=3, rngs=nnx.Rngs(0)))
    with pytest.raises(ModelError, match=r"layers\.0: it is a convolution with feature_group_count=3"):
        lora_one.init(grouped, [jnp.ones((1, 8, 6))], mean_square, lora_one.Config(rank=2, targets=["layers.0"]))
