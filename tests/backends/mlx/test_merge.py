"""Merged weights against W + s B A in float64, and the warning of what they lose."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

import lora_one
from lora_one.backends.mlx.merge import RequantizeWarning
from tests.backends.mlx.models import tiny_llama, warned

MODES = [("affine", 32, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8)]


def dequantised(module):
    """The weight in float64, by MLX's own functions, expert by expert."""
    if "scales" not in module:
        return np.array(module.weight.astype(mx.float32)).astype(np.float64)
    one = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode, "dtype": mx.float32}
    scales, biases = getattr(module, "global_scale", None), module.get("biases")
    if scales is not None:
        parts = [mx.dequantize(module.weight[e], module.scales[e], global_scale=scales[e], **one) for e in range(3)]
        return np.array(mx.stack(parts)).astype(np.float64)
    if biases is not None:
        wide = mx.dequantize(module.weight, module.scales.astype(mx.float32), biases.astype(mx.float32), **one)
        return np.array(wide).astype(np.float64)
    return np.array(mx.dequantize(module.weight, module.scales, **one)).astype(np.float64)


def model_with(base, size=1e-3, experts=False):
    """A model of one LoRA layer whose adapter is `size` of its weight, and the layer's W and s B A in float64."""
    kind = LoRASwitchLinear if experts else LoRALinear
    layer = kind.from_base(base, r=4, scale=3.0)
    layer.lora_a = mx.random.normal(layer.lora_a.shape)
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    a, b = (np.array(x).astype(np.float64) for x in (layer.lora_a, layer.lora_b))
    delta = 3.0 * (b @ a if experts else b.T @ a.T)
    weight = dequantised(base)
    shrink = size * np.linalg.norm(weight) / np.linalg.norm(delta)
    layer.scale = 3.0 * float(shrink)
    model = nn.Module()
    model.layers = [layer]
    model.norm = nn.RMSNorm(64)
    return model, weight, delta * shrink


def merged_with_warnings(model, **options):
    with warned(RequantizeWarning) as messages:
        assert lora_one.merge(model, **options) is model
    return model.layers[0], messages


def lost(layer, weight, delta):
    return np.linalg.norm(dequantised(layer) - weight - delta) / np.linalg.norm(delta)


def linear(experts, bias=True):
    mx.random.seed(0)
    layer = SwitchLinear(64, 32, 3, bias=bias) if experts else nn.Linear(64, 32, bias=bias)
    if bias:
        layer.bias = mx.random.normal(layer.bias.shape)
    return layer


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_dequantised_layers_of_a_float32_model_hold_all_of_a_small_adapter(mode, group_size, bits, experts):
    base = linear(experts).to_quantized(group_size=group_size, bits=bits, mode=mode)
    model, weight, delta = model_with(base, experts=experts)
    layer, said = merged_with_warnings(model, dequantize=True)
    assert said == [] and layer.weight.dtype == mx.float32
    assert lost(layer, weight, delta) < 1e-3
    assert mx.array_equal(layer.bias, base.bias)
    assert tree_flatten(layer.trainable_parameters()) == []  # as the quantised layer was


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_dequantised_layers_have_the_models_dtype_and_what_that_loses_is_said(mode, group_size, bits, dtype):
    base = linear(False)
    base.set_dtype(dtype)
    base = base.to_quantized(group_size=group_size, bits=bits, mode=mode)
    model, weight, delta = model_with(base)
    model.norm.set_dtype(dtype)
    layer, (text,) = merged_with_warnings(model, dequantize=True)
    assert layer.weight.dtype == dtype
    share = lost(layer, weight, delta)
    assert share > 0.01
    assert f"1 layers of {str(dtype).removeprefix('mlx.core.')}" in text
    assert f"the rounding is {share:.0%} of it in layers.0" in text and "set_dtype(mx.float32)" in text
    # The remedy of the message is one.
    model, weight, delta = model_with(base)
    model.set_dtype(mx.float32)
    layer, said = merged_with_warnings(model, dequantize=True)
    assert said == [] and lost(layer, weight, delta) < 1e-3


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(("mode", "group_size", "bits"), MODES)
def test_quantising_again_says_what_is_lost(mode, group_size, bits, experts):
    base = linear(experts).to_quantized(group_size=group_size, bits=bits, mode=mode)
    model, weight, delta = model_with(base, size=0.05, experts=experts)
    layer, (text,) = merged_with_warnings(model)
    assert type(layer) is type(base) and layer.mode == mode and layer.bits == bits
    assert layer.scales.dtype == base.scales.dtype
    assert "1 quantised layers, and rounded to their grid: part of it is lost" in text
    assert f"the rounding is {lost(layer, weight, delta):.0%} of it in layers.0" in text
    assert lost(layer, weight, delta) < 2.5  # about a step of the grid


def test_experts_with_scales_of_their_own_keep_them():
    base = linear(True, bias=False)
    base.weight = base.weight * mx.array([1.0, 30.0, 900.0])[:, None, None]
    base = base.to_quantized(group_size=16, bits=4, mode="nvfp4", global_scale=True)
    assert base.global_scale.shape == (3,)
    model, weight, delta = model_with(base, experts=True)
    layer, said = merged_with_warnings(model, dequantize=True)
    assert said == [] and lost(layer, weight, delta) < 1e-3
    model, weight, delta = model_with(base, size=0.05, experts=True)
    layer, said = merged_with_warnings(model)
    assert len(said) == 1
    assert isinstance(layer, QuantizedSwitchLinear) and layer.global_scale.shape == (3,)
    assert lost(layer, weight, delta) < 2.5


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(("dtype", "size", "loses"), [
    (mx.bfloat16, 1e-3, True), (mx.float16, 1e-3, True), (mx.float16, 0.3, False), (mx.float32, 1e-3, False),
])  # fmt: skip
def test_float_weights_lose_what_their_dtype_cannot_hold_and_say_so(dtype, size, loses, experts):
    base = linear(experts)
    base.set_dtype(dtype)
    model, weight, delta = model_with(base, size=size, experts=experts)
    layer, said = merged_with_warnings(model)
    assert layer.weight.dtype == dtype
    # Rounded once, to the nearest: no number of the dtype is nearer.
    assert mx.array_equal(layer.weight, mx.array((weight + delta).astype(np.float32)).astype(dtype)) or not loses
    assert (lost(layer, weight, delta) > 0.01) == loses == bool(said)


def test_an_adapter_of_zeros_is_merged_without_a_word_and_the_random_stream_is_kept():
    model, weight, _ = model_with(linear(False))
    model.layers[0].lora_b = mx.zeros_like(model.layers[0].lora_b)
    mx.random.seed(5)
    expected = np.array(mx.random.uniform(shape=(2,)))
    mx.random.seed(5)
    layer, said = merged_with_warnings(model)
    assert said == []
    np.testing.assert_array_equal(dequantised(layer), weight)
    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(2,))), expected)


@pytest.mark.feature("Merging adopted layers")
def test_an_output_layer_that_shares_its_array_with_the_embedding_leaves_the_embedding_alone():
    model = tiny_llama()
    model.lm_head.weight = model.model.embed_tokens.weight
    before = np.array(model.model.embed_tokens.weight)
    linear_to_lora_layers(model, 0, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["lm_head"]})
    model.lm_head.lora_b = mx.ones_like(model.lm_head.lora_b)
    tokens = mx.array([[1, 2, 3]])
    expected = np.array(model(tokens))
    lora_one.merge(model)
    np.testing.assert_allclose(np.array(model(tokens)), expected, atol=1e-4)
    np.testing.assert_array_equal(np.array(model.model.embed_tokens.weight), before)
    assert np.abs(np.array(model.lm_head.weight) - before).max() > 0.1
