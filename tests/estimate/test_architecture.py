"""Parameter counts against those of transformers and PEFT on the meta device."""

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers

from lora_one.errors import ConfigError
from lora_one.estimate.architecture import lora_parameters, target_linears
from lora_one.estimate.reader import architecture_of, read_architecture

from .models import SMALL, linear_names, shape_of, small

CONFIGS = sorted((Path(__file__).parent / "configs").glob("*.json"))
LLAMA_2_7B = json.loads((Path(__file__).parent / "configs" / "llama-2-7b.json").read_text())


def built(config):
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_parameters_are_those_of_the_model(file):
    model = built(transformers.AutoConfig.for_model(**json.loads(file.read_text())))
    assert read_architecture(file).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_parameters_and_lora_pairs_of_small_models_of_each_kind(kind):
    config = small(kind)
    shape, model = shape_of(config), built(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=linear_names(model)))
    trainable = sum(p.numel() for n, p in adapted.named_parameters() if "lora_" in n)
    assert lora_parameters(target_linears(shape), 4) == trainable


def test_sparse_and_dense_blocks_side_by_side():
    config = transformers.Qwen2MoeConfig(
        num_hidden_layers=5, mlp_only_layers=[1], decoder_sparse_step=2, hidden_size=64, num_experts=4
    )
    assert shape_of(config).parameters == sum(p.numel() for p in built(config).parameters())


def test_a_layer_norm_of_the_heads():
    config = transformers.PhiConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, qk_layernorm=True)
    assert shape_of(config).parameters == sum(p.numel() for p in built(config).parameters())


def test_targets_by_name_are_one_pair_an_expert():
    file = Path(__file__).parent / "configs" / "mixtral-8x7b.json"
    targets = target_linears(read_architecture(file), ("q_proj", "experts"))
    pairs = 8 * (4096 + 28672) + 8 * (14336 + 4096) + (4096 + 4096)
    assert lora_parameters(targets, 2) == 32 * 2 * pairs


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "mamba"}, r"model_type must be one of llama, .*, got 'mamba'"),
        ({"model_type": ["llama"]}, r"model_type must be one of llama, .*, got \['llama'\]"),
        (
            {"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", "hidden_size": 2560}},
            r"nor can its text_config be estimated alone: config.json of a gemma3_text must give intermediate_size",
        ),
        (
            {"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2_vl_text"}},
            r"nor can its text_config be estimated alone: model_type must be one of .*, got 'qwen2_vl_text'",
        ),
        ({"hidden_size": None, "vocab_size": "many"}, r"must give hidden_size, vocab_size .* missing, vocab_size many"),
        ({"model_type": "qwen2", "num_key_value_heads": None}, r"num_key_value_heads as integers; got .* missing"),
        ({"model_type": "qwen2_moe"}, r"must give num_experts, moe_intermediate_size, num_experts_per_tok, shared_exp"),
    ],
)
def test_what_is_missing_is_named(change, match):
    with pytest.raises(ConfigError, match=match):
        architecture_of({**LLAMA_2_7B, **change})


@pytest.mark.parametrize("key", ["text_config", "llm_config"])
def test_a_language_model_that_is_recommended_can_be_estimated(key, tmp_path):
    with pytest.raises(ConfigError) as caught:
        architecture_of({"model_type": "llava", key: LLAMA_2_7B, "vision_config": {}})
    text = str(caught.value)
    assert f"its {key} (llama) can be estimated alone: write it to a file and give that, --model {key}.json" in text
    (tmp_path / f"{key}.json").write_text(json.dumps(LLAMA_2_7B))
    assert read_architecture(tmp_path / f"{key}.json").parameters == architecture_of(LLAMA_2_7B).parameters


def test_a_config_that_is_no_object_and_one_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match=r"must be a model's config.json, an object, got list"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA_2_7B).encode())
    assert read_architecture(tmp_path).parameters == architecture_of(LLAMA_2_7B).parameters


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json must be a model's config\.json"):
        read_architecture(tmp_path)


def test_a_target_that_is_not_there():
    with pytest.raises(ConfigError, match=r"must be among down_proj, .*, got lm_head"):
        target_linears(architecture_of(LLAMA_2_7B), ("lm_head",))
