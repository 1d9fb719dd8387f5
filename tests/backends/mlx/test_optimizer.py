"""lora_one.optimizer on MLX: the spec's numbers, and mlx-lm's own training loop."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.trainer import TrainingArgs, default_loss, train

import lora_one
from lora_one.backends.mlx import LoraOneAdamW, MlxOps
from lora_one.backends.numpy import ops as numpy_ops
from lora_one.core import step
from lora_one.core.factors import Factors
from tests.backends.mlx.models import modules_of, tiny_llama, tiny_mixtral, token_batches

# Without the routers: their lora_B is 4 x 4, so ill-conditioned that float32 itself is 1e-3 off after a few steps.
START = lora_one.Config(rank=4, gradient="exact", targets=r".*_proj")


def adapted(make=tiny_llama):
    return lora_one.init(make(), token_batches(), config=START)[0]


def in_float64(tree) -> dict[str, np.ndarray]:
    return {name: np.array(x.astype(mx.float32)).astype(np.float64) for name, x in tree_flatten(tree)}


def pairs_of(model, arrays) -> dict[tuple[str, int | None], Factors]:
    """Every pair in PEFT's layout, from arrays under mlx-lm's names."""
    pairs = {}
    for path, module in modules_of(model).items():
        a, b = arrays.get(f"{path}.lora_a"), arrays.get(f"{path}.lora_b")
        if isinstance(module, LoRALinear):
            pairs[path, None] = Factors(a.T, b.T)
        elif isinstance(module, LoRASwitchLinear):
            pairs.update({(path, e): Factors(a[e], b[e]) for e in range(len(a))})
    return pairs


@pytest.mark.feature("Preconditioned steps")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize(
    "options",
    [
        {"precondition": False},
        {"precondition": True},
        {"precondition": True, "reg": 1e-3, "damping": "relative", "weight_decay": 0.1, "betas": (0.8, 0.95)},
    ],
    ids=["plain", "preconditioned", "relative"],
)
def test_equals_the_specification_in_float64(make, options):
    model = adapted(make)
    optimizer = lora_one.optimizer(model, 1e-3, **options)
    assert isinstance(optimizer, mlx.optimizers.Optimizer)
    spec = pairs_of(model, in_float64(model.trainable_parameters()))
    states = {key: step.start_pair(numpy_ops, pair) for key, pair in spec.items()}
    rng = np.random.default_rng(0)
    settings = {key: value for key, value in options.items() if key != "precondition"}
    settings["reg"] = settings.get("reg", 1e-6) if options["precondition"] else None
    for _ in range(10):
        gradients = tree_map(lambda p: mx.array(rng.standard_normal(p.shape), mx.float32), model.trainable_parameters())
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        given = pairs_of(model, in_float64(gradients))
        for key in spec:
            spec[key], states[key] = step.adamw(numpy_ops, spec[key], given[key], states[key], 1e-3, **settings)
    got = pairs_of(model, in_float64(model.trainable_parameters()))
    for key, pair in spec.items():
        for ours, expected in zip(got[key], pair, strict=True):
            assert np.linalg.norm(ours - expected) <= 1e-6 * np.linalg.norm(expected), key


def test_narrow_factors_have_float32_moments_and_stay_narrow():
    model = adapted()
    wide = lora_one.optimizer(model, 1e-2, precondition=True)
    gradients = tree_map(mx.ones_like, model.trainable_parameters())
    narrow = adapted()
    for module in modules_of(narrow).values():
        if isinstance(module, LoRALinear):
            module.lora_a, module.lora_b = module.lora_a.astype(mx.bfloat16), module.lora_b.astype(mx.bfloat16)
    optimizer = lora_one.optimizer(narrow, 1e-2, precondition=True)
    optimizer.update(narrow, tree_map(lambda g: g.astype(mx.bfloat16), gradients))
    wide.update(model, gradients)
    moments = optimizer.state["model"]["layers"][0]["mlp"]["up_proj"]["lora_a"]
    assert moments["m"].dtype == moments["v"].dtype == mx.float32
    layer, reference = (m.layers[0].mlp.up_proj for m in (narrow, model))
    assert layer.lora_a.dtype == mx.bfloat16
    np.testing.assert_allclose(
        np.array(layer.lora_a.astype(mx.float32)), np.array(reference.lora_a), atol=1e-2 * 2**-7 + 0.003
    )


def test_one_batched_solve_a_step(monkeypatch):
    calls = []
    solve = MlxOps.cholesky_solve
    monkeypatch.setattr(
        MlxOps, "cholesky_solve", lambda self, gram, rhs: calls.append(gram.shape) or solve(self, gram, rhs)
    )
    model = adapted(tiny_mixtral)
    optimizer = lora_one.optimizer(model, precondition=True)
    calls.clear()
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    attention, experts = 2 * 4, 2 * 3 * 4
    assert calls == [(2 * (attention + experts), 4, 4)]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_bias_corrections_are_computed_once_a_step(dtype, monkeypatch):
    """Once per step and not per parameter: mx.compile would put them into the loop of each parameter."""
    calls = []
    corrections = LoraOneAdamW._bias_corrections
    monkeypatch.setattr(
        LoraOneAdamW, "_bias_corrections", lambda self, steps: calls.append(steps.dtype) or corrections(self, steps)
    )
    parameters = {name: mx.ones((3, 2), dtype) for name in "abc"}
    optimizer = LoraOneAdamW(1e-2)
    optimizer.init(parameters)
    for _ in range(2):
        parameters = optimizer.apply_gradients(parameters, parameters)
    assert calls == [mx.float32] * 2


def by_hand(model, optimizer, batches, accumulate=1):
    """A training step of mlx-lm's train, without compilation."""
    loss_and_gradient = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])
    model.train()
    for first in range(0, len(batches), accumulate):
        total = None
        for batch in batches[first : first + accumulate]:
            _, gradients = loss_and_gradient(model, batch)
            total = gradients if total is None else tree_map(lambda x, y: x + y, gradients, total)
        optimizer.update(model, tree_map(lambda x: x / accumulate, total))
        mx.eval(model.parameters(), optimizer.state)


@pytest.mark.feature("Gradient accumulation")
@pytest.mark.feature("Learning-rate schedules")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("precondition", [False, True])
def test_mlx_lm_train_compiled_accumulating_checkpointed_with_a_schedule(make, precondition, tmp_path, monkeypatch):
    batches = token_batches(count=8)
    schedule = mlx.optimizers.cosine_decay(3e-3, 4)
    trained, reference = adapted(make), adapted(make)
    monkeypatch.setattr(type(trained.layers[0]), "__call__", type(trained.layers[0]).__call__)  # patched by train
    by_hand(reference, lora_one.optimizer(reference, schedule, 0.1, precondition=precondition), batches, accumulate=2)
    args = TrainingArgs(
        batch_size=3,
        iters=8,
        grad_accumulation_steps=2,
        grad_checkpoint=True,
        steps_per_report=8,
        steps_per_save=100,
        adapter_file=str(tmp_path / "adapters.safetensors"),
    )
    optimizer = lora_one.optimizer(trained, schedule, 0.1, precondition=precondition)
    train(trained, optimizer, batches, args=args, iterate_batches=lambda dataset, **_: iter(dataset))
    assert optimizer.step.item() == 4
    expected, start = in_float64(reference.trainable_parameters()), in_float64(adapted(make).trainable_parameters())
    for name, got in in_float64(trained.trainable_parameters()).items():
        moved = np.abs(expected[name] - start[name]).max()
        assert moved > 1e-4
        assert np.abs(got - expected[name]).max() < 1e-6 + 1e-3 * moved, name


@pytest.mark.feature("Resume")
@pytest.mark.parametrize("precondition", [False, True])
def test_saved_and_resumed_training_is_the_same_to_the_bit(precondition, tmp_path):
    batches = token_batches(count=6)

    def run(model, optimizer, batches):
        state = [model.state, optimizer.state]
        loss_and_gradient = nn.value_and_grad(model, lambda model, batch: default_loss(model, *batch)[0])

        @partial(mx.compile, inputs=state, outputs=state)
        def train_step(batch):
            loss, gradients = loss_and_gradient(model, batch)
            optimizer.update(model, gradients)
            return loss

        for batch in batches:
            mx.eval(train_step(batch), state)

    def make(model):
        return lora_one.optimizer(model, mlx.optimizers.linear_schedule(1e-3, 1e-4, 10), precondition=precondition)

    straight = adapted()
    run(straight, make(straight), batches)

    first = adapted()
    optimizer = make(first)
    run(first, optimizer, batches[:3])
    mx.save_safetensors(str(tmp_path / "optimizer.safetensors"), dict(tree_flatten(optimizer.state)))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(first.trainable_parameters())))

    second = adapted()
    second.load_weights(str(tmp_path / "model.safetensors"), strict=False)
    optimizer = make(second)
    optimizer.state = tree_unflatten(list(mx.load(str(tmp_path / "optimizer.safetensors")).items()))
    run(second, optimizer, batches[3:])
    assert optimizer.step.item() == 6
    for (name, got), (_, expected) in zip(
        tree_flatten(second.trainable_parameters()), tree_flatten(straight.trainable_parameters()), strict=True
    ):
        assert mx.array_equal(got, expected), name


def test_parameters_besides_lora_follow_plain_adamw():
    model = adapted()
    model.model.norm.unfreeze()
    optimizer = lora_one.optimizer(model, 1e-2, precondition=True)
    optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
    np.testing.assert_allclose(np.array(model.model.norm.weight), 1.0 - 1e-2, rtol=1e-6)  # a first step is lr * sign


def test_misuse_is_an_error():
    model = adapted()
    with pytest.raises(lora_one.errors.ConfigError, match="reg must be >= 0"):
        lora_one.optimizer(model, reg=-1.0)
    with pytest.raises(lora_one.errors.ConfigError, match="damping must be"):
        lora_one.optimizer(model, damping="none")
    with pytest.raises(lora_one.errors.ModelError, match="needs trainable LoRA layers of mlx-lm, got none"):
        lora_one.optimizer(tiny_llama(), precondition=True)
    model.freeze()
    with pytest.raises(lora_one.errors.ModelError, match="trainable parameters, got none"):
        lora_one.optimizer(model)
    assert LoraOneAdamW(1e-3).bias_correction
