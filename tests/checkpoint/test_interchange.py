"""An adapter trained in one framework gives the same logits in any other, in PEFT and in mlx-lm."""

import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import lora_one
from lora_one import demo
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode
from lora_one.finetune.recipe import make_recipe
from lora_one.finetune.tuners.loading import load_tuner
from tests.frameworks import MODELS, logits, opened_by_lora_one, opened_by_peft

TOKENS = np.random.default_rng(0).integers(4, 100, (2, 24))
TOLERANCE = 1e-4  # absolute, on logits of size 10: float32 in libraries that sum in different orders
CONFIG = lora_one.Config(rank=4, passes=2, targets=["q_proj", "k_proj", "v_proj", "down_proj"])
WIDTH = 16  # most tokens of a sequence: one shape, compiled once
ROPE_THETA = 5000.0


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """The embedded Llama, and a random Qwen2: grouped queries, biases on q, k and v, the embedded tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, tie_word_embeddings=True, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    folder = tmp_path_factory.mktemp("qwen2")
    for file in demo.MODEL.glob("tokenizer*"):
        shutil.copy(file, folder)
    model.save_pretrained(folder)
    return {"embedded": demo.MODEL, "qwen2": folder}


@pytest.fixture(scope="module")
def adapters(bases, tmp_path_factory):
    """Return a function (family, backend) -> the folder of an adapter after ten steps there, and its logits there."""
    trained = {}

    def train(family: str, backend: str):
        if (family, backend) not in trained:
            tuner = load_tuner(backend).open_tuner(bases[family], "float32", "cpu")
            sequences = [encode(tuner.tokenizer, example) for example in read_examples(demo.TRAIN)[:200]]
            sequences = [sequence for sequence in sequences if len(sequence.tokens) <= WIDTH][:32]
            tuner.model, _ = lora_one.init(tuner.model, tuner.batches(sequences[:8], 8), tuner.loss_fn, CONFIG)
            start, out = logits(tuner.model, TOKENS), tmp_path_factory.mktemp(f"{family}-{backend}")
            recipe = make_recipe({"steps": 10, "batch_size": 8, "warmup": 1, "learning_rate": 1e-2, "out": str(out)})
            tuner.train(sequences, recipe, lambda step, loss: None)
            lora_one.save(tuner.model, out)
            trained[family, backend] = out, logits(tuner.model, TOKENS)
            assert np.abs(trained[family, backend][1] - start).max() > 0.1  # the adapter is more than its start
        return trained[family, backend]

    return train


@pytest.mark.parametrize("there", MODELS)
@pytest.mark.parametrize("here", MODELS)
@pytest.mark.parametrize("family", ["embedded", "qwen2"])
def test_an_adapter_of_any_framework_opens_in_any_other(family, here, there, bases, adapters):
    folder, expected = adapters(family, here)
    np.testing.assert_allclose(
        logits(opened_by_lora_one(there, bases[family], folder), TOKENS), expected, atol=TOLERANCE, rtol=0
    )


@pytest.mark.feature("mlx-lm opens the folder", "jax")
@pytest.mark.parametrize("here", MODELS)
@pytest.mark.parametrize("family", ["embedded", "qwen2"])
def test_peft_and_mlx_lm_themselves_open_the_same_folder(family, here, bases, adapters, tmp_path):
    """MLX saves both layouts; the others save PEFT's, and `convert` adds mlx-lm's."""
    folder, expected = adapters(family, here)
    np.testing.assert_allclose(logits(opened_by_peft(bases[family], folder), TOKENS), expected, atol=TOLERANCE, rtol=0)
    if here != "mlx":
        lora_one.convert(folder, tmp_path / "both", to="mlx")
        folder = tmp_path / "both"
        in_peft = opened_by_peft(bases[family], folder)
        np.testing.assert_allclose(logits(in_peft, TOKENS), expected, atol=TOLERANCE, rtol=0)
    # mlx-lm reads rope_theta where transformers 5 writes rope_parameters: see docs/guide/mlx.md
    settings = {"rope_theta": ROPE_THETA} if family == "qwen2" else {}
    model, _ = mlx_lm.load(str(bases[family]), adapter_path=str(folder), model_config=settings)
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(logits(model, TOKENS), expected, atol=TOLERANCE, rtol=0)
