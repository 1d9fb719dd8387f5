"""Adapter folders of MLX models: in mlx-lm, in PEFT, and back."""

import json

import mlx.core as mx
import numpy as np
import peft
import pytest
import torch
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear
from mlx_lm.tuner.trainer import default_loss
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.tuner.utils import load_adapters as mlx_lm_load_adapters
from safetensors import safe_open
from transformers import LlamaForCausalLM

import lora_one
from lora_one.backends.mlx import files, load_pretrained
from lora_one.backends.mlx.files import UnsavedWarning
from lora_one.backends.mlx.merge import RequantizeWarning
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import (
    QUANTIZED,
    contents,
    modules_of,
    product,
    quantize,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)

# A large step, so that the adapter matters.
CONFIG = lora_one.Config(rank=4, gradient="exact", gamma=2.0)


def logits(model):
    return np.array(model(token_batches()[0][0]))


def adapted(model, config=CONFIG):
    return lora_one.init(model, token_batches(), config=config)


def factors(model):
    return {name: x for name, x in contents(model).items() if name.endswith(("lora_a", "lora_b"))}


def assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.feature("Save and load")
@pytest.mark.feature("mlx-lm opens the folder")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_mlx_lm_and_lora_one_read_back_every_bit(make, tmp_path):
    model, report = adapted(make())
    lora_one.save(model, tmp_path, report)
    base = logits(make())
    assert np.abs(logits(model) - base).max() > 0.1
    theirs = mlx_lm_load_adapters(make(), str(tmp_path))
    ours = lora_one.load(make(), tmp_path)
    onto = lora_one.load(adapted(make(), lora_one.Config(rank=4, gradient="exact"))[0], tmp_path)
    for other in (theirs, ours, onto):
        assert_same(factors(other), factors(model))
        np.testing.assert_array_equal(logits(other), logits(model))
    assert (tmp_path / "adapter_model.safetensors").exists() == (make is tiny_llama)
    assert json.loads((tmp_path / "lora_one.json").read_text())["report"]["backend"] == "mlx"


def test_trainable_or_frozen_modes_and_random_stream(tmp_path):
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    mx.random.seed(3)
    expected = np.array(mx.random.uniform(shape=(2,)))
    mx.random.seed(3)
    frozen, trainable = (lora_one.load(tiny_llama(), tmp_path, trainable=flag) for flag in (False, True))
    mx.random.seed(3)
    lora_one.load(frozen, tmp_path)
    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(2,))), expected)
    assert tree_flatten(frozen.trainable_parameters()) == []
    names = [name for name, _ in tree_flatten(trainable.trainable_parameters())]
    assert names == [name for name, _ in tree_flatten(model.trainable_parameters())]
    assert not any(module.training for module in modules_of(trainable).values())


@pytest.mark.feature("PEFT opens the folder")
def test_peft_opens_the_folder_and_mlx_opens_pefts(tmp_path):
    write_llama(tmp_path / "base", rope_theta=500.0)
    model, _ = load_pretrained(tmp_path / "base")
    base = logits(model)
    adapted(model)
    lora_one.save(model, tmp_path / "ours")
    in_peft = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "ours")
    tokens = torch.tensor(np.array(token_batches()[0][0]))
    with torch.no_grad():
        theirs = in_peft(tokens).logits.numpy()
    assert np.abs(theirs - base).max() > 0.1
    np.testing.assert_allclose(theirs, logits(model), atol=2e-5)

    # The other way: rsLoRA's scale, and a rank and an alpha of its own for one layer.
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=True,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"layers.1.mlp.down_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 3},
        init_lora_weights=False,
    )
    in_peft = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base"), config)
    in_peft.save_pretrained(tmp_path / "theirs")
    ours = lora_one.load(load_pretrained(tmp_path / "base")[0], tmp_path / "theirs")
    with torch.no_grad():
        theirs = in_peft(tokens).logits.numpy()
    np.testing.assert_allclose(logits(ours), theirs, atol=2e-5)

    # mlx-lm knows one rank and one scale: zeros and a ratio in lora_b make up for it.
    lora_one.save(ours, tmp_path / "again")
    settings = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert settings["lora_parameters"]["rank"] == 4
    stock = mlx_lm_load_adapters(load_pretrained(tmp_path / "base")[0], str(tmp_path / "again"))
    np.testing.assert_allclose(logits(stock), logits(ours), atol=2e-5)
    again = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "again")
    with torch.no_grad():
        np.testing.assert_allclose(again(tokens).logits.numpy(), theirs, atol=2e-5)


def test_transposed_factors_are_written_as_they_are_not_as_they_lie(tmp_path):
    model, _ = adapted(tiny_llama())
    layer = model.layers[0].mlp.up_proj
    a = np.arange(layer.lora_a.size, dtype=np.float32).reshape(layer.lora_a.shape[::-1])
    layer.lora_a = mx.array(a).T  # a view with strides
    lora_one.save(model, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"), a)
    with safe_open(tmp_path / "adapters.safetensors", "numpy") as file:
        np.testing.assert_array_equal(file.get_tensor("model.layers.0.mlp.up_proj.lora_a"), a.T)


def test_bfloat16_factors_stay_what_they_are(tmp_path):
    model, _ = adapted(tiny_llama())
    for module in modules_of(model).values():
        if isinstance(module, LoRALinear):
            module.lora_a, module.lora_b = module.lora_a.astype(mx.bfloat16), module.lora_b.astype(mx.bfloat16)
    lora_one.save(model, tmp_path)
    assert mx.load(str(tmp_path / "adapter_model.safetensors")).popitem()[1].dtype == mx.bfloat16
    np.testing.assert_allclose(logits(lora_one.load(tiny_llama(), tmp_path)), logits(model), atol=1e-6)


def test_an_adapter_that_mlx_lm_trained_on_is_read_from_mlx_lms_file(tmp_path):
    """mlx-lm saves into the folder that it resumed from, and does not know PEFT's file beside its own."""
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    later = {name: 2 * x for name, x in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), later)
    loaded = lora_one.load(tiny_llama(), tmp_path)
    for name, x in tree_flatten(loaded.parameters()):
        if name in later:
            assert mx.array_equal(x, later[name])


def test_everything_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path):
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    arrays = mx.load(str(tmp_path / "adapters.safetensors"))
    q = "model.layers.0.self_attn.q_proj"
    arrays[f"{q}.lora_a"] = arrays[f"{q}.lora_a"][:, :3]
    arrays["model.layers.7.mlp.up_proj.lora_a"] = arrays["model.layers.7.mlp.up_proj.lora_b"] = mx.zeros((4, 4))
    del arrays["model.layers.1.mlp.up_proj.lora_b"]
    arrays["model.norm.weight"] = mx.ones((64,))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), arrays)
    for other in (tiny_llama(), adapted(tiny_llama())[0]):
        before = contents(other)
        with pytest.raises(lora_one.errors.CheckpointError) as caught:
            lora_one.load(other, tmp_path)
        assert caught.value.problems == [
            f"{q}: lora_a must be (64, 4), got (64, 3)",
            "model.layers.1.mlp.up_proj: lora_b is missing",
            "model.layers.7.mlp.up_proj: the model has no such linear layer",
            "model.norm.weight: neither lora_a, lora_b nor m of a linear layer",
        ]
        assert_same(contents(other), before)


def test_what_peft_stores_besides_plain_lora_is_an_error(tmp_path):
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    (tmp_path / "adapters.safetensors").unlink()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings.update(use_dora=True, trainable_token_indices=[1], r=3)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(lora_one.errors.CheckpointError) as caught:
        lora_one.load(tiny_llama(), tmp_path)
    text = str(caught.value)
    assert "q_proj: lora_A must be (3, 64), got (4, 64)" in text
    assert "use_dora" in text
    assert "trainable_token_indices" in text


def test_adapters_of_other_shapes_ranks_and_kinds(tmp_path):
    def complaint(model):
        with pytest.raises(lora_one.errors.CheckpointError) as caught:
            lora_one.load(model, tmp_path)
        return str(caught.value)

    assert "adapter_config.json" in complaint(tiny_llama())
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    assert "lora_a must be (32, 4), got (64, 4)" in complaint(
        tiny_llama(hidden_size=32, num_attention_heads=2, num_key_value_heads=1)
    )
    other, _ = adapted(tiny_llama(), lora_one.Config(rank=2, gradient="exact", targets=["q_proj", "lm_head"]))
    text = complaint(other)
    assert "q_proj: the model has rank 2, the file 4" in text
    assert "lm_head: the model has LoRA here, the file has none" in text
    assert "mlp.up_proj: the file has LoRA here, the model has none" in text
    (tmp_path / "adapters.safetensors").write_bytes(b"short")
    assert "cannot be read" in complaint(tiny_llama())
    lora_one.save(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "fine_tune_type": "dora"}))
    assert 'q_proj: m is missing, and "fine_tune_type" is "dora"' in complaint(tiny_llama())
    with pytest.raises(lora_one.errors.ModelError, match="save needs a model with LoRA layers"):
        lora_one.save(tiny_llama(), tmp_path)


def trainable(model):
    return {name for name, _ in tree_flatten(model.trainable_parameters())}


def test_trainable_holds_whatever_was_in_the_model(tmp_path):
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    everything = trainable(model)
    assert len(everything) == 28
    assert trainable(lora_one.load(lora_one.load(tiny_llama(), tmp_path), tmp_path, trainable=True)) == everything
    model.model.norm.unfreeze()  # no factor: its user's own
    assert trainable(lora_one.load(model, tmp_path, trainable=False)) == {"model.norm.weight"}
    assert trainable(lora_one.load(model, tmp_path, trainable=True)) == everything | {"model.norm.weight"}


def test_init_on_an_adapter_that_was_loaded_frozen_returns_it_ready_to_train(tmp_path):
    model, _ = adapted(tiny_llama())
    lora_one.save(model, tmp_path)
    everything = trainable(model)
    again, _ = adapted(lora_one.load(tiny_llama(), tmp_path), lora_one.Config(gradient="exact"))
    assert trainable(again) == everything
    lora_one.optimizer(again)
    # Where its user has frozen some factors and not others, that stays.
    again.layers[0].mlp.up_proj.freeze(keys=["lora_a"], recurse=False)
    again, _ = adapted(again, lora_one.Config(gradient="exact"))
    assert trainable(again) == everything - {"model.layers.0.mlp.up_proj.lora_a"}


@pytest.mark.feature("LoRA dropout")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_loading_onto_an_adapter_of_another_scale_and_dtype_computes_what_the_folder_does(make, tmp_path):
    model, _ = adapted(make(), lora_one.Config(rank=4, gradient="exact", gamma=2.0, dropout=0.125))
    lora_one.save(model, tmp_path)
    other, _ = adapted(make(), lora_one.Config(rank=4, gradient="exact", alpha=3.0, use_rslora=False))
    for module in modules_of(other).values():
        if "lora_a" in module:
            module.lora_a, module.lora_b = module.lora_a.astype(mx.bfloat16), module.lora_b.astype(mx.bfloat16)
    other.train()
    lora_one.load(other, tmp_path)
    assert {m.dropout._p_1 for m in modules_of(other).values() if "lora_a" in m} == {0.875}
    assert all(module.training for module in modules_of(other).values())
    other.eval()
    np.testing.assert_array_equal(logits(other), logits(model))


@pytest.mark.parametrize("reason", ["does not fit", "fails half way"])
def test_after_a_second_load_that_fails_the_adapter_is_as_it_was(reason, tmp_path, monkeypatch):
    source, _ = adapted(tiny_llama(), lora_one.Config(rank=4, gradient="exact", dropout=0.5))
    lora_one.save(source, tmp_path)
    model, _ = adapted(tiny_llama(), lora_one.Config(rank=4, gradient="exact", gamma=2.0, alpha=5.0, dropout=0.25))
    model.train()
    model.layers[0].self_attn.q_proj.freeze()

    def state():
        adapters = {path: m for path, m in modules_of(model).items() if isinstance(m, LoRALinear)}
        return {path: (m.scale, m.dropout._p_1, m.training, set(m._no_grad)) for path, m in adapters.items()}

    before, arrays = state(), contents(model)
    kind, calls = lora_one.errors.CheckpointError, []
    if reason == "does not fit":
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        settings["lora_parameters"]["rank"] = 3
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        kind = MemoryError

        def failing(layer, real=files.to_mlx):
            calls.append(layer)
            if len(calls) == 5:
                raise MemoryError
            return real(layer)

        monkeypatch.setattr(files, "to_mlx", failing)
    with pytest.raises(kind):
        lora_one.load(model, tmp_path, trainable=True)
    assert state() == before
    assert_same(contents(model), arrays)


def test_what_is_trained_besides_lora_is_not_lost_without_a_word(tmp_path):
    model, _ = adapted(tiny_llama())
    model.model.norm.unfreeze()
    with pytest.warns(UnsavedWarning, match=r"1 trainable parameters are no LoRA factors.*model\.norm\.weight"):
        lora_one.save(model, tmp_path)


@pytest.mark.feature("Merge")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_merging_into_float_weights_changes_no_logit_and_freezes_as_before(make):
    model, _ = adapted(make())
    expected, names = logits(model), set(contents(make()))
    weight = np.array(model.layers[0].self_attn.q_proj.linear.weight)
    delta = product(model.layers[0].self_attn.q_proj)
    assert lora_one.merge(model) is model
    np.testing.assert_allclose(logits(model), expected, atol=1e-4)
    np.testing.assert_allclose(np.array(model.layers[0].self_attn.q_proj.weight), weight + delta, atol=1e-6)
    assert set(contents(model)) == names
    assert tree_flatten(model.trainable_parameters()) == []
    with pytest.raises(lora_one.errors.ModelError, match="merge needs a model with LoRA layers"):
        lora_one.merge(model)


@pytest.mark.parametrize("base", QUANTIZED, ids=str)
def test_merging_into_quantised_weights_warns_of_what_it_loses(base):
    batch = token_batches()[0]
    model, _ = adapted(quantize(tiny_llama(), *base))
    expected = logits(model)
    with pytest.warns(RequantizeWarning, match=r"14 quantised layers.*dequantize=True"):
        lora_one.merge(model)
    lost = np.abs(logits(model) - expected).max()
    model, _ = adapted(quantize(tiny_llama(), *base))
    loss = default_loss(model, *batch)[0].item()
    lora_one.merge(model, dequantize=True)
    kept = np.abs(logits(model) - expected).max()
    assert "scales" not in model.layers[0].mlp.up_proj
    assert kept < 1e-4
    assert kept < 0.2 * lost
    assert default_loss(model, *batch)[0].item() == pytest.approx(loss, abs=0.02)


def test_an_adapter_on_a_plain_adapted_model_of_mlx_lm_is_saved_too(tmp_path):
    """No lora_one.init: mlx-lm's own attachment, with its default scale."""
    model = tiny_llama()
    model.freeze()
    linear_to_lora_layers(model, 1, {"rank": 3, "scale": 20.0, "dropout": 0.1, "keys": ["mlp.up_proj"]})
    model.eval()
    model.layers[1].mlp.up_proj.lora_b = mx.ones_like(model.layers[1].mlp.up_proj.lora_b) * 0.01
    lora_one.save(model, tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["r"] == 3
    assert settings["lora_alpha"] == 60.0
    assert settings["lora_parameters"]["dropout"] == pytest.approx(0.1)
    np.testing.assert_array_equal(logits(lora_one.load(tiny_llama(), tmp_path)), logits(model))
