import copy

import numpy as np
import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer

import lora_one
from lora_one.backends.torch import LoraOneAdamW
from lora_one.backends.torch.optimizer import lora_pairs
from lora_one.core import step
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError, ModelError
from tests.backends.torch.models import classifier, llama, mlp, squared_error

numpy_ops = lora_one.backends.load_backend("numpy").ops


def adapted(make=mlp, **config):
    case = make()
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, lora_one.Config(rank=4, **config))
    return model, case


def backward(model, case, i: int) -> None:
    batch = case.batches[i % len(case.batches)]
    loss = model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)
    loss.backward()


def float64(x) -> np.ndarray:
    return x.detach().double().numpy()


@pytest.mark.feature("Preconditioned steps")
@pytest.mark.parametrize("damping", ["absolute", "relative"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_the_spec_in_float64_numpy(damping, weight_decay):
    model, case = adapted()
    optimizer = lora_one.optimizer(model, 3e-3, weight_decay, precondition=True, reg=1e-2, damping=damping)
    assert isinstance(optimizer, LoraOneAdamW) and len(optimizer.pairs) == 3
    pairs = [Factors(*(float64(x) for x in pair)) for pair in optimizer.pairs]
    states = [step.start_pair(numpy_ops, pair) for pair in pairs]
    for i in range(10):
        backward(model, case, i)
        gradients = [Factors(*(float64(x.grad) for x in pair)) for pair in optimizer.pairs]
        optimizer.step()
        for j, gradient in enumerate(gradients):
            pairs[j], states[j] = step.adamw(
                numpy_ops, pairs[j], gradient, states[j], 3e-3, weight_decay=weight_decay, reg=1e-2, damping=damping
            )
            for got, expected in zip(optimizer.pairs[j], pairs[j], strict=True):
                np.testing.assert_allclose(float64(got), expected, atol=1e-6 * np.abs(expected).max() * (i + 1))
        optimizer.zero_grad()


def test_equals_pefts_riemannian_optimizer_over_torch_adamw():
    model, case = adapted(llama)
    other = copy.deepcopy(model)
    ours = lora_one.optimizer(model, 1e-3, 0.01, precondition=True, reg=1e-2)
    theirs = create_riemannian_optimizer(other, torch.optim.AdamW, lr=1e-3, reg=1e-2, weight_decay=0.01)
    for i in range(5):
        for net, optimizer in ((model, ours), (other, theirs)):
            backward(net, case, i)
            optimizer.step()
            optimizer.zero_grad()
    for (name, x), y in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6, msg=name)


def test_without_preconditioner_it_is_torch_adamw_itself():
    model, case = adapted()
    other = copy.deepcopy(model)
    ours = lora_one.optimizer(model, 1e-3, weight_decay=0.05)
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 1e-3, weight_decay=0.05, fused=True)
    for i in range(3):
        for net, optimizer in ((model, ours), (other, theirs)):
            backward(net, case, i)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("unscale", [True, False])
def test_mixed_precision_scales_and_clips_as_with_torchs_default(precondition, unscale):
    """A GradScaler skips a step that overflows. Lightning reads that attribute before it clips."""
    model, case = adapted()
    other = copy.deepcopy(model)
    ours = lora_one.optimizer(model, 1e-2, precondition=precondition, reg=1e-2)
    theirs = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], 1e-2, weight_decay=0.0)
    if precondition:
        theirs = LoraOneAdamW(theirs.param_groups, lora_pairs(other), reg=1e-2, lr=1e-2, weight_decay=0.0)
    assert not getattr(ours, "_step_supports_amp_scaling", False)
    for net, optimizer in ((model, ours), (other, theirs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        parameters = [p for p in net.parameters() if p.requires_grad]
        for i in range(5):
            loss = squared_error(net, case.batches[i % 3])
            scaler.scale(loss * float("inf") if i == 1 else loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(parameters, 0.01)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    for x, y in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_the_fused_kernel_is_the_default_where_there_is_one_and_asked_for_it_is_torchs():
    model, _ = adapted()
    assert lora_one.optimizer(model).param_groups[0]["fused"] is True
    assert lora_one.optimizer(model, fused=False).param_groups[0]["fused"] is False
    assert lora_one.optimizer(model, fused=True)._step_supports_amp_scaling
    model.extra = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))  # which it does not take
    assert lora_one.optimizer(model).param_groups[0]["fused"] is False


def test_gradients_are_left_as_the_backward_pass_made_them():
    model, case = adapted()
    optimizer = lora_one.optimizer(model, precondition=True)
    backward(model, case, 0)
    before = [p.grad.clone() for pair in optimizer.pairs for p in pair]
    optimizer.step()
    assert all(
        torch.equal(p.grad, g) for p, g in zip((p for pair in optimizer.pairs for p in pair), before, strict=True)
    )


@pytest.mark.feature("Resume")
def test_resume_is_bitwise_the_uninterrupted_run(tmp_path):
    model, case = adapted()
    optimizer = lora_one.optimizer(model, 1e-3, 0.01, precondition=True)

    def run(net, optimizer, first, last):
        for i in range(first, last):
            backward(net, case, i)
            optimizer.step()
            optimizer.zero_grad()

    run(model, optimizer, 0, 4)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(model, optimizer, 4, 8)

    again, _ = adapted()
    resumed = lora_one.optimizer(again, 1e-3, 0.01, precondition=True)
    saved = torch.load(tmp_path / "state.pt")
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    run(again, resumed, 4, 8)
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), again.parameters(), strict=True))


def test_parameters_of_no_pair_follow_plain_adamw():
    model, case = adapted(classifier)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert len(head) == 2  # the classifier's weight and bias, trained beside the adapter as in PEFT
    optimizer = lora_one.optimizer(model, 1e-2, precondition=True)
    copies = [torch.nn.Parameter(p.detach().clone()) for p in head]
    reference = torch.optim.AdamW(copies, 1e-2, weight_decay=0.0, fused=True)
    for i in range(3):
        backward(model, case, i)
        for p, q in zip(head, copies, strict=True):
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(head, copies, strict=True))


@pytest.mark.feature("LoRA+")
def test_loraplus_ratio_is_pefts():
    model, _ = adapted()
    ours = lora_one.optimizer(model, 1e-3, loraplus_lr_ratio=16.0)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16.0)

    def rates(optimizer):
        return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}

    assert rates(ours) == rates(theirs)
    assert len(lora_one.optimizer(model, 1e-3).param_groups) == 1  # each is a launch more


@pytest.mark.feature("Parameter groups")
def test_param_groups_take_their_parameters_out_of_the_rest():
    model, _ = adapted(classifier)
    head = [p for name, p in model.named_parameters() if p.requires_grad and "classifier" in name]
    optimizer = lora_one.optimizer(model, 1e-3, param_groups=[{"params": iter(head), "lr": 0.5, "weight_decay": 0.1}])
    assert [p is q for p, q in zip(optimizer.param_groups[0]["params"], head, strict=True)] == [True, True]
    assert optimizer.param_groups[0]["lr"] == 0.5 and optimizer.param_groups[0]["weight_decay"] == 0.1
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(every) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_closure_is_called_before_preconditioning():
    """PEFT's optimizer refuses closures, which would overwrite its gradients."""
    model, case = adapted()
    other = copy.deepcopy(model)
    ours, reference = (lora_one.optimizer(net, 1e-3, precondition=True) for net in (model, other))

    def closure():
        ours.zero_grad()
        loss = squared_error(model, case.batches[0])
        loss.backward()
        return loss

    loss = ours.step(closure)
    backward(other, case, 0)
    reference.step()
    assert loss.item() > 0
    assert all(torch.equal(x, y) for x, y in zip(model.parameters(), other.parameters(), strict=True))


def test_a_factor_that_is_frozen_is_left_alone_and_its_partner_still_trains():
    """LoRA-FA: only B trains. There is then no pair, and preconditioning is refused rather than skipped in silence."""
    model, _case = adapted()
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B" in name)
    with pytest.raises(ModelError, match="needs trainable LoRA layers"):
        lora_one.optimizer(model, precondition=True)
    assert isinstance(lora_one.optimizer(model), torch.optim.AdamW)


def test_layers_of_different_rank_and_dtype_step_together():
    lora_config = peft.LoraConfig(r=4, target_modules=["up", "down"], rank_pattern={"down": 2})
    model = peft.get_peft_model(mlp().model, lora_config)
    model.base_model.model.up.lora_A.default.to(torch.bfloat16)
    model.base_model.model.up.lora_B.default.to(torch.bfloat16)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    optimizer = lora_one.optimizer(model, 1e-2, precondition=True, reg=1e-2, fused=False)
    pairs = lora_pairs(model)
    before = [Factors(*(float64(x) for x in pair)) for pair in pairs]
    for pair in pairs:
        for p in pair:
            p.grad = torch.randn_like(p)
    optimizer.step()
    for pair, old in zip(pairs, before, strict=True):
        gradient = Factors(*(float64(p.grad) for p in pair))
        expected, _ = step.adamw(numpy_ops, old, gradient, step.start_pair(numpy_ops, old), 1e-2, reg=1e-2)
        tolerance = 0.02 if pair.lora_A.dtype == torch.bfloat16 else 1e-5
        for got, want in zip(pair, expected, strict=True):
            np.testing.assert_allclose(float64(got), want, atol=tolerance)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"reg": -1.0}, ConfigError, "reg must be >= 0"),
        ({"loraplus_lr_ratio": 0.0}, ConfigError, "loraplus_lr_ratio must be > 0, got 0.0"),
        ({"loraplus_lr_ratio": float("nan")}, ConfigError, "loraplus_lr_ratio must be > 0, got nan"),
        ({"damping": "none"}, ConfigError, 'must be "absolute" or "relative", got \'none\''),
    ],
)
def test_settings_that_cannot_be(options, error, match):
    with pytest.raises(error, match=match):
        lora_one.optimizer(adapted()[0], **options)


def test_nothing_to_train():
    model, _ = adapted()
    with pytest.raises(ModelError, match="got none: load the adapter with trainable=True"):
        lora_one.optimizer(model.requires_grad_(False))
    with pytest.raises(ModelError, match="needs trainable LoRA layers"):
        lora_one.optimizer(mlp().model, precondition=True)
