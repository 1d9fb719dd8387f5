"""A start of the first gradients on models of mlx-lm, in mlx-lm's own training loop."""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train
from mlx_lm.tuner.utils import linear_to_lora_layers

import lora_one
from lora_one.backends.mlx import attach_plain
from lora_one.backends.waiting import report_of
from lora_one.core.omega import draw_omega
from tests.backends.mlx.models import (
    contents,
    flat_factors,
    modules_of,
    quantize,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)

CONFIG = lora_one.Config(rank=4)


def lora_by_mlx_lm():
    model = tiny_llama()
    model.freeze()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 8.0, "dropout": 0.0})
    return model


BASES = {
    "dense": tiny_llama,
    "4-bit": lambda: quantize(tiny_llama(), "affine", 32, 4),
    "experts": tiny_mixtral,
    "mlx-lm": lora_by_mlx_lm,
}
MODELS = {
    **{kind: lambda make=make: lora_one.init(make(), config=CONFIG)[0] for kind, make in BASES.items()},
    "mlx-lm's start": lora_by_mlx_lm,
    "attach_plain": lambda: attach_plain(tiny_llama(), CONFIG),
}


@pytest.mark.parametrize("kind", BASES)
def test_init_without_batches_gives_plain_lora(kind):
    base = BASES[kind]()
    before, modes, key = contents(base), base.training, np.array(mx.random.state[0])
    model, report = lora_one.init(base, config=CONFIG)
    assert model is base and model.training == modes
    np.testing.assert_array_equal(np.array(mx.random.state[0]), key)
    modules, after = modules_of(model), contents(model)
    for name, value in before.items():
        if "lora_" not in name:
            path, _, leaf = name.rpartition(".")
            same = name if name in after else f"{path}.linear.{leaf}"
            np.testing.assert_array_equal(after[same], value, err_msg=name)
    for layer in report.layers:
        path, _, expert = layer.name.partition("[")
        a, b = (np.array(modules[path][name]) for name in ("lora_a", "lora_b"))
        a = a[int(expert[:-1])] if expert else a.T
        omega = draw_omega(0, layer.name, layer.in_features, layer.rank)
        np.testing.assert_allclose(a, omega[:, :4].T / np.sqrt(3.0 * layer.in_features), rtol=1e-6)
        assert not b.any()
    assert len(report.layers) == (2 * (4 + 1 + 3 * 4) if kind == "experts" else 14)
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == flat_factors(model).keys()


@pytest.mark.feature("Gradient accumulation")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_mlx_lm_train_equals_a_plain_loop(kind, accumulate, tmp_path, monkeypatch):
    trained, reference = MODELS[kind](), MODELS[kind]()
    monkeypatch.setattr(type(trained.layers[0]), "__call__", type(trained.layers[0]).__call__)  # patched by train
    batches = token_batches(count=5 * accumulate)

    def make(model):
        return lora_one.optimizer(model, mlx.optimizers.cosine_decay(3e-3, 8), start_steps=3)

    optimizer, of_reference = make(trained), make(reference)
    arguments = TrainingArgs(
        batch_size=3,
        iters=len(batches),
        grad_accumulation_steps=accumulate,
        grad_checkpoint=accumulate > 1,
        steps_per_report=100,
        steps_per_save=100,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )
    train(trained, optimizer, batches, args=arguments, iterate_batches=lambda dataset, **_: iter(dataset))
    loss_and_gradient = nn.value_and_grad(reference, lambda model, batch: default_loss(model, *batch)[0])
    reference.train()
    for first in range(0, len(batches), accumulate):
        gradients = [loss_and_gradient(reference, batch)[1] for batch in batches[first : first + accumulate]]
        of_reference.update(reference, tree_map(lambda *xs: sum(xs) / accumulate, *gradients))
        mx.eval(reference.parameters(), of_reference.state)
    report = report_of(trained)
    assert "started from the gradients of the first 3 steps" in report.summary()
    assert all(layer.start == "spectral" for layer in report.layers)
    assert optimizer.step.item() == 5
    modules = modules_of(reference)
    for path, module in modules_of(trained).items():
        if "lora_a" in module:
            for name in ("lora_a", "lora_b"):
                got, expected = np.array(module[name]), np.array(modules[path][name])
                assert np.abs(got - expected).max() < 1e-3 * np.abs(expected).max(), (path, name)


def test_bfloat16_factors_stay_bfloat16_and_start_alike():
    starts = []
    for dtype in (mx.float32, mx.bfloat16):
        model = lora_one.init(tiny_llama(), config=CONFIG)[0]
        for module in modules_of(model).values():
            if "lora_a" in module:
                module.lora_a, module.lora_b = module.lora_a.astype(dtype), module.lora_b.astype(dtype)
        optimizer = lora_one.optimizer(model, start_steps=2)
        loss_and_gradient = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])
        for _ in range(2):
            optimizer.update(model, loss_and_gradient(model, token_batches()[0])[1])
        assert {x.dtype for x in flat_factors(model).values()} == {dtype}
        assert {x.dtype for x in optimizer.progress["s"]} == {mx.float32}
        starts.append({name: np.array(x.astype(mx.float32)) for name, x in flat_factors(model).items()})
    for name, wide in starts[0].items():
        assert np.linalg.norm(starts[1][name] - wide) < 0.1 * np.linalg.norm(wide), name
