import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint
import peft
import pytest
import torch
from flax import linen, nnx
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

import lora_one
from lora_one.backends.jax import LinenModel, PytreeModel, load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.checkpoint.metadata import read_report
from lora_one.errors import CheckpointError, GradientError, ModelError
from tests.backends.jax.llama.test_llama import make
from tests.backends.jax.models import mlp, regression, squared_error, values
from tests.backends.jax.nnx.test_nnx import Stacked
from tests.backends.jax.trees.test_trees import Network

TOKENS = np.random.default_rng(0).integers(3, 60, (4, 12))
TEXT = [{"input_ids": TOKENS[i : i + 2], "labels": TOKENS[i : i + 2]} for i in (0, 2)]
CONFIG = lora_one.Config(rank=4, targets=["q_proj", "v_proj", "down_proj"], passes=3)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(the base model's folder, the model after init, the adapter's folder)."""
    base, out = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("adapter")
    make("llama", base)
    model, report = lora_one.init(load_llama(base), TEXT, causal_lm_loss, CONFIG)
    lora_one.save(model, out, report)
    return base, model, out


@pytest.mark.feature("PEFT opens the folder")
def test_peft_opens_the_folder_with_equal_logits(llama):
    base, model, out = llama
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out).eval()
    with torch.no_grad():
        expected = reference(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(model(TOKENS), expected, atol=1e-4)
    assert float(np.abs(load_llama(base)(TOKENS) - expected).max()) > 1e-3
    assert read_report(out).backend == "jax"


def test_it_starts_where_torch_starts(llama, tmp_path):
    """The same checkpoint, batches and configuration: one start, whatever the framework."""
    base, _, out = llama
    batches = [{key: torch.tensor(value) for key, value in batch.items()} for batch in TEXT]
    other, _ = lora_one.init(AutoModelForCausalLM.from_pretrained(base), batches, config=CONFIG)
    lora_one.save(other, tmp_path)
    ours, theirs = (_products(folder) for folder in (out, tmp_path))
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        np.testing.assert_allclose(ours[name], expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


def _products(folder) -> dict[str, np.ndarray]:
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.rsplit(".lora_", 1)[0] for name in tensors}
    return {n: tensors[f"{n}.lora_B.weight"] @ tensors[f"{n}.lora_A.weight"] for n in names}


def test_tensors_are_written_as_they_are_and_not_as_they_lie(llama):
    """safetensors writes a transposed view's memory in the wrong order, without a word."""
    _, model, out = llama
    tensors = load_file(out / "adapter_model.safetensors")
    layer = model.model.layers[1].mlp.down_proj
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"
    np.testing.assert_array_equal(tensors[name.format("A")], np.asarray(layer.kernel_lora_a[...]).T)
    np.testing.assert_array_equal(tensors[name.format("B")], np.asarray(layer.kernel_lora_b[...]).T)


@pytest.mark.feature("Save and load")
def test_load_restores_the_model_and_an_adapter_of_peft(llama, tmp_path):
    base, model, out = llama
    loaded = lora_one.load(load_llama(base), out)
    np.testing.assert_array_equal(loaded(TOKENS), model(TOKENS))
    again = lora_one.load(loaded, out)  # onto LoRA that is there
    np.testing.assert_array_equal(again(TOKENS), model(TOKENS))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3, lora_alpha=7, use_rslora=True, target_modules=["k_proj", "o_proj"], init_lora_weights=False,
        rank_pattern={"model.layers.1.self_attn.k_proj": 5},
    )  # fmt: skip
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    np.testing.assert_allclose(lora_one.load(load_llama(base), tmp_path)(TOKENS), expected, atol=1e-4)


def test_a_folder_that_does_not_fit_changes_nothing(llama, tmp_path):
    base, _, out = llama
    for file in out.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((out / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 5}))
    model = load_llama(base)
    before = values(model)
    with pytest.raises(CheckpointError) as caught:
        lora_one.load(model, tmp_path)
    assert "model.layers.0.self_attn.q_proj: lora_A must be (5, 32), got (4, 32)" in caught.value.problems
    assert values(model).keys() == before.keys()
    with pytest.raises(ModelError, match="save needs a model with LoRA layers"):
        lora_one.save(model, tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_factors_are_kept_and_saved_as_they_are_where_somebody_made_them_so(dtype, tmp_path):
    config = lora_one.Config(rank=2, targets=["up"], passes=2)
    model, _ = lora_one.init(mlp(dtype), regression(1), squared_error, config)
    nnx.update(model, jax.tree.map(lambda x: x.astype(dtype), nnx.state(model, nnx.LoRAParam)))
    model, _ = lora_one.init(model, regression(1), squared_error, lora_one.Config(rank=2, passes=2))
    assert model.up.kernel_lora_a.dtype == dtype
    lora_one.save(model, tmp_path)
    stored = safe_open(tmp_path / "adapter_model.safetensors", framework="flax")
    assert {stored.get_tensor(name).dtype for name in stored.keys()} == {jnp.dtype(dtype)}  # noqa: SIM118
    loaded = lora_one.load(mlp(dtype), tmp_path)
    for side in "ab":
        got, expected = (getattr(m.up, f"kernel_lora_{side}") for m in (loaded, model))
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got[...], expected[...].astype(jnp.float32))


@pytest.mark.parametrize("kind", ["several-axes", "stack", "linen", "pytree"])
def test_other_models_round_trip_under_their_own_paths(kind, tmp_path):
    batches, loss = regression(1), squared_error
    config = lora_one.Config(rank=2, passes=2)
    rng = np.random.default_rng(0)
    variables = Network().init(jax.random.key(0), batches[0][0])
    params = {"a": {"kernel": rng.standard_normal((8, 7)).astype("f")}}
    make = {
        "several-axes": mlp,
        "stack": lambda: Stacked(nnx.Rngs(1)),
        "linen": lambda: LinenModel(Network(), variables),
        "pytree": lambda: PytreeModel(params),
    }[kind]
    if kind == "linen":
        config = lora_one.Config(rank=2, passes=2, targets=["up", "down"])
    if kind == "pytree":

        def loss(p, batch):
            return jnp.mean((jnp.tanh(batch[0] @ p["a"]["kernel"]) - batch[1]) ** 2)

    model, report = lora_one.init(make(), batches, loss, config)
    lora_one.save(model, tmp_path, report)
    loaded = lora_one.load(make(), tmp_path)

    def out(m):
        if kind == "pytree":
            return m.effective()["a"]["kernel"]
        if isinstance(m, nnx.Module):
            m.eval()
        return m(batches[0][0])

    np.testing.assert_allclose(out(loaded), out(model), atol=1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if kind == "stack":
        assert tensors["base_model.model.blocks.2.lora_A.weight"].shape == (2, 8)
    if kind == "several-axes":
        assert tensors["base_model.model.fused.lora_B.weight"].shape == (24, 2)


def test_orbax_keeps_the_factors(llama, tmp_path):
    base, model, _ = llama
    state = nnx.to_pure_dict(nnx.state(model, nnx.LoRAParam))
    with orbax.checkpoint.StandardCheckpointer() as saver:
        saver.save(tmp_path / "lora", state)
        saver.wait_until_finished()
        restored = saver.restore(tmp_path / "lora", jax.tree.map(jnp.zeros_like, state))
    fresh = lora_one.load(load_llama(base), llama[2])
    empty = nnx.state(fresh, nnx.LoRAParam)
    nnx.update(fresh, jax.tree.map(jnp.zeros_like, empty))
    assert not np.array_equal(fresh(TOKENS), model(TOKENS))
    nnx.replace_by_pure_dict(empty, restored)
    nnx.update(fresh, empty)
    np.testing.assert_array_equal(fresh(TOKENS), model(TOKENS))


class Small(nnx.Module):
    def __init__(self):
        self.up, self.down = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 7, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


class SmallLinen(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(7, name="down")(jnp.tanh(linen.Dense(8, name="up")(x)))


def small(kind):
    if kind == "nnx":
        return Small()
    if kind == "flax's own":
        model = Small()
        model.up = nnx.LoRA(8, 2, 8, base_module=model.up, rngs=nnx.Rngs(2))
        model.down = nnx.LoRA(8, 2, 7, base_module=model.down, rngs=nnx.Rngs(3))
        return model
    return LinenModel(SmallLinen(), SmallLinen().init(jax.random.key(0), np.ones((1, 8), "f")))


@pytest.mark.parametrize("kind", ["nnx", "flax's own", "linen"])
def test_an_adapter_of_another_scale_computes_what_the_folder_says_on_a_model_that_has_one(kind, tmp_path):
    """And a load or an init that fails on it changes nothing."""
    batches, x = regression(1), regression(1)[0][0]
    of_folder, _ = lora_one.init(small("linen" if kind == "linen" else "nnx"), batches, squared_error,
                                 lora_one.Config(rank=2, alpha=3.0, use_rslora=False, passes=2))  # fmt: skip
    lora_one.save(of_folder, tmp_path / "one")
    adapted, _ = lora_one.init(small(kind), batches, squared_error, lora_one.Config(rank=2, alpha=64.0, passes=2))
    other, _ = lora_one.init(small("nnx"), batches, squared_error, lora_one.Config(rank=3, passes=2))
    lora_one.save(other, tmp_path / "other")
    before = adapted(x)
    with pytest.raises(CheckpointError, match="the model has rank 2"):
        lora_one.load(adapted, tmp_path / "other")
    bad = [(x * np.nan, batches[0][1])]
    with pytest.raises(GradientError):
        lora_one.init(adapted, bad, squared_error, lora_one.Config(rank=2, passes=2))
    np.testing.assert_array_equal(adapted(x), before)
    loaded = lora_one.load(adapted, tmp_path / "one")
    np.testing.assert_allclose(loaded(x), of_folder(x), atol=1e-5)
    assert float(np.abs(before - of_folder(x)).max()) > 1e-3
    lora_one.save(loaded, tmp_path / "again")
    fresh = small("linen" if kind == "linen" else "nnx")
    np.testing.assert_allclose(lora_one.load(fresh, tmp_path / "again")(x), of_folder(x), atol=1e-5)
