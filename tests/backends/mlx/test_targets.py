"""The layers that get LoRA, the warning of the others, and the mode that the passes run in."""

import warnings

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import afm7, deepseek_v3, qwen3_next
from mlx_lm.models.bitlinear_layers import BitLinear
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tuner.lora import LoRALinear

import lora_one
from lora_one.backends.mlx import attach_plain
from lora_one.errors import GradientError, ModelError, TargetsWarning
from tests.backends.mlx.models import (
    VOCABULARY,
    assert_lora_one_start,
    contents,
    mean_gradients,
    modules_of,
    quantize,
    tiny_llama,
    tiny_mixtral,
    token_batches,
    warned,
)

EXACT = lora_one.Config(rank=2, gradient="exact")
SKETCH = lora_one.Config(rank=2, oversample=4, passes=2)


def tiny_afm():
    mx.random.seed(0)
    return afm7.Model(afm7.ModelArgs("afm7", VOCABULARY, 64, 2, 1, 4, 2, hidden_dim_scale_factor=1.0))


def tiny_deepseek():
    """Multi-head latent attention, with two stacks of matrices per layer that are no linear layers, and a router."""
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16}
    dims = {"qk_rope_head_dim": 8, "v_head_dim": 8, "qk_nope_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
    groups = {"n_group": 1, "topk_group": 1}
    return deepseek_v3.Model(
        deepseek_v3.ModelArgs(vocab_size=VOCABULARY, **sizes, **heads, **dims, **experts, **groups)
    )


def tiny_qwen3_next():
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": VOCABULARY}
    attention = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "partial_rotary_factor": 0.25}
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 1, "linear_key_head_dim": 32}
    linear |= {"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "full_attention_interval": 2}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    experts |= {"shared_expert_intermediate_size": 16, "moe_intermediate_size": 16}
    rest = {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 64}
    return qwen3_next.Model(qwen3_next.ModelArgs("qwen3_next", **sizes, **attention, **linear, **experts, **rest))


def init_warned(model, **arguments):
    """The result of init, and the messages of its TargetsWarnings."""
    with warned(TargetsWarning) as messages:
        model, report = lora_one.init(model, **{"batches": token_batches(count=1), "config": SKETCH, **arguments})
    return model, report, messages


@pytest.mark.parametrize("make", [tiny_llama, lambda: quantize(tiny_mixtral(), "affine", 32, 4), tiny_qwen3_next])
def test_models_whose_matrices_are_all_linear_layers_give_no_warning(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_one.errors.ZeroGradientWarning)
        warnings.simplefilter("error", TargetsWarning)
        lora_one.init(make(), token_batches(count=1), config=SKETCH)


def test_all_linear_names_what_is_no_linear_layer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_one.errors.ZeroGradientWarning)
        _, report, said = init_warned(tiny_deepseek())
    (text,) = said
    for name in (
        "model.layers.0.self_attn.embed_q (MultiLinear; 1 more like it)",
        "model.layers.0.self_attn.unembed_out (MultiLinear; 1 more like it)",
        "model.layers.1.mlp.gate (MoEGate)",
    ):
        assert name in text
    assert "leaves 5 weights without LoRA" in text
    assert "model.layers.0.self_attn.q_a_proj" in {layer.name for layer in report.layers}


class Own(nn.Module):
    """A user's own model with bare parameters, a convolution, packed weights, and linear layers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.layers = [nn.Linear(16, 16)]
        self.mix = mx.random.normal((16, 16))
        self.each = [mx.random.normal((16, 16)), mx.ones((16,))]
        self.conv = nn.Conv1d(16, 16, 1)
        self.depthwise = nn.Conv1d(16, 16, 3, groups=16)
        self.projector = nn.Linear(16, 16)
        self.packed = BitLinear(16, 16)
        self.head = nn.Linear(16, VOCABULARY)

    def __call__(self, x):
        h = self.conv(self.projector(self.embed(x)) @ self.mix @ self.each[0])
        return self.head(self.layers[0](h) * self.each[1])


def test_all_linear_names_bare_parameters_convolutions_and_what_is_outside_the_layers():
    mx.random.seed(0)
    _, _, (text,) = init_warned(Own())
    for name in (
        "mix (a parameter of shape (16, 16))",
        "each.0 (a parameter of shape (16, 16))",
        "conv (Conv1d)",
        "projector (Linear outside model.layers)",
        "packed (BitLinear)",
    ):
        assert name in text
    assert "leaves 5 weights" in text  # the embedding and the head are meant to be left out
    assert init_warned(Own(), config=lora_one.Config(rank=2, gradient="exact", targets=["projector"]))[2] == []


@pytest.mark.parametrize("quantised", [False, True])
def test_a_subclass_of_linear_that_is_none_is_left_out_or_refused(quantised):
    model = tiny_afm()
    if quantised:
        attention = model.layers[0].self_attn
        attention.qkv_proj = attention.qkv_proj.to_quantized(32, 4)
    before = contents(model)
    with pytest.raises(
        ModelError, match=r"match linear layers and embeddings only.*qkv_proj \(Fused(Quantized)?Linear\)"
    ):
        lora_one.init(model, token_batches(count=1), config=lora_one.Config(targets=["qkv_proj"]))
    assert contents(model).keys() == before.keys()
    _, report, (text,) = init_warned(model, config=EXACT)
    assert "model.layers.0.self_attn.qkv_proj" in text and "leaves 1 weights" in text
    assert {layer.name.rpartition(".")[2] for layer in report.layers} == {
        "out_proj", "q_proj", "gate_proj", "down_proj", "up_proj",
    }  # fmt: skip


def test_the_warning_points_at_the_call():
    for call in (
        lambda: lora_one.init(Own(), token_batches(count=1), config=SKETCH),
        lambda: attach_plain(Own(), SKETCH),
    ):
        with pytest.warns(TargetsWarning) as records:
            call()
        assert {record.filename for record in records if record.category is TargetsWarning} == {__file__}


def test_a_model_without_linear_layers_is_told_what_it_has():
    with pytest.raises(ModelError, match=r"its linear layers are: none; mlx-lm has no LoRA .* layers\.0 \(BitLinear\)"):
        lora_one.init(nn.Sequential(BitLinear(16, 16)), token_batches(count=1), config=EXACT)


class Cast(nn.Linear):
    """A subclass that is still a linear layer."""

    def __call__(self, x):
        return super().__call__(x.astype(mx.float32))


class Shifted(nn.Linear):
    def __call__(self, x):
        return super().__call__(x + 1)


class SwappedExperts(SwitchLinear):
    def __call__(self, x, indices, sorted_indices=False):
        return super().__call__(x, 1 - indices, sorted_indices)


def test_a_subclass_that_computes_what_linear_does_is_a_target():
    mx.random.seed(0)
    model = nn.Sequential(Cast(12, 20), Shifted(20, 8), SwappedExperts(8, 8, 2))

    def loss_fn(model, batch):
        return mx.mean(model.layers[1](mx.tanh(model.layers[0](batch))) ** 2)

    x = mx.random.normal((30, 12))
    gradient = mx.grad(lambda w: mx.mean((model.layers[1](mx.tanh(x @ w.T + model.layers[0].bias))) ** 2))
    gradients = {"layers.0": np.array(gradient(model.layers[0].weight)).astype(np.float64)}
    _, report, (text,) = init_warned(model, batches=[x], loss_fn=loss_fn, config=EXACT)
    assert [layer.name for layer in report.layers] == ["layers.0"]
    assert_lora_one_start(model, report, gradients)
    assert "layers.1 (Shifted)" in text and "layers.2 (SwappedExperts)" in text


@pytest.mark.parametrize("config", [EXACT, SKETCH])
def test_passes_take_the_kernels_of_a_training_step(config, monkeypatch):
    """mlx-lm's kernel for gated-delta layers, which has no gradient, is chosen in eval mode."""
    asked = []
    real = qwen3_next.gated_delta_update

    def spy(*args, use_kernel=True, **others):
        asked.append(use_kernel)
        return real(*args, use_kernel=use_kernel, **others)

    monkeypatch.setattr(qwen3_next, "gated_delta_update", spy)
    model = tiny_qwen3_next()
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lora_one.errors.ZeroGradientWarning)
        lora_one.init(model, token_batches(count=1), config=config)
    assert asked and not any(asked)
    assert not any(module.training for module in modules_of(model).values())


class WithDropout(nn.Module):
    """A layer with dropout, and one that counts its batches."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(16, 16), nn.Linear(16, 16)]
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm(16)
        self.seen = []

    def __call__(self, x):
        self.seen.append((self.training, self.layers[0].training))
        return self.layers[1](self.dropout(mx.tanh(self.norm(self.layers[0](x)))))


@pytest.mark.feature("LoRA dropout")
@pytest.mark.parametrize("config", [EXACT, SKETCH, lora_one.Config(rank=2, gradient="exact", gamma="auto")])
@pytest.mark.parametrize("training", [True, False])
def test_passes_run_in_train_mode_without_dropout_and_modes_come_back(config, training):
    mx.random.seed(0)
    model, x = WithDropout(), mx.random.normal((40, 16))
    model.train(training)
    model.layers[1].train(not training)

    def loss_fn(model, batch):
        return mx.mean(model(batch) ** 2)

    dropped = lora_one.Config(**{**config.to_dict(), "dropout": 0.25})
    other = WithDropout()
    other.update(model.parameters())
    _, report = lora_one.init(model, [x], loss_fn, dropped)
    assert {seen for seen in model.seen} == {(True, True)}
    modes = (model.training, model.layers[0].training, model.layers[0].linear.training, model.layers[1].linear.training)
    assert modes == (training, training, training, not training)
    assert model.dropout.training == model.layers[0].dropout.training == training
    assert model.layers[0].dropout._p_1 == 0.75
    np.testing.assert_array_equal(np.array(model.norm.running_mean), np.zeros(16))
    other.eval()
    assert report.base_loss == pytest.approx(loss_fn(other, x).item(), rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_layers_that_change_their_weight_with_the_mode_get_it_back(fails, monkeypatch):
    """nn.QQLinear dequantises its weight in train mode, where alone it has a gradient."""
    monkeypatch.setattr(nn.QQLinear, "__call__", lambda self, x: x @ self.weight.T)  # MLX has none for CPUs
    mx.random.seed(0)
    quantised = nn.QQLinear.from_linear(nn.Linear(64, 32, bias=False), mode="nvfp4")
    model = nn.Sequential(nn.Linear(64, 64), quantised)
    model.eval()
    before = contents(model.layers[1])
    x = mx.random.normal((20, 64))

    def loss_fn(model, batch):
        return mx.mean(model(batch) ** 2) * (float("nan") if fails else 1.0)

    if fails:
        with pytest.raises(GradientError):
            init_warned(model, batches=[x], loss_fn=loss_fn, config=EXACT)
    else:
        _, _, (text,) = init_warned(model, batches=[x], loss_fn=loss_fn, config=EXACT)
        assert "layers.1 (QQLinear)" in text
    assert isinstance(model.layers[0], LoRALinear) != fails
    after = contents(model.layers[1])
    assert after.keys() == before.keys() == {"weight", "scales"}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    assert model.layers[1]._quantized and not model.layers[1].training


def test_train_mode_gives_the_numbers_of_mlxs_own_gradient():
    model, batches = tiny_llama(), token_batches()
    gradients = mean_gradients(tiny_llama(), batches)
    _, report = lora_one.init(model, batches, config=EXACT)
    assert_lora_one_start(model, report, gradients)
