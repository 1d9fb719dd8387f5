"""Operations and kept activations against torch's counts on real models; the sums by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cost import COMPARED, RESULT, summary
from lora_one.config import Config
from lora_one.core.exact import EXACT_OVERSAMPLE
from lora_one.core.krylov import CHECKS
from lora_one.errors import ConfigError
from lora_one.estimate import Workload, estimate, flops
from lora_one.estimate.activations import kept_bytes
from lora_one.estimate.architecture import Linear, target_linears
from lora_one.estimate.flops import (
    EXACT_PRODUCTS,
    batches_of_renewal,
    exact_products,
    pass_flops,
    sketch_flops,
    waiting_tokens,
)
from lora_one.estimate.hardware import Hardware, known
from lora_one.estimate.memory import exact_memory, sketch_memory, step_memory
from lora_one.estimate.rates.choice import choose
from lora_one.estimate.rates.numpy import by_numpy
from lora_one.estimate.rates.torch import by_torch
from lora_one.estimate.reader import read_architecture

from .models import count, shape_of, small

CONFIGS = Path(__file__).parent / "configs"
GIB = 2**30
PLAIN = Hardware("plain", flops=1e12, efficiency=0.5, bandwidth=1e11, qr_flops=1e10, svd_flops=1e9)


def work(**settings) -> Workload:
    return Workload(**{"batch_size": 2, "seq_len": 24, "config": Config(rank=4), **settings})


def targets_of(model):
    return target_linears(model)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "llama, biases, tied", "mistral", "qwen2", "qwen3", "gemma", "phi", "phi3"])
def test_kept_activations_are_what_autograd_saves(kind, attention, dtype):
    config = small(kind)
    model = shape_of(config)
    counts = count(config, rank=4, batch=(2, 24), dtype=dtype, attention=attention)
    settings = work(dtype=dtype, attention=attention)
    # Layer norms keep two numbers per row in float32, as accelerators do; torch's CPU kernel keeps them in bfloat16.
    narrow = 2 * 2 * 48 * len(model.blocks) if (kind, dtype) == ("phi", "bfloat16") else 0
    assert kept_bytes(model, targets_of(model), settings, rank=4) - narrow == counts.kept


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "phi", "phi3", "mixtral", "qwen2_moe"])
def test_operations_are_those_that_torch_counts(kind):
    config = small(kind)
    model = shape_of(config)
    counts = count(config, rank=4, batch=(2, 24), dtype="float32", attention="eager")
    expected = pass_flops(model, targets_of(model), work(attention="eager"), lora=4)
    assert (expected.forward.total, expected.backward.total) == (counts.forward, counts.backward)


def test_parts_of_a_training_step_of_llama_2_7b_by_hand():
    model = read_architecture(CONFIGS / "llama-2-7b.json")
    settings = Workload(batch_size=1, seq_len=2048, dtype="float32", config=Config(rank=8))
    parts = step_memory(model, targets_of(model), settings)
    pairs = 8 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert parts["base weights"] == 4 * 6_738_415_616
    assert parts["LoRA factors"] == 4 * pairs
    assert parts["LoRA gradients"] == 0  # they exist after the activations, which are larger, are freed
    assert parts["Adam moments"] == 8 * pairs
    assert parts["logits and loss"] == 12 * 2048 * 32000
    # Per block and token: two norms and their roots, the inputs of q, k, v and of gate and up, q, k, v, the attention's
    # output and its log-sum-exps, four times the MLP's width, and A x of seven layers.
    token = 2 * 4096 + 2 + 2 * 4096 + 4 * 4096 + 32 + 4 * 11008 + 7 * 8
    assert parts["activations"] == 4 * 32 * 2048 * token


def test_four_bit_weights_are_four_and_a_half_bits():
    model = read_architecture(CONFIGS / "llama-2-7b.json")
    parts = step_memory(model, targets_of(model), Workload(quantized=True))
    linear = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert parts["base weights"] == linear * 4.5 / 8 + 2 * (6_738_415_616 - linear)


def test_checkpointing_keeps_a_block_and_the_blocks_inputs():
    model = shape_of(small("llama"))
    plain, saving = (
        kept_bytes(model, targets_of(model), work(checkpointing=x, dtype="float32"), 4) for x in (False, True)
    )
    block = plain / 3
    assert saving == 4 * 48 * 64 * 4  # the inputs of three blocks and of the last norm
    settings = work(checkpointing=True, dtype="float32", config=Config(rank=4))
    parts = step_memory(model, targets_of(model), settings)
    # One block again and the gradients of gate and up: here that is more than the logits.
    assert parts["activations"] == saving + block + 2 * 48 * 176 * 4
    assert parts["logits and loss"] == 0


def test_the_init_holds_running_svds_and_exact_all_gradients_of_several_batches(monkeypatch):
    monkeypatch.setattr(flops, "WAITING_BYTES", 0)
    model = shape_of(small("llama"))
    targets = targets_of(model)
    sides = sum(x.in_features + x.out_features for block in targets for x in block)
    config = Config(rank=4, oversample=6)
    first, second = (sketch_memory(model, targets, work(config=replace(config, passes=n))) for n in (1, 2))
    # U and V of 10 directions, and the 8 columns that measure the norm, with their products.
    assert first["running SVDs"] == second["running SVDs"] == 4 * (10 + 8) * sides
    assert second["products"] == 4 * 10 * sides and sum(second.values()) >= sum(first.values())
    several, single = (exact_memory(model, targets, work(init_batches=n)) for n in (2, 1))
    assert several["full gradients"] == 4 * sum(x.weights for block in targets for x in block)
    assert single["full gradients"] == 0


def test_rows_wait_until_they_need_half_of_the_memory_of_the_gradient(monkeypatch):
    monkeypatch.setattr(flops, "WAITING_BYTES", 0)
    layer = Linear("x", 100, 300, "input")  # 60 000 bytes are half of it, and a token's rows need 1600
    for batches, tokens, together in [(1, 5, 1), (9, 5, 8), (4, 5, 4), (9, 37, 2), (9, 38, 1), (9, 400, 1)]:
        settings = work(batch_size=1, seq_len=tokens, init_batches=batches, dtype="float32")
        assert batches_of_renewal(layer, settings) == together
        assert waiting_tokens(layer, settings) == (together - 1) * tokens
    assert batches_of_renewal(layer, replace(settings, seq_len=5, dtype="bfloat16", init_batches=99)) == 15


def test_large_gradients_take_a_few_products_and_small_ones_a_dense_svd():
    def layer(size: int) -> Linear:
        return Linear("x", size, 4 * size, "input")

    assert exact_products(layer(4096), rank=8) == (EXACT_PRODUCTS, False)
    assert exact_products(layer(32), rank=8) == (0, True)
    size = CHECKS[-1] * (8 + EXACT_OVERSAMPLE)  # has room for the directions of the last check
    assert exact_products(layer(size), rank=8) == (EXACT_PRODUCTS, False)
    assert exact_products(layer(size - 1), rank=8) == (0, True)


def test_time_is_operations_over_the_rate_and_traffic_over_the_bandwidth():
    model = shape_of(small("llama"))
    settings = work()
    fast, slow = (
        estimate(model, settings, Hardware("", flops, 0.5, 1e30, 1e30, 1e30)).columns["training step"].total_seconds
        for flops in (1e12, 1e11)
    )
    total = sum(pass_flops(model, targets_of(model), settings, lora=4).by_rate)
    assert (fast, slow) == (pytest.approx(total / 0.5e12), pytest.approx(total / 0.5e11))
    first, second, third = (
        estimate(model, work(config=Config(rank=4, passes=n)), Hardware("", 1e12, 0.5, 1e11, 1e30, 1e30))
        .columns["init, sketch"]
        .seconds["forward and backward"]
        for n in (1, 2, 3)
    )
    assert third - second == pytest.approx(second - first) and first < second - first < 1.5 * first


def test_a_renewal_costs_the_same_for_few_tokens_as_for_many(monkeypatch):
    """Products with the rows are linear in their number; QR, projections and SVD come once per renewal."""
    monkeypatch.setattr(flops, "WAITING_BYTES", 0)
    targets = [[Linear("x", 400, 300, "input")]]
    counts = [sketch_flops(targets, work(batch_size=1, seq_len=n, init_batches=b)) for n, b in [(600, 1), (600, 4)]]
    assert counts[1].qr == 4 * counts[0].qr and counts[1].svd == 4 * counts[0].svd == 4 * 22 * (2 * 20) ** 3
    rows = [sketch_flops(targets, work(batch_size=1, seq_len=n, init_batches=1)).thin for n in (600, 700)]
    assert rows[1] - rows[0] == 2 * 100 * (4 * 20 + 8) * 700
    together = sketch_flops(targets, work(batch_size=1, seq_len=10, init_batches=4))
    assert together.qr == counts[0].qr


def test_the_hardware_is_a_name_or_two_numbers_or_this_machine():
    assert known("H100", "bfloat16").flops == 989e12
    assert choose("A100", None, None, 0.3, "float32").efficiency == 0.3
    assert choose(None, 50.0, 500.0, None, "float32").bandwidth == 5e11
    for arguments, match in [
        (("Z9", None, None, None, "float32"), "must be one of A100, .*, got 'Z9'"),
        ((None, 5.0, None, None, "float32"), "both tflops and bandwidth"),
        (("H100", None, None, 1.5, "float32"), r"efficiency must be in \(0, 1\], got 1.5"),
    ]:
        with pytest.raises(ConfigError, match=match):
            choose(*arguments)


@pytest.mark.parametrize("rates", [by_numpy, lambda size: by_torch("bfloat16", size)])
def test_this_machine_has_all_rates(rates):
    machine = rates(size=128)
    for rate in (machine.dense_rate, machine.float32_rate, machine.attention_rate, machine.bandwidth, machine.qr_flops):
        assert rate > 0
    assert machine.thin_rate(8) == dict(machine.thin)[8]


def test_thin_products_run_at_a_measured_rate_or_at_the_speed_of_memory():
    machine = Hardware("", 1e12, 0.5, 1e11, 1e10, 1e9, thin=((8, 10.0), (16, 20.0)))
    assert [machine.thin_rate(k) for k in (4, 8, 12, 16, 99)] == [10.0, 10.0, 15.0, 20.0, 20.0]
    assert PLAIN.thin_rate(4) == 1e11 * 4 / 2
    assert PLAIN.thin_rate(1000) == 0.5e12


def test_notes_say_what_does_not_fit_and_what_is_no_target():
    mixtral = estimate(read_architecture(CONFIGS / "mixtral-8x7b.json"), Workload(), known("H100", "bfloat16"))
    assert any("training step: more than the 80 GB of one H100" in note for note in mixtral.notes)
    assert any("8 stacked experts a block are not counted" in note for note in mixtral.notes)
    qwen = read_architecture(CONFIGS / "qwen1.5-moe-a2.7b.json")  # its gates of one output are no targets
    assert not any("is above the size" in note for note in estimate(qwen, Workload(), PLAIN).notes)
    large = estimate(qwen, Workload(config=Config(rank=2049)), PLAIN)
    assert any("rank 2049 is above the size of mlp.shared_expert.down_proj" in note for note in large.notes)


def test_the_ratios_of_the_benchmark_are_those_of_its_rows():
    result = json.loads(RESULT.read_text())
    for row in result["rows"]:
        for measured, estimated, ratio in COMPARED.values():
            assert row[ratio] == row[measured] / row[estimated]
    assert result["measured_over_estimated"] == summary(result["rows"])
