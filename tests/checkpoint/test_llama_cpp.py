"""`convert --to gguf`: what gguf's reader finds in the file is the folder's s B A, in llama.cpp's names and order."""

import json
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from typer.testing import CliRunner

import lora_one
from lora_one.cli import commands as cli
from lora_one.errors import BackendError, CheckpointError, ConfigError

# Heads, key heads, rows of a head and widths all differ, so that none can stand for another.
SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 48,
    "max_position_embeddings": 64,
}
MODELS = {  # class in transformers -> (architecture in gguf, whether llama.cpp rotates neighbouring rows together)
    "Llama": ("llama", True),
    "Mistral": ("llama", True),
    "Qwen2": ("qwen2", False),
    "Qwen3": ("qwen3", False),
    "Gemma": ("gemma", False),
    "Gemma2": ("gemma2", False),
    "Gemma3": ("gemma3", False),
}
ALL = {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 6}
PATTERNS = ALL | {"rank_pattern": {"k_proj": 1, "o_proj": 6}, "alpha_pattern": {"up_proj": 3, "down_proj": 0}}


def tiny(name: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    text = "Text" if name == "Gemma3" else ""
    sizes = SIZES if name != "Qwen2" else SIZES | {"hidden_size": 32}  # its heads always fill the hidden size
    config = getattr(transformers, f"{name}{text}Config")(**sizes | settings)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def write(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> peft.PeftModel:
    """Save the base model's configuration and an adapter with random factors; return PEFT's model."""
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder / "base")
    model.name_or_path = str(folder / "base")
    config = peft.LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", "init_lora_weights": False} | settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.data = (0.3 * torch.randn_like(parameter)).to(dtype)
        adapted.save_pretrained(folder / "src", save_embedding_layers=False)
    return adapted


def products(adapted: peft.PeftModel) -> dict[str, np.ndarray]:
    """Path -> s B A in float64, by PEFT's own scales."""
    result = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            a, b = (side["default"].weight.detach().double().numpy() for side in (module.lora_A, module.lora_B))
            result[name] = module.scaling["default"] * b @ a
    return result


def fields(reader: gguf.GGUFReader) -> dict[str, object]:
    return {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}


def loaded(reader: gguf.GGUFReader) -> dict[str, np.ndarray]:
    """Base tensor -> what llama.cpp adds to it: alpha / r B A, r the columns of lora_b; a scale of 1 for alpha 0."""
    alpha = float(fields(reader)["adapter.lora.alpha"])
    tensors = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in reader.tensors}
    result = {}
    for name in tensors:
        if name.endswith(".lora_a"):
            a, b = tensors[name], tensors[f"{name.removesuffix('a')}b"]
            result[name.removesuffix(".lora_a")] = (alpha / b.shape[1] if alpha else 1.0) * b @ a
    assert len(tensors) == 2 * len(result)
    return result


def expected_row(row: int, head_dim: int) -> int:
    """The row of llama.cpp's matrix for a row of transformers': i -> 2i, and i + d / 2 -> 2i + 1 in each head."""
    head, i = divmod(row, head_dim)
    half = head_dim // 2
    return head * head_dim + (2 * i if i < half else 2 * (i - half) + 1)


@pytest.mark.feature("llama.cpp reads it", "torch")
@pytest.mark.parametrize("settings", [ALL, PATTERNS], ids=["one-scale", "scales-and-ranks"])
@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_the_folders_product_in_llama_cpps_names_and_rows(name, settings, tmp_path):
    model = tiny(name)
    architecture, rotates_neighbours = MODELS[name]
    blocks = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], 2)
    names = {key: blocks.get_name(key, (".weight",)) for key in model.state_dict() if "_proj.weight" in key}
    adapted = write(model, tmp_path, **settings)
    lora_one.convert(tmp_path / "src", tmp_path / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert fields(reader) == {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": pytest.approx(6 * 2),  # rsLoRA: alpha sqrt(r)
    }
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    got = loaded(reader)
    assert got.keys() == set(names.values())
    assert len(got) == 2 * 7
    head_dim = getattr(model.config, "head_dim", None) or 8
    for path, product in products(adapted).items():
        rows = np.arange(len(product))
        if rotates_neighbours and path.endswith((".q_proj", ".k_proj")):
            rows = np.array([expected_row(row, head_dim) for row in rows])
        size = max(np.abs(product).max(), 1e-3)  # one scale is 0
        np.testing.assert_allclose(got[names[f"{path}.weight"]][rows], product, atol=1e-6 * size, rtol=0, err_msg=path)


def rotated(x: np.ndarray, head_dim: int, is_in_neighbours: bool) -> np.ndarray:
    """Rotary embedding of (length, heads * d): the halves of a head together, or neighbours as llama.cpp does it."""
    length, half = len(x), head_dim // 2
    heads = x.reshape(length, -1, head_dim)
    first, second = (heads[..., 0::2], heads[..., 1::2]) if is_in_neighbours else (heads[..., :half], heads[..., half:])
    angle = np.arange(length)[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    turned = (first + 1j * second) * np.exp(1j * angle)  # (length, heads, d / 2)
    return np.stack([turned.real, turned.imag], axis=-1).reshape(length, -1, head_dim)


def test_attention_scores_are_the_same_under_each_librarys_rotation(tmp_path):
    """Queries and keys of s B A alone: this tells a permutation from its inverse without knowing either."""
    adapted = write(tiny("Llama"), tmp_path, **ALL)
    lora_one.convert(tmp_path / "src", tmp_path / "adapter.gguf", "gguf")
    got, ours = loaded(gguf.GGUFReader(tmp_path / "adapter.gguf")), products(adapted)
    x = np.random.default_rng(0).standard_normal((5, 24))
    scores = []
    for q, k, is_in_neighbours in (
        (*(ours[f"model.layers.1.self_attn.{side}_proj"] for side in "qk"), False),
        (*(got[f"blk.1.attn_{side}.weight"] for side in "qk"), True),
    ):
        queries, keys = (rotated(x @ weight.T, 8, is_in_neighbours) for weight in (q, k))
        scores.append(np.einsum("ihd,jhd->hij", queries, np.repeat(keys, 2, axis=1)))
    np.testing.assert_allclose(scores[1], scores[0], rtol=0, atol=1e-5 * np.abs(scores[0]).max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_factors_are_widened_exactly(dtype, tmp_path):
    write(tiny("Qwen3"), tmp_path, dtype, target_modules=["up_proj"], lora_alpha=8)
    lora_one.convert(tmp_path / "src", tmp_path / "adapter.gguf", "gguf")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "src" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    for tensor in gguf.GGUFReader(tmp_path / "adapter.gguf").tensors:
        block, side = tensor.name.split(".")[1], tensor.name[-1].upper()
        key = f"base_model.model.model.layers.{block}.mlp.up_proj.lora_{side}.weight"
        np.testing.assert_array_equal(tensor.data, stored[key].float().numpy())


def test_an_output_layer_of_its_own_is_carried(tmp_path):
    adapted = write(tiny("Llama", tie_word_embeddings=False), tmp_path, target_modules=["lm_head"])
    lora_one.convert(tmp_path / "src", tmp_path / "adapter.gguf", "gguf")
    [(name, product)] = loaded(gguf.GGUFReader(tmp_path / "adapter.gguf")).items()
    assert name == "output.weight"
    np.testing.assert_allclose(product, products(adapted)["lm_head"], rtol=0, atol=1e-6)


def test_scales_that_are_all_zero_add_nothing(tmp_path):
    """llama.cpp takes an alpha of 0 to mean a scale of 1."""
    write(tiny("Qwen3"), tmp_path, target_modules=["up_proj"], lora_alpha=0)
    lora_one.convert(tmp_path / "src", tmp_path / "adapter.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    assert fields(reader)["adapter.lora.alpha"] == 1
    assert all(not product.any() for product in loaded(reader).values())


def refusal(folder: Path, error: type[Exception] = CheckpointError, **arguments) -> str:
    with pytest.raises(error) as caught:
        lora_one.convert(folder / "src", folder / "adapter.gguf", **{"to": "gguf"} | arguments)
    assert not (folder / "adapter.gguf").exists()
    return str(caught.value)


def test_layers_that_gguf_has_no_place_for_are_all_named(tmp_path):
    write(tiny("Llama", tie_word_embeddings=True), tmp_path, target_modules=["lm_head", "q_proj", "o_proj", "up_proj"])
    config = tmp_path / "base" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"num_hidden_layers": 1, "num_attention_heads": 3}))
    text = refusal(tmp_path)
    assert "lm_head: the base model's is tied to its embedding" in text
    assert "model.layers.1.mlp.up_proj: the base model has 1 blocks, counted from 0" in text
    shape = "must be (24, 24) by the base model's config.json, got (32, 24)"
    assert f"model.layers.0.self_attn.q_proj: {shape}" in text
    assert "model.layers.0.self_attn.o_proj: must be (24, 24) by the base model's config.json, got (24, 32)" in text
    assert "model.layers.0.mlp.up_proj" not in text
    text = refusal(tmp_path, rename={"model": "decoder"})
    assert "decoder.layers.0.mlp.up_proj: gguf adapters are for linear layers such as model.layers.0.mlp" in text


@pytest.mark.parametrize("name", ["Gemma", "Gemma2", "Gemma3"])
def test_gemmas_output_layer_is_its_embedding(name, tmp_path):
    write(tiny(name, tie_word_embeddings=False), tmp_path, target_modules=["lm_head"])
    assert "lm_head: the base model's is tied to its embedding, so its gguf file has no output" in refusal(tmp_path)


MORE_THAN_LORA = {
    "q_proj: DoRA, whose magnitudes llama.cpp does not have; merge it": {"use_dora": True},
    "modules_to_save=['lm_head']: layers that were trained whole": {"modules_to_save": ["lm_head"]},
    "embed_tokens: LoRA on an embedding, which gguf": {"target_modules": ["embed_tokens"]},
}


@pytest.mark.parametrize("reason", MORE_THAN_LORA)
def test_what_is_more_than_lora_is_refused(reason, tmp_path):
    write(tiny("Llama"), tmp_path, **{"target_modules": ["q_proj"]} | MORE_THAN_LORA[reason])
    assert reason in refusal(tmp_path)


def test_the_base_models_configuration_must_be_there_and_usable(tmp_path):
    write(tiny("Llama"), tmp_path, target_modules=["q_proj"])
    file = tmp_path / "base" / "config.json"
    settings = json.loads(file.read_text())
    for change, reason in (
        ({"architectures": ["GPT2LMHeadModel"]}, "must begin with one of LlamaForCausalLM, MistralForCausalLM"),
        ({"architectures": None}, "got None"),
        ({"hidden_size": 0}, '"hidden_size" must be an integer from 1 on, got 0'),
        ({"num_key_value_heads": True}, '"num_key_value_heads" must be an integer from 1 on, got True'),
        ({"head_dim": 7}, "the rows of a head must be an even number, got 7"),
    ):
        file.write_text(json.dumps(settings | change))
        assert reason in refusal(tmp_path)
    file.unlink()
    assert f"the adapter in {tmp_path / 'src'} names" in refusal(tmp_path)
    text = refusal(tmp_path, base=tmp_path / "base")
    assert "base is" in text and "no folder here that has one. Give the folder: --base FOLDER" in text
    text = refusal(tmp_path, ConfigError, base=tmp_path / "base", to="peft")
    assert "base is for to='gguf' alone" in text and "leave it out" in text


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch):
    write(tiny("Llama"), tmp_path, target_modules=["q_proj"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'lora-one[gguf]'" in refusal(tmp_path, BackendError)


def test_the_command_takes_the_base_and_overwrites_nothing(tmp_path):
    write(tiny("Qwen2"), tmp_path, target_modules=["q_proj"])
    (tmp_path / "base").rename(tmp_path / "moved")
    file = tmp_path / "adapter.gguf"
    arguments = ["convert", str(tmp_path / "src"), str(file), "--to", "gguf", "--base", str(tmp_path / "moved")]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "Adapter:" in result.output
    assert set(loaded(gguf.GGUFReader(file))) == {f"blk.{block}.attn_q.weight" for block in (0, 1)}
    before = file.read_bytes()
    with pytest.raises(CheckpointError, match="must not exist yet: gguf is one file"):
        CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert file.read_bytes() == before
