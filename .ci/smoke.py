"""A smoke test of an installed lora-one and of the frameworks beside it, from an empty folder: `python -I smoke.py`."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import numpy as np
from safetensors.numpy import save_file

import lora_one
from lora_one import conformance, demo

here = pathlib.Path.cwd()
assert not any(here.iterdir()), f"{here} must be empty"
assert "site-packages" in lora_one.__file__, lora_one.__file__  # the installed one, not a checkout
print(f"lora-one {lora_one.__version__}, Python {sys.version.split()[0]}")

assert conformance.check_installed("numpy").passed
assert demo.token_batches().shape == (38, 32, 32)

# An adapter of PEFT's layout, converted and inspected without any framework.
adapter = here / "adapter"
adapter.mkdir()
name = "base_model.model.model.layers.0.self_attn.q_proj"
rng = np.random.default_rng(0)
shapes = {f"{name}.lora_A.weight": (4, 16), f"{name}.lora_B.weight": (8, 4)}
factors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
save_file(factors, adapter / "adapter_model.safetensors")
settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
(adapter / "adapter_config.json").write_text(json.dumps(settings))
lora_one.convert(adapter, here / "mlx", to="mlx")
assert json.loads((here / "mlx" / "adapter_config.json").read_text())["lora_parameters"]["scale"] == 2.0
print("conformance, convert: right")

if importlib.util.find_spec("typer"):
    run = [sys.executable, "-I", "-m", "lora_one"]
    listed = json.loads(subprocess.check_output([*run, "inspect", "adapter", "--json"], text=True))
    product = 2.0 * factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"]
    [layer] = listed["layers"]
    assert np.isclose(layer["norm"], np.linalg.norm(product), rtol=1e-5), layer
    assert "finetune" in subprocess.check_output([*run, "--help"], text=True)
    print("command: right")

if importlib.util.find_spec("torch") and importlib.util.find_spec("peft"):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    batches = [{"input_ids": x, "labels": x} for x in torch.tensor(demo.token_batches())[:2]]
    model, report = lora_one.init(model, batches)
    assert len(report.layers) == 28 and min(layer.energy for layer in report.layers) > 0.7
    print(f"torch {torch.__version__}: right")
if importlib.util.find_spec("flax"):
    import jax
    import optax

    from lora_one.backends.jax import load_llama

    def loss_fn(model, tokens):
        return optax.softmax_cross_entropy_with_integer_labels(model(tokens)[:, :-1], tokens[:, 1:]).mean()

    model, report = lora_one.init(load_llama(demo.MODEL), demo.token_batches()[:2], loss_fn)
    assert len(report.layers) == 28
    print(f"jax {jax.__version__}: right")
if importlib.util.find_spec("mlx_lm"):
    import mlx.core as mx

    from lora_one.backends.mlx import load_pretrained

    model, _ = load_pretrained(demo.MODEL)
    rows = mx.array(demo.token_batches()[0])
    model, report = lora_one.init(model, [(rows, mx.array([[0, 32]] * 32))])
    assert len(report.layers) == 28
    print(f"mlx {mx.__version__}: right")
