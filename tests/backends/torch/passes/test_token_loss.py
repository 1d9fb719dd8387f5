"""The loss by rows equals transformers' own, and so does its gradient; it needs no float32 copy of the logits."""

import pytest
import torch
from torch.nn import functional
from transformers.loss.loss_utils import ForCausalLMLoss

from lora_one.backends.torch.passes import token_loss
from lora_one.backends.torch.passes.batches import default_loss
from lora_one.backends.torch.passes.token_loss import loss_by_rows, next_token_loss
from tests.backends.torch.models import CASES, llama

VOCABULARY = 60


@pytest.fixture(params=[1, 7, 1000], ids="{} rows".format)
def rows(request, monkeypatch):
    """The number of rows at once, out of 40."""
    monkeypatch.setattr(token_loss, "CHUNK_BYTES", 4 * VOCABULARY * request.param)


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(4, 10, VOCABULARY, generator=generator)
    labels = torch.randint(0, VOCABULARY, (4, 10), generator=generator)
    labels[0, :6] = labels[2] = -100
    return logits.to(dtype).requires_grad_(), labels


def both(loss_fn, logits, labels, **settings):
    """Three times the loss, and its gradient."""
    loss = 3 * loss_fn(logits, labels, VOCABULARY, **settings)
    return loss, *torch.autograd.grad(loss, logits)


SETTINGS = {
    "mean": {},
    "sum over": {"num_items_in_batch": 55},
    "sum over a tensor": {"num_items_in_batch": torch.tensor(55)},
    "another ignored": {"ignore_index": 3},
    "shifted": {"shift_labels": inputs()[1]},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_loss_and_gradient_against_float64(rows, settings):
    logits, labels = inputs()
    settings = SETTINGS[settings]
    ignored = settings.get("ignore_index", -100)
    labels = labels.clamp(min=ignored)
    got = both(next_token_loss, logits, labels, **settings)
    of_transformers = both(ForCausalLMLoss, logits, labels, **settings)
    shifted = settings.get("shift_labels", functional.pad(labels[:, 1:], (0, 1), value=ignored))
    wide = logits.detach().double().requires_grad_()
    total = functional.cross_entropy(wide.flatten(0, 1), shifted.flatten(), ignore_index=ignored, reduction="sum")
    count = settings.get("num_items_in_batch", int((shifted != ignored).sum()))
    expected = (3 * total / count, *torch.autograd.grad(3 * total / count, wide))
    for mine, theirs, exact in zip(got, of_transformers, expected, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(theirs.double(), exact, rtol=1e-6, atol=1e-8)  # so it is the same function


def test_bfloat16_is_rounded_once(rows):
    """The gradient is the float32 gradient of these logits, in bfloat16: transformers' own, except for the last bit."""
    logits, labels = inputs(torch.bfloat16)
    loss, gradient = both(next_token_loss, logits, labels)
    its_loss, its = both(ForCausalLMLoss, logits, labels)
    assert gradient.dtype == torch.bfloat16 and loss.dtype == torch.float32
    torch.testing.assert_close(loss, its_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, its, rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("scale", [1.0, 2.0**16])
@pytest.mark.parametrize("count", [33, 2**20 + 1])
def test_float16_holds_the_gradient_whatever_the_weight_of_a_token(rows, count, scale):
    """The gradient is held as far as the dtype's range goes: to 6e-8."""
    logits, labels = inputs(torch.float16)
    (got,) = torch.autograd.grad(scale * next_token_loss(logits, labels, VOCABULARY, num_items_in_batch=count), logits)
    wide = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(scale * ForCausalLMLoss(wide, labels, VOCABULARY, count), wide)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), expected, rtol=2**-10, atol=2**-24)


def test_what_it_keeps():
    logits, labels = inputs(torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        next_token_loss(logits, labels, VOCABULARY)
    assert [(x.shape, x.dtype) for x in saved] == [((40, VOCABULARY), torch.bfloat16)]


def test_tokens_that_cannot_be(rows):
    """A model may exclude tokens by logits of minus infinity; ignored labels point to the first of these tokens."""
    logits, labels = inputs()
    with torch.no_grad():
        logits[..., 0] = -torch.inf
    for mine, theirs in zip(
        both(next_token_loss, logits, labels.clamp(min=1)),
        both(ForCausalLMLoss, logits, labels.clamp(min=1)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)
    loss, gradient = both(next_token_loss, logits, torch.where(labels == 0, 1, labels))
    assert loss.isfinite() and gradient.isfinite().all()


def test_no_label_at_all_is_not_a_number_as_in_transformers():
    logits, labels = inputs()
    assert next_token_loss(logits, torch.full_like(labels, -100), VOCABULARY).isnan()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_with_that_loss_use_it_in_default_loss_alone(monkeypatch, name):
    calls = []
    original = token_loss.next_token_loss
    monkeypatch.setattr(token_loss, "next_token_loss", lambda *a, **k: calls.append(1) or original(*a, **k))
    model, batches, _ = CASES[name]()
    expected = model.eval()(**batches[0]).loss
    assert calls == []
    got = default_loss(model, batches[0])
    assert calls == [1] and "_loss_function" not in vars(model)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    (by_rows,) = torch.autograd.grad(got, model.get_output_embeddings().weight)
    (its,) = torch.autograd.grad(expected, model.get_output_embeddings().weight)
    torch.testing.assert_close(by_rows, its, rtol=1e-4, atol=1e-7)


def test_any_other_loss_is_left_alone():
    model, batches, _ = llama()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.pow(2).mean()
    expected = model(**batches[0]).loss
    with loss_by_rows(model):
        assert torch.equal(model(**batches[0]).loss, expected)
    assert "_loss_function" in vars(model)
    for name in ("classifier", "t5"):
        other, batches, _ = CASES[name]()
        expected = other.eval()(**batches[0]).loss
        with loss_by_rows(other):
            assert torch.equal(other(**batches[0]).loss, expected)


def test_without_gradients_it_is_transformers(rows):
    logits, labels = inputs()
    with torch.no_grad():
        assert torch.equal(next_token_loss(logits, labels, VOCABULARY), ForCausalLMLoss(logits, labels, VOCABULARY))


def test_a_second_derivative_is_refused():
    logits, labels = inputs()
    loss = next_token_loss(logits, labels, VOCABULARY) ** 2
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
