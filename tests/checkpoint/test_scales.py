"""Scales on disk are the same for readers that know rsLoRA and for those that know only the plain rule alpha / r."""

import dataclasses
import json
import math
import re

import peft
import pytest
import torch
from safetensors.numpy import load_file

import lora_one
from lora_one import Config
from lora_one.backends.torch import attach_plain
from lora_one.checkpoint.scales import plain_alpha, plain_settings
from tests.backends.jax import models as of_jax
from tests.backends.mlx import models as of_mlx
from tests.backends.torch.models import mlp, squared_error

ASKED = [
    Config(rank=4, alpha=16.0),
    Config(rank=3, alpha=7.0),
    Config(rank=3, alpha=7.0, use_rslora=False),
]


def plain_scales(folder) -> dict[str, float]:
    """Return layer -> alpha over the rank of its own lora_A, as llama.cpp and similar readers compute it."""
    config = json.loads((folder / "adapter_config.json").read_text())
    scales = {}
    for key, a in load_file(folder / "adapter_model.safetensors").items():
        if not key.endswith(".lora_A.weight"):
            continue
        layer = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = config["lora_alpha"]
        for pattern, value in config["alpha_pattern"].items():
            alpha = value if re.fullmatch(rf"(.*\.)?({pattern})", layer) else alpha
        scales[layer] = float(alpha) / a.shape[0]
    return scales


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("writer", ["save", "trainer", "loaded again", "plain start"])
def test_torch_folders(asked, writer, tmp_path):
    """A Trainer saves with PEFT's own `save_pretrained`."""
    case = mlp()
    if writer == "plain start":
        model = attach_plain(case.model, asked)
    else:
        model, _ = lora_one.init(case.model, case.batches, squared_error, asked)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    if writer == "save":
        lora_one.save(model, tmp_path)
    else:
        model.save_pretrained(str(tmp_path))
    if writer == "loaded again":
        lora_one.load(mlp().model, tmp_path).save_pretrained(str(tmp_path))
    expected = asked.alpha / (math.sqrt(asked.rank) if asked.use_rslora else asked.rank)
    assert plain_scales(tmp_path) == pytest.approx(dict.fromkeys(["up", "shared", "down"], expected), rel=1e-14)
    x = case.batches[0][0]
    theirs = peft.PeftModel.from_pretrained(mlp().model, str(tmp_path))
    rslora = peft.LoraConfig(r=asked.rank, lora_alpha=asked.alpha, use_rslora=asked.use_rslora,
                             target_modules=["up", "shared", "down"])  # fmt: skip
    as_asked = peft.get_peft_model(mlp().model, rslora)
    peft.set_peft_model_state_dict(as_asked, peft.load_peft_weights(str(tmp_path), device="cpu"))
    assert torch.equal(theirs(x), model.eval()(x))
    torch.testing.assert_close(theirs(x), as_asked.eval()(x), rtol=1e-6, atol=1e-6)


def test_the_report_keeps_what_was_asked_and_a_second_init_may_ask_again(tmp_path):
    case = mlp()
    model, report = lora_one.init(case.model, case.batches, squared_error, ASKED[1])
    assert (report.config.alpha, report.config.use_rslora) == (7.0, True)
    assert model.peft_config["default"].use_rslora is False
    lora_one.init(model, case.batches, squared_error, ASKED[1])
    lora_one.init(model, case.batches, squared_error, Config(alpha=7.0 * math.sqrt(3), use_rslora=False))
    with pytest.raises(lora_one.errors.ModelError, match=r"use_rslora False|alpha 7.0 \(the adapter's: 12.12"):
        lora_one.init(model, case.batches, squared_error, ASKED[2])


def test_users_own_rslora_with_ranks_that_differ(tmp_path):
    """Each layer has its own effective alpha."""
    config = peft.LoraConfig(r=4, lora_alpha=12, use_rslora=True, target_modules=["up", "shared", "down"],
                             rank_pattern={"up": 2}, alpha_pattern={"down": 5})  # fmt: skip
    case = mlp()
    model, _ = lora_one.init(peft.get_peft_model(case.model, config), case.batches, squared_error,
                             Config(rank=4, alpha=12.0, passes=2))  # fmt: skip
    assert model.peft_config["default"].use_rslora  # a user's own settings stay as they are
    lora_one.save(model, tmp_path)
    expected = {"up": 12 / math.sqrt(2), "shared": 12 / 2, "down": 5 / 2}
    assert plain_scales(tmp_path) == pytest.approx(expected, rel=1e-14)
    theirs = peft.PeftModel.from_pretrained(mlp().model, str(tmp_path))
    torch.testing.assert_close(theirs(case.batches[0][0]), model.eval()(case.batches[0][0]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "jax", "mlx"])
@pytest.mark.parametrize("asked", ASKED[1:])
def test_folders_of_every_backend_and_all_that_they_are_converted_to(asked, backend, tmp_path):
    if backend == "torch":
        model, batches, loss_fn = mlp().model, mlp().batches, squared_error
    elif backend == "jax":
        model, batches, loss_fn = of_jax.mlp(), of_jax.regression(), of_jax.squared_error
    else:
        model, batches, loss_fn = of_mlx.tiny_llama(layers=1), of_mlx.token_batches(), None
    model, _ = lora_one.init(model, batches, loss_fn, dataclasses.replace(asked, passes=2, oversample=0))
    lora_one.save(model, tmp_path / "saved")
    expected = pytest.approx(asked.alpha / (math.sqrt(asked.rank) if asked.use_rslora else asked.rank), rel=1e-6)
    assert all(scale == expected for scale in plain_scales(tmp_path / "saved").values())
    for to in ("peft", "flax", "mlx"):
        lora_one.convert(tmp_path / "saved", tmp_path / to, to=to)
        assert all(scale == expected for scale in plain_scales(tmp_path / to).values())
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == expected


def test_an_alpha_is_an_integer_where_it_is_one():
    assert plain_alpha(16 / 2, 4) == 32 and isinstance(plain_alpha(16 / 2, 4), int)
    assert plain_alpha(16 / 49, 49) == 16 and isinstance(plain_alpha(16 / 49, 49), int)  # 15.999999999999998
    assert plain_alpha(16 / math.sqrt(8), 8) == pytest.approx(16 * math.sqrt(8), rel=1e-15)
    assert plain_alpha(1e-14, 1) == 1e-14


def test_the_most_common_rank_and_alpha_are_the_folders_and_the_rest_are_patterns():
    layers = {"a.up": (4, 8.0), "b.up": (4, 8.0), "up": (2, 3.0)}
    assert plain_settings(layers) == {
        "r": 4,
        "lora_alpha": 32,
        "use_rslora": False,
        "rank_pattern": {"^up": 2},
        "alpha_pattern": {"^up": 6},
    }
