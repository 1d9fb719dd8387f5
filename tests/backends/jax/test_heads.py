"""Modules that are trained whole beside the LoRA layers: `Config(modules_to_save=...)` on JAX."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from flax import linen, nnx
from transformers import LlamaConfig, LlamaForCausalLM

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, attach_plain, load_llama, unload
from lora_one.backends.jax.nnx.whole import WholeParam, whole_parameters
from lora_one.errors import CheckpointError, ModelError
from tests.backends.heads_recipe import run_recipe
from tests.backends.jax.models import assert_same, mlp, regression, squared_error, values
from tests.frameworks import logits, opened_by_peft

CONFIG = lora_one.Config(rank=2, modules_to_save=["down"])
BATCHES = regression()


def write_llama(folder: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=60, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def moved(model: nnx.Module, seed: int = 0) -> nnx.Module:
    """The model with other numbers in all that trains."""
    rng = np.random.default_rng(seed)
    state = nnx.state(model, nnx.LoRAParam)
    nnx.update(model, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), state))
    return model


@pytest.mark.feature("New heads (modules_to_save)")
def test_a_head_of_a_llama_opens_in_peft_and_here_and_is_merged(tmp_path):
    base, folder, tokens = tmp_path / "base", tmp_path / "adapter", np.arange(12).reshape(2, 6)
    write_llama(base)
    config = lora_one.Config(rank=2, modules_to_save=["lm_head", "model.norm", "embed_tokens"])
    model = moved(attach_plain(load_llama(base), config))
    expected = logits(model, tokens)
    assert np.abs(expected - logits(load_llama(base), tokens)).max() > 0.1
    lora_one.save(model, folder)
    for fresh in (load_llama(base), attach_plain(load_llama(base), config)):
        np.testing.assert_array_equal(logits(lora_one.load(fresh, folder), tokens), expected)
    np.testing.assert_allclose(logits(opened_by_peft(base, folder), tokens), expected, rtol=0, atol=1e-4)
    merged = lora_one.merge(model)
    np.testing.assert_allclose(logits(merged, tokens), expected, rtol=0, atol=1e-5)
    assert not nnx.to_flat_state(nnx.state(merged, nnx.LoRAParam))


class Reader(nnx.Module):
    """An embedding, a norm and a convolution beside a linear layer."""

    def __init__(self, rngs: nnx.Rngs):
        self.table = nnx.Embed(11, 6, rngs=rngs)
        self.norm = nnx.LayerNorm(6, rngs=rngs)
        self.up = nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Conv(8, 5, (3,), padding="VALID", rngs=rngs)

    def __call__(self, tokens):  # (rows, length) -> (rows, length - 2, 5)
        return self.head(jnp.tanh(self.up(self.norm(self.table(tokens)))))


class TorchReader(torch.nn.Module):
    def __init__(self, reader: Reader):
        super().__init__()
        self.table, self.norm = torch.nn.Embedding(11, 6), torch.nn.LayerNorm(6, eps=1e-6)
        self.up, self.head = torch.nn.Linear(6, 8), torch.nn.Conv1d(8, 5, 3)
        with torch.no_grad():
            self.up.weight.copy_(torch.tensor(np.array(reader.up.kernel[...]).T))
            self.up.bias.copy_(torch.tensor(np.array(reader.up.bias[...])))

    def forward(self, tokens):
        return self.head(torch.tanh(self.up(self.norm(self.table(tokens)))).transpose(1, 2)).transpose(1, 2)


def test_embeddings_norms_and_convolutions_have_pytorchs_names_and_axes(tmp_path):
    """A twin in PyTorch computes the same with the folder, in both directions, whatever its own weights are."""
    tokens = np.array([[1, 2, 3, 4, 10], [0, 5, 6, 7, 8]])
    names = ["table", "norm", "head"]
    model = moved(attach_plain(Reader(nnx.Rngs(0)), lora_one.Config(rank=2, targets=["up"], modules_to_save=names)))
    lora_one.save(model, tmp_path / "jax")
    twin = peft.PeftModel.from_pretrained(TorchReader(model), tmp_path / "jax").eval()
    with torch.no_grad():
        np.testing.assert_allclose(twin(torch.tensor(tokens)).numpy(), model(tokens), rtol=0, atol=1e-5)
        for name, parameter in twin.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_()
        twin.save_pretrained(tmp_path / "torch")
        again = lora_one.load(Reader(nnx.Rngs(0)), tmp_path / "torch")
        np.testing.assert_allclose(again(tokens), twin(torch.tensor(tokens)).numpy(), rtol=0, atol=1e-4)


class Net(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.Linear(12, 7, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


def test_what_trains_and_that_the_layers_start_as_without_it():
    """The gradient of a layer does not depend on what else is trained."""
    base = values(Net())
    model, report = lora_one.init(Net(), BATCHES, squared_error, CONFIG)
    alone, _ = lora_one.init(Net(), BATCHES, squared_error, lora_one.Config(rank=2, targets=["up"]))
    assert [layer.name for layer in report.layers] == ["up"]
    assert_same(values(model), values(alone))
    assert all(np.array_equal(values(model)[path], value) for path, value in base.items())
    trained = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
    assert {path for path in trained if "lora_" not in path} == {"down.kernel", "down.bias"}


def test_the_head_follows_adamw_in_place_of_the_preconditioner_and_resumes():
    model = attach_plain(Net(), CONFIG)
    before = np.array(model.down.kernel[...], np.float64)
    trainer = nnx.Optimizer(model, lora_one.optimizer(model, 1e-2, precondition=True), wrt=nnx.LoRAParam)
    gradients = nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam))(model, BATCHES[0])
    gradient = np.array(gradients["down"]["kernel"][...], np.float64)
    trainer.update(model, gradients)
    expected = before - 1e-2 * gradient / (np.abs(gradient) + 1e-8)  # Adam's first step
    np.testing.assert_allclose(np.array(model.down.kernel[...]), expected, rtol=0, atol=1e-6)
    resumed = attach_plain(Net(), CONFIG)
    nnx.update(resumed, nnx.state(model, nnx.LoRAParam))  # as a checkpoint of what trains restores it
    np.testing.assert_array_equal(resumed(BATCHES[0][0]), model(BATCHES[0][0]))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(7, name="head")(jnp.tanh(linen.Dense(12, name="up")(x)))


def net(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    return h @ params["head"]["kernel"] + params["head"]["bias"]


def tree_case(kind: str):
    """A model, its loss, and its output."""
    variables = LinenNet().init(jax.random.key(0), BATCHES[0][0])
    if kind == "linen":
        return LinenModel(LinenNet(), variables), squared_error, lambda model, x: model(x)

    def loss(params, batch):
        return jnp.mean((net(params, batch[0]) - batch[1]) ** 2)

    return PytreeModel(variables["params"]), loss, lambda model, x: net(model.effective(), x)


@pytest.mark.parametrize("kind", ["linen", "pytree"])
def test_a_head_in_a_tree_trains_in_its_lora_is_saved_loaded_and_merged(kind, tmp_path):
    base, loss_fn, output = tree_case(kind)
    x = BATCHES[0][0]
    model, report = lora_one.init(base, BATCHES, loss_fn, lora_one.Config(rank=2, modules_to_save=["head"]))
    assert [layer.name.split(".")[0] for layer in report.layers] == ["up"]
    assert set(model.lora["head"]) == {"kernel", "bias"} and len(model.lora) == 2
    tx = lora_one.optimizer(model, learning_rate=1e-2, precondition=True)

    def loss(lora):
        with_lora = model.replace(lora=lora)
        return loss_fn(with_lora.effective() if kind == "pytree" else with_lora, BATCHES[0])

    def step(lora, state):
        updates, state = tx.update(jax.grad(loss)(lora), state, lora)
        return optax.apply_updates(lora, updates), state

    lora, _ = jax.jit(step, donate_argnums=(0,))(model.lora, tx.init(model.lora))
    np.testing.assert_array_equal(output(base, x), output(tree_case(kind)[0], x))  # the base is another array
    trained = model.replace(lora=lora)
    expected = output(trained, x)
    lora_one.save(trained, tmp_path)
    for fresh in (base, lora_one.init(base, BATCHES, loss_fn, lora_one.Config(rank=2, modules_to_save=["head"]))[0]):
        np.testing.assert_allclose(output(lora_one.load(fresh, tmp_path), x), expected, rtol=0, atol=1e-6)
    merged = lora_one.merge(trained)
    np.testing.assert_allclose(output(merged, x), expected, rtol=0, atol=1e-6)
    assert merged.lora == {}
    again, _ = lora_one.init(trained, BATCHES, loss_fn)  # the adapter keeps its head
    np.testing.assert_array_equal(again.lora["head"]["kernel"], lora["head"]["kernel"])


ERRORS = {
    "unknown": ({"modules_to_save": ["donw"]}, r"got \['donw'\]; at its top are: .*; near names: down"),
    "also a target": ({"modules_to_save": ["up"], "targets": ["up"]}, r"must name different modules, got both for up"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_leave_the_model_as_it_was(name):
    settings, message = ERRORS[name]
    model = mlp()
    with pytest.raises(ModelError, match=message):
        lora_one.init(model, BATCHES, squared_error, lora_one.Config(rank=2, **settings))
    assert_same(values(model), values(mlp()))
    assert not whole_parameters(model)


def test_a_failing_loss_takes_the_head_back():
    model = mlp()
    with pytest.raises(KeyError, match="mine"):
        lora_one.init(model, BATCHES, lambda model, batch: {}["mine"], CONFIG)
    assert type(model.down.kernel) is nnx.Param and not isinstance(model.down.kernel, WholeParam)


def test_running_statistics_and_quantised_parameters_are_refused():
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    with pytest.raises(ModelError, match=r"layers\.1\.mean is a running statistic"):
        attach_plain(model, lora_one.Config(rank=1, modules_to_save=["layers.1"]))
    model = mlp()
    model.down.kernel = nnx.Param(jnp.ones((9, 7), jnp.int8))
    with pytest.raises(ModelError, match=r"down\.kernel is of dtype int8, quantised"):
        attach_plain(model, CONFIG)


def test_a_head_that_only_one_side_has_is_an_error(tmp_path):
    plain = attach_plain(mlp(), lora_one.Config(rank=2, targets=["up", "shared", "fused", "mix"]))
    with_head = attach_plain(mlp(), CONFIG)
    lora_one.save(plain, tmp_path / "without")
    lora_one.save(with_head, tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"down\.weight: .* the model has no such module to save"):
        lora_one.load(plain, tmp_path / "with")
    with pytest.raises(CheckpointError, match=r"down\.weight: the model keeps it whole, the file has none"):
        lora_one.load(with_head, tmp_path / "without")
    with pytest.raises(ModelError, match=r"modules_to_save \('down',\) \(the adapter's: \(\)\)"):
        lora_one.init(plain, BATCHES, squared_error, CONFIG)
    with pytest.raises(ModelError, match=r"down\.bias, down\.kernel were trained whole, in place of the base weights"):
        unload(with_head)


@pytest.mark.feature("New heads (modules_to_save)")
def test_the_documented_recipe(tmp_path, monkeypatch):
    """docs/guide/new-heads.md, word for word: the fit lowers the loss, and the adapter carries the head."""
    monkeypatch.chdir(tmp_path)
    write_llama(tmp_path / "model")
    rng = np.random.default_rng(0)
    batches = [(rng.integers(0, 60, (4, 6)), rng.integers(0, 16, 4)) for _ in range(2)]

    def forget_head(model):
        model.head.kernel[...] = jnp.zeros((32, 16))

    run_recipe("JAX", r"^head = |^config = ", batches, forget_head)
