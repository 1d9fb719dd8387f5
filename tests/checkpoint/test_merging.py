"""`lora-one merge`: an adapter in a model folder's weights, for every framework and without any."""

import json
import sys

import jax
import mlx.core as mx
import mlx_lm
import numpy as np
import peft
import pytest
import torch
import transformers
from flax import nnx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import save_config, save_model

import lora_one
from lora_one import demo
from lora_one.checkpoint.merging import merge_folders
from lora_one.cli.commands import app
from lora_one.errors import CheckpointError
from tests.backends.mlx.models import tiny_mixtral
from tests.frameworks import MODELS, logits, torch_model

TOKENS = np.random.default_rng(0).integers(1, 60, (2, 9))
CONFIG = lora_one.Config(rank=3, modules_to_save=["lm_head"])


def llama(**changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {**sizes, "num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.2, **changes}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{"tie_word_embeddings": False, **config}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama in several files, with a tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    llama().save_pretrained(folder, max_shard_size="20KB")
    transformers.AutoTokenizer.from_pretrained(demo.MODEL).save_pretrained(folder)
    (folder / "README.md").write_text("The base model.")
    return folder


def adapted(framework: str, base):
    """The base with LoRA and other numbers in all that trains, and what moves them."""
    rng = np.random.default_rng(1)

    def moved(x):
        return 0.1 * rng.standard_normal(x.shape).astype(np.float32)

    model = __import__(f"lora_one.backends.{framework}", fromlist=["x"]).attach_plain(MODELS[framework](base), CONFIG)
    if framework == "torch":
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += torch.tensor(moved(parameter))
    elif framework == "jax":
        nnx.update(model, jax.tree.map(lambda x: x + moved(x), nnx.state(model, nnx.LoRAParam)))
    else:
        trained = tree_flatten(model.trainable_parameters())
        model.update(tree_unflatten([(name, x + mx.array(moved(x))) for name, x in trained]))
    return model


@pytest.mark.parametrize(
    "framework",
    [pytest.param(name, marks=pytest.mark.feature("Merged model as a folder", name)) for name in MODELS],
)
def test_a_folder_computes_what_the_adapted_model_does_wherever_it_opens(framework, base, tmp_path):
    model = adapted(framework, base)
    expected = logits(model, TOKENS)
    assert np.abs(expected - logits(torch_model(base), TOKENS)).max() > 0.5
    lora_one.save(model, tmp_path / "adapter")
    merge_folders(base, tmp_path / "adapter", tmp_path / "merged")
    for name, opened in MODELS.items():
        got = logits(opened(tmp_path / "merged"), TOKENS)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4, err_msg=name)
    in_mlx_lm, tokenizer = mlx_lm.load(str(tmp_path / "merged"))
    np.testing.assert_allclose(logits(in_mlx_lm, TOKENS), expected, rtol=0, atol=1e-4)
    assert tokenizer.encode("a") == transformers.AutoTokenizer.from_pretrained(demo.MODEL).encode("a")
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert names == {file.name for file in base.iterdir()} - {"README.md"} and "model.safetensors.index.json" in names


FAMILIES = {
    "gpt2": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
        ),
        {"target_modules": ["c_attn", "c_proj"], "rank_pattern": {"c_attn": 5}, "use_rslora": True},
    ),
    "gpt2, square alone": (
        lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_embd=24, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
        ),
        {"target_modules": ["attn.c_proj"]},
    ),
    "an embedding": (llama, {"target_modules": ["embed_tokens", "lm_head", "k_proj"]}),
    "a convolution": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(
                hidden_size=24,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
            )
        ),
        {"target_modules": ["projection", "query"], "modules_to_save": ["classifier"]},
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(
            transformers.BertConfig(
                hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64
            )
        ),
        {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"], "exclude_modules": ["pooler.dense"]},
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_folders_of_peft_of_other_families(name, tmp_path):
    make, settings = FAMILIES[name]
    torch.manual_seed(0)
    plain = make().eval()
    plain.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(plain, peft.LoraConfig(r=3, init_lora_weights=False, **settings)).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    inputs = torch.randn(2, 3, 8, 8) if name == "a convolution" else torch.tensor(TOKENS)
    with torch.no_grad():
        got, expected = (m(inputs).logits.numpy() for m in (merged, model))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)


def test_bfloat16_is_rounded_once_and_the_rest_keeps_its_bits(tmp_path):
    plain = llama().to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "base")
    before = {name: x.clone() for name, x in plain.state_dict().items()}
    model = peft.get_peft_model(plain, peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    after = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()
    for name, weight in after.items():
        assert weight.dtype == torch.bfloat16
        if "q_proj" not in name:
            assert torch.equal(weight, before[name])
            continue
        layer = model.base_model.model.get_submodule(name.removesuffix(".weight"))
        a, b = (getattr(layer, f"lora_{side}")["default"].weight.double() for side in "AB")
        exact = before[name].double() + layer.scaling["default"] * b @ a
        assert ((weight.double() - exact).abs() <= 2.0**-8 * 1.001 * exact.abs()).all()  # half a last place


def test_experts_of_mlx_lm(tmp_path):
    """A folder of mlx-lm with mlx-lm's own stacks of experts: PEFT's layout has no names for them."""
    model = tiny_mixtral()
    save_model(tmp_path / "base", model)
    arguments = {name: value for name, value in vars(model.args).items() if value is not None}
    save_config(arguments, tmp_path / "base" / "config.json")
    from lora_one.backends.mlx import attach_plain

    attach_plain(model, lora_one.Config(rank=2, modules_to_save=["lm_head"]))
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(name, x + 0.05 * mx.random.normal(x.shape)) for name, x in trained]))
    lora_one.save(model, tmp_path / "adapter")
    merge_folders(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = tiny_mixtral(seed=1)
    merged.load_weights(str(tmp_path / "merged" / "model.safetensors"))
    np.testing.assert_allclose(logits(merged, TOKENS), logits(model, TOKENS), rtol=0, atol=1e-4)


def refusal(base, adapter, out, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        merge_folders(base, adapter, out, **options)
    assert not out.exists() or base == out
    return str(caught.value)


def test_what_does_not_fit_is_named_all_at_once(base, tmp_path):
    adapter, out = tmp_path / "adapter", tmp_path / "merged"
    lora_one.save(adapted("torch", base), adapter)
    other = tmp_path / "other"
    llama(vocab_size=50, num_hidden_layers=1).save_pretrained(other)
    text = refusal(other, adapter, out)
    assert "lm_head.weight: must be (64, 32), got (50, 32)" in text
    assert "model.layers.1.self_attn.q_proj.weight: not in the model's files; a new head must be in" in text
    text = refusal(base, adapter, out, rename={"model": "decoder"})
    assert "decoder.layers.0.self_attn.q_proj.weight: not in the model's files, which have model.layers.0" in text
    assert "nothing is overwritten" in refusal(base, adapter, base)
    assert f"{tmp_path} is not a model folder" in refusal(tmp_path, adapter, out)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"quantization": {"bits": 4}}))
    assert "are quantised (quantization in config.json): merge into the model" in refusal(other, adapter, out)


def test_an_embedding_that_is_the_output_layer_too(tmp_path):
    """In PyTorch one of them was trained, in JAX and MLX both: the folder does not say."""
    plain = llama(tie_word_embeddings=True)
    plain.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    peft.get_peft_model(plain, config).save_pretrained(tmp_path / "adapter")
    text = refusal(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert "model.embed_tokens.weight: it is tied to the output layer in the model" in text


def test_the_command(base, tmp_path, capsys, monkeypatch):
    lora_one.save(adapted("torch", base), tmp_path / "adapter")
    monkeypatch.setattr(sys, "argv", ["lora-one", "merge", str(base), str(tmp_path / "adapter"), str(tmp_path / "out")])
    app(standalone_mode=False)
    assert "Model:" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()


def test_doras_magnitudes_are_left_to_the_framework(base, tmp_path):
    config = lora_one.Config(rank=3, targets=["q_proj"], dora=True)
    lora_one.save(lora_one.backends.torch.attach_plain(torch_model(base), config), tmp_path / "adapter")
    text = refusal(base, tmp_path / "adapter", tmp_path / "merged")
    assert "DoRA's magnitudes give whole rows another length: merge in the framework" in text
