"""LoRA+ on MLX: lora_B's own learning rate, beside PyTorch's optimizer and two optimizers of MLX."""

from functools import partial

import mlx.core as mx
import mlx.optimizers
import numpy as np
import pytest
from mlx.optimizers import AdamW, MultiOptimizer
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import lora_one
from lora_one.errors import ConfigError
from tests.backends.loraplus import trained_by_torch
from tests.backends.mlx.models import tiny_llama, tiny_mixtral
from tests.backends.mlx.test_optimizer import adapted, in_float64, pairs_of

RATE, RATIO, STEPS = 1e-2, 4.0, 4


def schedule(step):
    return RATE / (1.0 + step)


def drawn(model, seed: int):
    rng = np.random.default_rng(seed)
    return tree_map(lambda p: mx.array(rng.standard_normal(p.shape), mx.float32), model.trainable_parameters())


def trained(model, optimizer, seeds=range(STEPS)) -> dict[str, np.ndarray]:
    """The factors after compiled steps with drawn gradients."""
    state = [model.state, optimizer.state]

    @partial(mx.compile, inputs=state, outputs=state)
    def step(gradients):
        optimizer.update(model, gradients)

    for seed in seeds:
        step(drawn(model, seed))
        mx.eval(state)
    return in_float64(model.trainable_parameters())


def is_lora_b(name: str, _) -> bool:
    return name.endswith("lora_b")


@pytest.mark.feature("LoRA+")
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
@pytest.mark.parametrize("precondition", [False, True])
def test_steps_are_those_of_pytorchs_optimizer(make, precondition):
    model = adapted(make)
    start = pairs_of(model, in_float64(model.trainable_parameters()))
    gradients = [pairs_of(model, in_float64(drawn(model, seed))) for seed in range(STEPS)]
    options = {"weight_decay": 0.1, "precondition": precondition, "reg": 1e-2, "loraplus_lr_ratio": RATIO}
    expected = trained_by_torch(start, gradients, RATE, lambda step: 1 / (1 + step), **options)
    got = pairs_of(model, trained(model, lora_one.optimizer(model, schedule, **options)))
    for name, pair in expected.items():
        for ours, theirs in zip(got[name], pair, strict=True):
            assert np.linalg.norm(ours - theirs) <= 1e-6 * np.linalg.norm(theirs), name


@pytest.mark.parametrize("rate", [RATE, schedule], ids=["number", "schedule"])
def test_steps_are_those_of_two_optimizers_of_mlx(rate):
    """MLX's own corrections of the bias have four digits."""
    model, other = adapted(), adapted()
    faster = (lambda step: RATIO * rate(step)) if callable(rate) else RATIO * rate
    adamw = partial(AdamW, weight_decay=0.1, bias_correction=True)
    both = MultiOptimizer([adamw(faster), adamw(rate)], [is_lora_b])
    both.init(other.trainable_parameters())
    before, expected = in_float64(model.trainable_parameters()), trained(other, both)
    got = trained(model, lora_one.optimizer(model, rate, 0.1, loraplus_lr_ratio=RATIO))
    for name, value in expected.items():
        moved = np.linalg.norm(value - before[name])
        assert np.linalg.norm(got[name] - value) <= 1e-4 * moved, name


def test_a_ratio_of_1_and_the_state_are_what_they_were():
    models = [adapted() for _ in range(3)]
    plain, one, faster = (
        lora_one.optimizer(model, RATE, 0.1, **options)
        for model, options in zip(models, ({}, {"loraplus_lr_ratio": 1.0}, {"loraplus_lr_ratio": RATIO}), strict=True)
    )
    names = [[name for name, _ in tree_flatten(optimizer.state)] for optimizer in (plain, one, faster)]
    assert names[0] == names[1] == names[2]
    expected, got = (trained(model, optimizer) for model, optimizer in zip(models, (plain, one), strict=False))
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_saved_and_resumed_training_is_the_same_to_the_bit(tmp_path):
    def make(model):
        return lora_one.optimizer(model, mlx.optimizers.cosine_decay(RATE, 10), loraplus_lr_ratio=RATIO)

    straight, first, second = adapted(), adapted(), adapted()
    expected = trained(straight, make(straight))
    optimizer = make(first)
    trained(first, optimizer, range(2))
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(optimizer.state)))
    second.update(first.trainable_parameters())
    optimizer = make(second)
    optimizer.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    for name, value in trained(second, optimizer, range(2, STEPS)).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.feature("Parameter groups")
def test_other_parameters_have_the_rate_of_lora_a_or_an_optimizer_of_their_own():
    """The first step of Adam moves each entry by its learning rate."""
    rates = {"lora_a": 1.0, "lora_b": RATIO, "weight": 1.0}
    for own in (None, AdamW(10 * RATE, weight_decay=0.0, bias_correction=True)):
        model = adapted()
        model.model.norm.unfreeze()
        before = in_float64(model.trainable_parameters())
        optimizer = lora_one.optimizer(model, RATE, loraplus_lr_ratio=RATIO)
        if own is not None:
            optimizer, rates["weight"] = MultiOptimizer([own, optimizer], [lambda name, _: "norm" in name]), 10.0
        optimizer.update(model, tree_map(mx.ones_like, model.trainable_parameters()))
        for name, value in in_float64(model.trainable_parameters()).items():
            moved = -RATE * rates[name.rpartition(".")[2]]
            np.testing.assert_allclose(value - before[name], moved, atol=2e-6, err_msg=name)


@pytest.mark.feature("Parameter groups", refused=True)
@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_invalid_ratios_and_options_of_pytorch_are_errors(ratio):
    model = adapted()
    with pytest.raises(ConfigError, match=f"loraplus_lr_ratio must be > 0, got {ratio}"):
        lora_one.optimizer(model, loraplus_lr_ratio=ratio)
    with pytest.raises(
        ConfigError, match=r"param_groups is for PyTorch models, got it for the mlx backend: .* by optax"
    ):
        lora_one.optimizer(model, param_groups=[])
    with pytest.raises(ConfigError, match=r"fused is for PyTorch models, got it for the mlx backend: leave it out$"):
        lora_one.optimizer(model, fused=True)
