import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from lora_one import demo
from lora_one.backends.torch.passes.batches import default_loss
from lora_one.cli.commands import app
from lora_one.config import Config
from lora_one.errors import ConfigError, ModelError
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode, encode_prompt
from lora_one.finetune.tuners.loading import load_tuner


@pytest.fixture(scope="module")
def tuner():
    return load_tuner("jax").open_tuner(demo.MODEL, "float32", None)


def test_batches_have_the_torch_backends_loss(tuner):
    examples = read_examples(demo.TRAIN)[:6]
    sequences = [encode(tuner.tokenizer, example) for example in examples]
    reference = load_tuner("torch").open_tuner(demo.MODEL, "float32", None)
    for ours, theirs in zip(tuner.batches(sequences, 4), reference.batches(sequences, 4), strict=True):
        assert ours["input_ids"].shape[1] % 16 == 0
        with torch.no_grad():
            expected = float(default_loss(reference.model.eval(), theirs))
        assert float(tuner.loss_fn(tuner.model, ours)) == pytest.approx(expected, abs=1e-5)


def test_generation_is_transformers_greedy_one(tuner):
    prompts = [encode_prompt(tuner.tokenizer, example) for example in read_examples(demo.TEST)[:5]]
    reference = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32").eval()
    end = tuner.tokenizer.eos_token_id
    for prompt, got in zip(prompts, tuner.generate(prompts, 6), strict=True):
        with torch.no_grad():
            row = reference.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, len(prompt) :]
        row = row.tolist()
        assert got == (row[: row.index(end)] if end in row else row)


def test_the_command_learns_the_demo_task(tmp_path):
    """`lora-one finetune --backend jax`: few steps, and the folder is one that torch's PEFT would open."""
    arguments = ["finetune", "--backend", "jax", "--steps", "12", "--rank", "4", "--init-batches", "2", "--passes", "2"]
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:128]) + "\n")
    arguments += ["--model", str(demo.MODEL), "--data", str(train), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--precondition"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "lora_one.json").exists()


def test_the_plain_start_is_zero_and_seeded(tuner):
    module = load_tuner("jax")
    from lora_one.backends.jax import attach_plain

    config = Config(rank=4, targets=["q_proj"], seed=3)
    one, two = (attach_plain(module.open_tuner(demo.MODEL, "float32", None).model, config) for _ in range(2))
    layer = one.model.layers[0].self_attn.q_proj
    assert not np.asarray(layer.kernel_lora_b[...]).any()
    a = np.asarray(layer.kernel_lora_a[...])
    np.testing.assert_array_equal(a, two.model.layers[0].self_attn.q_proj.kernel_lora_a[...])
    assert a.std() == pytest.approx(1 / np.sqrt(3 * 128), rel=0.15)
    assert layer.kernel_lora_a.dtype == jnp.float32


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(ModelError, match="must hold a causal language model and its tokenizer"):
        load_tuner("jax").open_tuner(tmp_path, "float32", None)
    with pytest.raises(ConfigError, match=r"device must be one that JAX has \(cpu\), got 'tpu'"):
        load_tuner("jax").open_tuner(demo.MODEL, "float32", "tpu")
