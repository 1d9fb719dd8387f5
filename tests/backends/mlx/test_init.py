"""lora_one.init on mlx-lm models: the numbers, and that nothing else changes."""

import itertools
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen2_moe
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.trainer import default_loss, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers

import lora_one
from lora_one.backends.mlx import MlxOps, MlxSession, last_layers
from lora_one.errors import ZeroGradientWarning
from tests.backends.mlx.models import (
    LINEAR,
    QUANTIZED,
    VOCABULARY,
    assert_lora_one_start,
    contents,
    dequantized,
    flat_factors,
    mean_gradients,
    modules_of,
    product,
    quantize,
    tiny_llama,
    tiny_mixtral,
    token_batches,
)

EXACT = lora_one.Config(rank=4, gradient="exact")
TWO_PASSES = lora_one.Config(passes=2)
# Wide enough to probe every direction of these small layers: then the sketch is exact too.
WHOLE = lora_one.Config(rank=4, oversample=60, passes=2)


@pytest.mark.feature("Start in one pass")
@pytest.mark.feature("Exact gradient")
@pytest.mark.feature("Quantised base")
@pytest.mark.parametrize("base", [None, *QUANTIZED], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_mixtral])
def test_factors_are_those_of_the_dequantised_weights_gradient(make, base):
    batches = token_batches()
    models = [make() if base is None else quantize(make(), *base) for _ in range(2)]
    gradients = mean_gradients(dequantized(models[0], make), batches)
    for model, config in zip(models, (EXACT, WHOLE), strict=True):
        _, report = lora_one.init(model, batches, config=config)
        assert_lora_one_start(model, report, gradients)
        assert report.passes == (1 if config is EXACT else 2)


def test_default_sketch_holds_what_its_report_says():
    batches = token_batches(count=1, sequences=1, length=12)  # 12 tokens: rank <= 12 < 8 + 16
    model, report = lora_one.init(tiny_llama(), batches)
    assert_lora_one_start(model, report, mean_gradients(tiny_llama(), batches))
    assert min(layer.share_of_best for layer in report.layers) > 0.999
    gradients = mean_gradients(tiny_llama(), batches)
    for layer in report.layers:
        s = np.linalg.svd(gradients[layer.name], compute_uv=False)
        np.testing.assert_allclose(layer.singular_values, s[:8], rtol=1e-4)


def test_batches_that_can_be_read_once_are_enough():
    batches = token_batches()
    models = [lora_one.init(tiny_llama(), given)[0] for given in (batches, iter(batches))]
    first, second = map(flat_factors, models)
    for name, factor in first.items():
        np.testing.assert_array_equal(np.array(second[name]), np.array(factor))


@pytest.mark.feature("Float16 and bfloat16")
def test_bfloat16_base_is_sketched_in_float32():
    batches = token_batches()
    model = tiny_llama()
    model.set_dtype(mx.bfloat16)
    gradients = mean_gradients(dequantized(model), batches)
    _, report = lora_one.init(model, batches, config=WHOLE)
    modules = modules_of(model)
    for layer in report.layers:
        assert modules[layer.name].lora_a.dtype == modules[layer.name].lora_b.dtype == mx.float32
        assert modules[layer.name].linear.weight.dtype == mx.bfloat16
        norm = np.linalg.norm(gradients[layer.name])
        assert layer.gradient_norm == pytest.approx(norm, rel=0.03)  # the activations' own bfloat16 noise


def test_base_weights_frozen_state_modes_and_random_stream():
    model = tiny_llama()
    before = contents(model)
    model.layers[0].train()  # a mode that differs from the rest
    mx.random.seed(7)
    expected = np.array(mx.random.uniform(shape=(3,)))
    mx.random.seed(7)
    returned, _ = lora_one.init(model, token_batches(), config=EXACT)
    assert returned is model
    np.testing.assert_array_equal(np.array(mx.random.uniform(shape=(3,))), expected)
    after = {name.replace("_proj.linear.", "_proj."): value for name, value in contents(model).items()}
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
    assert trainable == {
        f"{p}.lora_{f}" for p, m in modules_of(model).items() if isinstance(m, LoRALinear) for f in "ab"
    }
    assert len(trainable) == 2 * 7 * 2
    assert model.layers[0].self_attn.q_proj.training
    assert not model.layers[1].self_attn.q_proj.training
    assert not model.training


@pytest.mark.feature("Adapters attached by others")
def test_an_adapted_model_keeps_its_own_rank_scale_and_frozen_state():
    def adapted():
        model = tiny_llama()
        model.freeze()
        linear_to_lora_layers(model, 1, {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]})
        model.layers[1].self_attn.q_proj.lora_b = mx.ones_like(model.layers[1].self_attn.q_proj.lora_b)
        model.layers[0].input_layernorm.unfreeze()
        return model

    batches = token_batches()
    for config in (lora_one.Config(gradient="exact"), lora_one.Config(oversample=61)):
        model = adapted()
        _, report = lora_one.init(model, batches, config=config)
        assert [layer.name for layer in report.layers] == ["model.layers.1.self_attn.q_proj"]
        assert report.layers[0].rank == 3
        # The gradient at the base weights: what the adapter held before does not count.
        assert_lora_one_start(model, report, mean_gradients(tiny_llama(), batches))
        trainable = {name for name, _ in tree_flatten(model.trainable_parameters())}
        assert "model.layers.0.input_layernorm.weight" in trainable
        assert len(trainable) == 3
    with pytest.raises(lora_one.errors.ModelError, match=r"rank 5 \(the adapter's: 3\); targets 'x'"):
        lora_one.init(adapted(), batches, config=lora_one.Config(rank=5, targets="x"))


@pytest.mark.feature("Experts as one parameter")
@pytest.mark.feature("Experts")
def test_experts_that_no_token_reached_start_plain_and_are_reported():
    batches = token_batches(count=1, sequences=1, length=5)  # at most 4 tokens x 2 of 16 experts
    gradients = mean_gradients(tiny_mixtral(experts=16), batches)
    for config in (lora_one.Config(rank=2, gradient="exact"), lora_one.Config(rank=2, oversample=62)):
        model = tiny_mixtral(experts=16)
        with pytest.warns(ZeroGradientWarning):
            _, report = lora_one.init(model, batches, config=config)
        unreached = {
            f"{path}[{e}]" for path, g in gradients.items() if g.ndim == 3 for e in range(16) if not g[e].any()
        }
        assert set(report.plain_layers) == unreached
        assert len(unreached) >= 2 * 3 * 8
        modules = modules_of(model)
        for name in unreached:
            path, expert = name[:-1].split("[")
            assert isinstance(modules[path], LoRASwitchLinear)
            a, b = (np.array(x[int(expert)]) for x in (modules[path].lora_a, modules[path].lora_b))
            assert not b.any()
            assert np.var(a) == pytest.approx(1 / (3 * 64), rel=0.5)  # Kaiming-uniform's
        reached = SimpleNamespace(layers=[layer for layer in report.layers if layer.start == "spectral"])
        assert_lora_one_start(model, reached, gradients)


@pytest.mark.parametrize("config", [EXACT, WHOLE], ids=["exact", "sketch"])
def test_checkpointed_blocks_give_the_same_start(config, monkeypatch):
    batches = token_batches()
    plain, _ = lora_one.init(tiny_llama(), batches, config=config)
    model = tiny_llama()
    block = type(model.layers[0])
    monkeypatch.setattr(block, "__call__", block.__call__)  # undone afterwards
    grad_checkpoint(model.layers[0])
    lora_one.init(model, batches, config=config)
    for path, module in modules_of(plain).items():
        if isinstance(module, LoRALinear):
            np.testing.assert_allclose(product(modules_of(model)[path]), product(module), atol=1e-6)


@pytest.mark.feature("Linear layers")
def test_targets_as_names_regex_and_last_layers():
    batches = token_batches(count=1)

    def targeted(targets):
        config = lora_one.Config(rank=2, gradient="exact", targets=targets)
        return [layer.name for layer in lora_one.init(tiny_llama(), batches, config=config)[1].layers]

    assert targeted("all-linear") == [
        f"model.layers.{i}.{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for i in range(2) for name in LINEAR
    ]
    assert targeted(["q_proj", "lm_head"]) == [
        "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head",
    ]  # fmt: skip
    assert targeted(r".*\.1\.mlp\.(up|down)_proj") == ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]
    assert targeted(last_layers(tiny_llama(), 1, ["v_proj"])) == ["model.layers.1.self_attn.v_proj"]
    assert len(last_layers(tiny_llama(), 0)) == 14
    with pytest.raises(lora_one.errors.ModelError, match="got 3 where there are 2"):
        last_layers(tiny_llama(), 3)


def test_a_gate_of_one_output_is_no_target_of_all_linear():
    args = qwen2_moe.ModelArgs(
        model_type="qwen2_moe", hidden_size=64, num_hidden_layers=1, intermediate_size=64, num_attention_heads=4,
        num_experts_per_tok=2, num_experts=4, moe_intermediate_size=32, shared_expert_intermediate_size=32,
        rms_norm_eps=1e-5, vocab_size=VOCABULARY, num_key_value_heads=2,
    )  # fmt: skip
    _, report = lora_one.init(qwen2_moe.Model(args), token_batches(count=1), config=lora_one.Config(rank=2))
    names = {layer.name.rpartition(".")[2] for layer in report.layers}
    assert names >= {"q_proj", "gate", "gate_proj", "up_proj", "down_proj"} and "shared_expert_gate" not in names


def test_any_mlx_module_will_do():
    """A user's own two-layer network, not of mlx-lm and without `layers`, whose gradients are computed by hand."""
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 5))
    rng = np.random.default_rng(0)
    x, y = (rng.standard_normal(shape).astype(np.float32) for shape in ((30, 12), (30, 5)))
    batches = [{"x": x, "y": y}]  # NumPy arrays are converted

    def loss_fn(model, batch):
        return mx.mean((model(batch["x"]) - batch["y"]) ** 2)

    w0, b0, w1, b1 = (np.array(p).astype(np.float64) for _, p in tree_flatten(model.parameters()))
    if w0.ndim == 1:
        b0, w0, b1, w1 = w0, b0, w1, b1
    h = np.tanh(x @ w0.T + b0)
    dy = 2 * (h @ w1.T + b1 - y) / y.size
    by_hand = {"layers.0": ((dy @ w1) * (1 - h**2)).T @ x, "layers.2": dy.T @ h}
    _, report = lora_one.init(model, batches, loss_fn, lora_one.Config(rank=3, gradient="exact"))
    assert [layer.name for layer in report.layers] == list(by_hand)
    assert_lora_one_start(model, report, by_hand)


def test_default_loss_of_a_mapping_is_cross_entropy_over_the_labels_that_count():
    model = tiny_llama()
    tokens, lengths = token_batches(count=1)[0]
    labels = np.array(tokens)
    for row, (_, length) in zip(labels, np.array(lengths), strict=True):
        row[length + 1 :] = -100
    batch = {"input_ids": np.array(tokens), "labels": labels, "attention_mask": labels != -100}
    _, report = lora_one.init(model, [batch], config=EXACT)
    assert report.base_loss == pytest.approx(default_loss(tiny_llama(), tokens, lengths)[0].item(), rel=1e-6)


def test_one_batch_is_decomposed_layer_by_layer():
    """The peak above the loaded model must stay below the full gradients' size, which it passes with two batches."""
    batches = token_batches(count=2, sequences=1, length=8)
    used = []
    for count in (1, 2):
        model = tiny_llama(layers=12, hidden_size=128, intermediate_size=384)
        mx.clear_cache()
        resident = mx.get_active_memory()
        _, report = lora_one.init(model, batches[:count], config=EXACT)
        used.append(report.peak_memory - resident)
    total = 4 * sum(layer.out_features * layer.in_features for layer in report.layers)
    assert used[0] < 0.35 * total
    assert used[1] > total


class Thrown(Exception):
    pass


def _throwing(after):
    calls = itertools.count(1)

    def loss_fn(model, batch):
        if next(calls) > after:
            raise Thrown
        return default_loss(model, *batch)[0]

    return loss_fn


def _nan(model, batch):
    return default_loss(model, *batch)[0] * float("nan")


def _constant(model, batch):
    return mx.array(1.0)


def _vector(model, batch):
    return mx.ones((3,))


errors = lora_one.errors
KEYS = [f"{'self_attn' if name[0] in 'qkvo' else 'mlp'}.{name}" for name in LINEAR]
BAD = {
    "throws at once": (Thrown, "^$", {"throws_after": 0}),
    "throws in pass 2": (Thrown, "^$", {"throws_after": 3, "config": TWO_PASSES}),
    "throws in the exact pass": (Thrown, "^$", {"throws_after": 1, "config": EXACT}),
    "nan": (errors.GradientError, "batch 1: the loss must be finite, got nan", {"loss_fn": _nan}),
    "no gradient": (errors.BatchError, "no target layer has a gradient", {"loss_fn": _constant}),
    "a vector": (errors.BatchError, r"must be a scalar array, got shape \(3,\)", {"loss_fn": _vector}),
    "rank": (
        errors.ModelError,
        r"q_proj': rank must be <= min\(out, in\) = 64, got 65",
        {"config": lora_one.Config(rank=65)},
    ),
    "targets": (errors.ModelError, "its linear layers are: model.layers.0", {"config": lora_one.Config(targets=["w"])}),
    "norm": (
        errors.ModelError,
        r"input_layernorm \(RMSNorm\)",
        {"config": lora_one.Config(targets=["input_layernorm"])},
    ),
    "no batches": (errors.BatchError, "at least one batch, got none", {"batches": []}),
    "generator": (
        errors.BatchError,
        "read 2 times, got a generator",
        {"batches": (x for x in token_batches()), "config": TWO_PASSES},
    ),
    "other batches": (errors.BatchError, "as mlx-lm's iterate_batches yields it", {"batches": [1]}),
    "backend": (errors.BackendError, "'torch' does not fit the model", {"backend": "torch"}),
}


SETTINGS = {"rank", "targets", "norm"}  # a model that is adapted already keeps its own


@pytest.mark.parametrize(
    ("case", "adapted"),
    [pytest.param(case, False, id=f"{case}-plain") for case in BAD]
    + [pytest.param(case, True, id=f"{case}-adapted") for case in BAD if case not in SETTINGS],
)
def test_after_an_error_the_model_is_as_it_was(case, adapted):
    kind, message, arguments = BAD[case]
    model = quantize(tiny_llama(), "affine", 32, 4)
    model.layers[0].mlp.train()
    if adapted:
        model.freeze()
        linear_to_lora_layers(model, 2, {"rank": 4, "scale": 5.0, "dropout": 0.1, "keys": KEYS})
        model.layers[0].self_attn.q_proj.freeze()
    expected = {
        path: (id(module), type(module), module.training, set(module._no_grad))
        for path, module in modules_of(model).items()
    }
    before = contents(model)
    arguments = dict(arguments)
    if "throws_after" in arguments:
        arguments["loss_fn"] = _throwing(arguments.pop("throws_after"))
    with pytest.raises(kind, match=message):
        lora_one.init(model, **{"batches": token_batches(), **arguments})
    after = contents(model)
    assert {p: (id(m), type(m), m.training, set(m._no_grad)) for p, m in modules_of(model).items()} == expected
    assert list(after) == list(before)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    if adapted:
        layer = model.layers[0].self_attn.q_proj
        assert (layer.scale, layer.dropout._p_1) == (5.0, 0.9)


def test_a_failed_svd_is_an_error_that_names_the_layer(monkeypatch):
    nan = mx.array(float("nan"))
    svd = MlxOps.svd
    monkeypatch.setattr(MlxOps, "svd", lambda self, x: tuple(factor * nan for factor in svd(self, x)))
    model = tiny_llama()
    before = contents(model)
    with pytest.raises(errors.GradientError, match=r"layer 'model.layers.0.self_attn.q_proj': .* its SVD is not"):
        lora_one.init(model, token_batches(count=1))
    assert contents(model).keys() == before.keys()


def test_dora_on_an_embedding_is_an_error():
    model = tiny_llama()
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["model.embed_tokens"]}
    linear_to_lora_layers(model, 2, parameters, use_dora=True)
    with pytest.raises(errors.ModelError, match=r"LoRA and DoRA, got:\n.*DoRAEmbedding"):
        lora_one.init(model, token_batches())


def test_a_session_works_inside_its_block_only():
    session = MlxSession(tiny_llama(), token_batches(), None, EXACT)
    calls = (
        lambda session: session.mean_loss(),
        lambda session: session.like("model.layers.0.self_attn.q_proj"),
        lambda session: session.fold_pass({}),
        lambda session: session.sides_pass({}),
        lambda session: session.exact_pass(lambda *_: None),
        lambda session: session.assign("model.layers.0.self_attn.q_proj", None),
    )
    with session:
        assert session.mean_loss().batches == 2
    for outside in (session, MlxSession(tiny_llama(), token_batches(), None, EXACT)):
        for call in calls:
            with pytest.raises(RuntimeError, match="inside `with` only"):
                call(outside)
