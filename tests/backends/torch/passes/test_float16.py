"""Models that compute in float16: their starts are those of the same numbers in float32.

This holds for small and for large gradients. Where the dtype cannot hold them, a warning and the report say so.
"""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_one
from lora_one import demo
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.passes import loss_scale
from lora_one.errors import GradientError, UnderflowWarning
from tests.backends.torch.models import llama, mlp, squared_error
from tests.backends.torch.passes.test_never_called import Mlp as Fused
from tests.backends.torch.passes.test_never_called import batches as fused_batches
from tests.backends.torch.test_init_errors import fails

EXACT = lora_one.Config(rank=4, gradient="exact")
SKETCH = lora_one.Config(rank=4, passes=8)
SETTINGS = [pytest.param(EXACT, id="exact"), pytest.param(SKETCH, id="sketch")]
HALF = torch.float16


def products(model):
    return {site.layer.name: (site.lora_B.weight @ site.lora_A.weight).detach().flatten() for site in find_sites(model)}


def assert_alike(model, expected, least=0.999):
    for name, product in products(model).items():
        assert float(cosine_similarity(product, expected[name], dim=0)) > least, name


def in_both(model, batches, loss_fn, config):
    """A float16 model's start, and that of the same numbers in float32."""
    wide = copy.deepcopy(model).float()
    expected = products(lora_one.init(wide, batches, loss_fn, config)[0])
    return *lora_one.init(model, batches, loss_fn, config), expected


@pytest.mark.feature("Float16 and bfloat16")
@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("count", [2**-16, 40, 2**26], ids=["overflows", "tokens", "underflows"])
def test_a_token_of_many_or_of_few(config, count):
    """Transformers' own loss over this number of tokens.

    Without a scale, 2^26 leaves nothing of any gradient, and 2^-16 overflows.
    """
    case = llama(HALF)
    batches = [{**batch, "num_items_in_batch": torch.tensor(float(count))} for batch in case.batches]
    model, report, expected = in_both(case.model, batches, None, config)
    assert_alike(model, expected)
    assert all(layer.rounded_away < 0.01 and layer.start == "spectral" for layer in report.layers)


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**14])
@pytest.mark.parametrize("recompute", [False, True, "reentrant"])
def test_a_loss_of_ones_own_and_recomputed_blocks(factor, recompute):
    case = llama(HALF)
    if recompute == "reentrant":
        case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        case.model.enable_input_require_grads()
        case.model.train()
    config = lora_one.Config(rank=4, gradient="exact", recompute=recompute is True)
    model, _, expected = in_both(case.model, case.batches, lambda m, b: m(**b).loss * factor, config)
    assert_alike(model, expected)


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_autocast(config, where):
    """The weights are in float32: if the loss switches autocast on, only the backward pass shows float16."""
    case = llama()
    expected = products(lora_one.init(llama().model, case.batches, None, config)[0])
    inside = torch.autocast("cpu", HALF, enabled=where == "inside")

    def loss_fn(model, batch):
        with inside:
            return model(**batch).loss * 2.0**-24

    with torch.autocast("cpu", HALF, enabled=where == "around"):
        model, report = lora_one.init(case.model, case.batches, loss_fn, config)
    assert_alike(model, expected)
    assert 0 < max(layer.rounded_away for layer in report.layers) < 0.01


@pytest.mark.parametrize("config", SETTINGS)
def test_nf4_that_computes_in_float16(config):
    def load(dtype):
        nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
        return AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32, quantization_config=nf4)

    tokens = torch.randint(4, 90, (4, 12), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": tokens, "labels": tokens}

    def loss_fn(model, batch):
        return model(**batch).loss * 2.0**-20

    expected = products(lora_one.init(load(torch.float32), [batch], loss_fn, config)[0])
    model, _ = lora_one.init(load(HALF), [batch], loss_fn, config)
    assert_alike(model, expected, 0.99)


@pytest.mark.parametrize("kind", ["called", "read"])
@pytest.mark.parametrize("config", SETTINGS)
def test_a_batch_that_overflows_later_is_repeated_and_counts_once(config, kind):
    """The scale is chosen on the first batch; the second of three is 2^26 times as large.

    The layers are called twice, or their factors are read."""
    calls = itertools.count()
    if kind == "called":
        model, batches, _ = mlp(HALF)
    else:
        torch.manual_seed(0)
        model = Fused(fused=("up", "down")).to(HALF)
        batches = [tuple(x.to(HALF) for x in batch) for batch in fused_batches()]
        batches.append(batches[0])
    config = lora_one.Config(**{**config.to_dict(), "rank": 3})
    sizes = [2.0**-30, 2.0**-4, 2.0**-5]

    def loss_fn(model, batch):
        next(calls)
        x, y = (part.to(next(model.parameters()).dtype) for part in batch[:2])
        return (model(x) - y).float().pow(2).mean() * batch[2]

    model, _, expected = in_both(model, [(*b, s) for b, s in zip(batches, sizes, strict=True)], loss_fn, config)
    assert_alike(model, expected)
    if kind == "called" and config.gradient == "exact":
        assert next(calls) > 3 + 3 + 1  # in float32, in float16, and once to choose a scale


def test_what_is_read_once_is_enough_for_an_exact_pass():
    case = llama(HALF)
    expected = products(lora_one.init(copy.deepcopy(case.model), case.batches, None, EXACT)[0])
    got = products(lora_one.init(case.model, iter(case.batches), None, EXACT)[0])
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", SETTINGS)
def test_the_scale_is_taken_out_to_the_bit(monkeypatch, config):
    """The model is in float32, where a scale is not needed and must not change a bit."""
    expected = products(lora_one.init(llama().model, llama().batches, None, config)[0])
    values = set()
    original = loss_scale.LossScale.backward
    monkeypatch.setattr(loss_scale, "_computes_in_float16", lambda *_: True)
    monkeypatch.setattr(loss_scale.LossScale, "backward", lambda x, loss: (original(x, loss), values.add(x.value))[0])
    got = products(lora_one.init(llama().model, llama().batches, None, config)[0])
    assert values == {2.0**15}
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_other_dtypes_have_no_scale(monkeypatch):
    monkeypatch.setattr(loss_scale.LossScale, "_begin", lambda _: pytest.fail("a scale"))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _, report = lora_one.init(llama(dtype).model, llama().batches, None, EXACT)
        assert all(layer.rounded_away == 0.0 for layer in report.layers)


def test_a_layer_that_is_called_without_tokens():
    model, batches, _ = mlp(HALF)

    def loss_fn(model, batch):
        return squared_error(model, batch) + model(batch[0][:0]).sum()

    expected = products(lora_one.init(mlp(HALF).model, batches, squared_error, EXACT)[0])
    assert_alike(lora_one.init(model, batches, loss_fn, EXACT)[0], expected)


class Unequal(nn.Module):
    """Two layers whose gradients are 2^34 apart: no scale holds both."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Linear(12, 10), nn.Linear(12, 10)

    def forward(self, x):
        return self.large(x).float() + self.small(x).float() * 2.0**-34


@pytest.mark.parametrize("config", SETTINGS)
def test_what_no_scale_can_hold_is_said(config):
    torch.manual_seed(0)
    model = Unequal().to(HALF)
    batches = [tuple(x.to(HALF) for x in batch) for batch in mlp().batches]

    def loss_fn(model, batch):
        return squared_error(model, [x.to(next(model.parameters()).dtype) for x in batch])

    with pytest.warns(UnderflowWarning, match=r"gradients of 1 of 2 layers, .* in small; load the model in bfloat16"):
        model, report, expected = in_both(model, batches, loss_fn, config)
    large, small = report.layers
    assert large.rounded_away < 1e-3 and large.share_of_best > 0.999
    # The loss that the report calls possible is about the loss that happened.
    cosine = float(cosine_similarity(products(model)["small"], expected["small"], dim=0))
    assert cosine < 0.999 and small.share_of_best < 0.999
    assert 0.3 < (1 - small.share_of_best) / (1 - cosine**2) < 3
    assert lora_one.report.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("config", SETTINGS)
def test_a_gradient_that_is_infinite_at_any_scale_names_the_layer(config):
    model, batches, _ = mlp(HALF)

    def loss_fn(model, batch):
        out = model(batch[0])
        return (out * 0).abs().sqrt().mean() + out.pow(2).mean()

    fails(model, batches, loss_fn, config, GradientError, "layer '(up|shared|down)': its gradient .* not finite")
