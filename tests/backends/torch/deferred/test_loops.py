"""The start in the training loops of others: scalers, closures, compilers, accelerate and data parallel runs."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import lora_one
from lora_one.errors import ConfigError
from tests.backends.torch.deferred.runs import begun, same
from tests.backends.torch.models import causal_batches, llama, mlp, squared_error
from tests.backends.torch.spawning import in_processes

STEPS = 3


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("clip", [False, True])
def test_a_gradient_scaler_unscales_and_the_steps_that_it_skips_do_not_count(fused, clip):
    run, plain = begun(start_steps=STEPS, fused=fused), begun(start_steps=STEPS, fused=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    counted = []
    for i, finite in enumerate([True, False, True, True, True, False, True]):
        assert run.optimizer._step_supports_amp_scaling == (fused is True and run.report.done)
        loss = run.case.loss_fn(run.model, run.case.batches[i % 3])
        scaler.scale(loss if finite else loss * float("inf")).backward()
        if clip:
            scaler.unscale_(run.optimizer)
            nn.utils.clip_grad_norm_(parameters, 1e6)
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
        counted.append(run.report.steps)
        if finite:
            plain.train(i, i + 1)
    assert counted == [1, 1, 2, 3, 3, 3, 3]
    for x, y in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_closure_is_called_once_a_step_before_its_gradients_are_read():
    run, plain = begun(start_steps=STEPS), begun(start_steps=STEPS)
    losses = []

    def closure():
        run.optimizer.zero_grad()
        losses.append(run.backward(len(losses)).item())
        return losses[-1]

    assert [run.optimizer.step(closure) for _ in range(5)] == losses
    plain.train(0, 5)
    assert same(run.model, plain.model)


def test_a_compiled_model_is_compiled_once():
    run, plain = begun(start_steps=STEPS), begun(start_steps=STEPS)
    counter = CompileCounter()
    model = torch.compile(run.model, backend=counter)
    counts = []
    for i in range(6):
        squared_error(model, run.case.batches[i % 3]).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        counts.append(counter.frame_count)
    plain.train(0, 6)
    assert counts == [counts[0]] * 6 and counts[0] > 0
    for x, y in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precondition", [False, True])
def test_a_step_compiles_as_one_graph_after_the_start(precondition):
    run, plain = (begun(start_steps=STEPS, precondition=precondition, fused=False) for _ in range(2))
    for each in (run, plain):
        each.optimizer.param_groups[0]["foreach"] = True
        each.train(0, STEPS)
    counter = CompileCounter()
    compiled = torch.compile(run.optimizer.step, backend=counter, fullgraph=True)
    counts = []
    for i in range(STEPS, STEPS + 3):
        run.backward(i)
        compiled()
        run.optimizer.zero_grad()
        counts.append(counter.frame_count)
    plain.train(STEPS, STEPS + 3)
    assert counts[1:] == [counts[1]] * 2
    for x, y in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_step_compiled_from_the_beginning_makes_the_start_too():
    run, plain = (begun(start_steps=STEPS, fused=False) for _ in range(2))
    compiled = torch.compile(run.optimizer.step, backend="eager")
    for i in range(5):
        run.backward(i)
        compiled()
        run.optimizer.zero_grad()
    plain.train(0, 5)
    assert run.report.to_dict() == plain.report.to_dict()
    for x, y in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_a_cuda_graph_is_refused_until_the_start_is_made(monkeypatch):
    run = begun(start_steps=STEPS)
    run.optimizer.param_groups[0]["capturable"] = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capturing in (False, False, True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        run.backward(0)
        expected = pytest.raises(ConfigError, match="take these before the capture") if capturing else None
        with expected or contextlib.nullcontext():
            run.optimizer.step()
    assert run.report.steps == STEPS
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    run.optimizer._check_capture()


def test_accelerate_prepares_it_and_its_checkpoints_continue_to_the_bit(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = begun(llama, start_steps=STEPS)
    plain.train(0, 6)

    def prepared():
        run = begun(llama, start_steps=STEPS)
        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(run.model, run.optimizer)
        return run, accelerator, model, optimizer

    def train(accelerator, model, optimizer, case, first, last):
        for i in range(first, last):
            accelerator.backward(model(**case.batches[i % 2]).loss)
            optimizer.step()
            optimizer.zero_grad()

    run, accelerator, model, optimizer = prepared()
    train(accelerator, model, optimizer, run.case, 0, 2)
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, run.case, 2, 6)
    assert same(run.model, plain.model) and run.report.to_dict() == plain.report.to_dict()
    again, accelerator, model, optimizer = prepared()
    accelerator.load_state(str(tmp_path))
    assert again.report.steps == 2
    train(accelerator, model, optimizer, again.case, 2, 6)
    assert same(again.model, plain.model) and again.report.to_dict() == plain.report.to_dict()


@pytest.mark.feature("Gradient accumulation")
def test_the_trainer_makes_the_start_that_a_plain_loop_makes(tmp_path):
    run = begun(llama, start_steps=STEPS)
    plain = begun(llama, start_steps=STEPS)
    rows = [{key: value[i] for key, value in batch.items()} for batch in causal_batches(6) for i in range(4)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
    )
    Trainer(run.model, arguments, train_dataset=rows, optimizers=(run.optimizer, None)).train()
    # Its batches are two micro-batches of two rows; those of `causal_batches` are the same four rows.
    plain = plain._replace(case=plain.case._replace(batches=causal_batches(6)))
    plain.train(0, 5)
    assert run.report.done and run.report.steps == STEPS
    for one, other in zip(run.report.layers, plain.report.layers, strict=True):
        np.testing.assert_allclose(one.singular_values, other.singular_values, atol=1e-4)
    for x, y in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-4)


def of_process(rank: int) -> tuple[int, list[np.ndarray]]:
    run = begun(mlp, torch.float64, start_steps=STEPS)
    model = DistributedDataParallel(run.model)
    for i in range(6):
        x, y = run.case.batches[i % 3]
        squared_error(model, (x[rank::2], y[rank::2])).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.report.steps, [factor.detach().numpy() for pair in run.pairs for factor in pair]


def test_two_processes_make_the_start_of_one():
    (steps, one), (_, other) = in_processes(of_process)
    run = begun(mlp, torch.float64, start_steps=STEPS)
    run.train(0, 6)
    assert steps == run.report.steps == STEPS
    for x, y, factor in zip(one, other, (factor for pair in run.pairs for factor in pair), strict=True):
        np.testing.assert_array_equal(x, y)
        np.testing.assert_allclose(x, factor.detach().numpy(), atol=1e-9)


def test_hooks_run_once_a_step_during_and_after_the_start():
    run = begun(start_steps=STEPS)
    calls = []
    run.optimizer.register_step_post_hook(lambda *_: calls.append(run.report.steps))
    run.train(0, 5)
    assert calls == [1, 2, 3, 3, 3]


def test_a_deep_copied_model_is_asked_for_its_start_by_its_own_optimizer():
    run = begun(start_steps=STEPS)
    model = copy.deepcopy(run.model)
    again = run._replace(model=model, optimizer=lora_one.optimizer(model, 1e-2, start_steps=STEPS))
    run.train(0, 5)
    again.train(0, 5)
    assert same(run.model, model)
