"""A state saved in the middle of a start continues it to the bit; one that does not fit is refused."""

import copy
import io

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_one
from lora_one.errors import CheckpointError, ModelError
from tests.backends.torch.deferred.runs import Run, begun, same
from tests.backends.torch.models import causal_batches, classifier, llama, mlp

STEPS, END = 4, 8  # of the start, and of the training


def through_a_file(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_runs(one: Run, other: Run) -> None:
    assert same(one.model, other.model)
    assert one.report.to_dict() == other.report.to_dict()


@pytest.mark.parametrize("precondition", [False, True])
@pytest.mark.parametrize("make", [mlp, classifier])
@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])
def test_a_saved_state_continues_to_the_bit(make, precondition, at):
    options = {"start_steps": STEPS, "precondition": precondition, "weight_decay": 0.1}
    run, again = begun(make, **options), begun(make, **options)
    run.train(0, at)
    model, state = through_a_file((run.model.state_dict(), run.optimizer.state_dict()))
    run.train(at, END)
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(state)
    assert again.report.steps == min(at, STEPS)
    again.train(at, END)
    assert_equal_runs(run, again)


def test_what_was_read_of_narrow_factors_is_not_rounded_with_them():
    """torch.optim casts a loaded state to the parameter's dtype."""
    runs = [begun(llama, start_steps=STEPS) for _ in range(2)]
    for run in runs:
        run.model.to(torch.bfloat16)
    runs[0].train(0, 2)
    model, state = through_a_file((runs[0].model.state_dict(), runs[0].optimizer.state_dict()))
    runs[0].train(2, END)
    runs[1].model.load_state_dict(model)
    runs[1].optimizer.load_state_dict(state)
    assert runs[1].optimizer.state[runs[1].pairs[0].lora_A]["start_s"].dtype == torch.float32
    runs[1].train(2, END)
    assert_equal_runs(*runs)


@pytest.mark.parametrize("way", ["pickle", "deepcopy"])
@pytest.mark.parametrize("at", [0, 2, 6])
def test_the_optimizer_as_a_whole_continues_to_the_bit(way, at):
    run = begun(start_steps=STEPS, precondition=True)
    run.train(0, at)
    if way == "pickle":
        file = io.BytesIO()
        torch.save((run.model, run.optimizer), file)
        file.seek(0)
        model, optimizer = torch.load(file, weights_only=False)
    else:
        model, optimizer = copy.deepcopy((run.model, run.optimizer))
    again = run._replace(model=model, optimizer=optimizer, report=optimizer._start.plan.report)
    run.train(at, END)
    again.train(at, END)
    assert_equal_runs(run, again)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("at", [1, 3, 6])
def test_torchs_distributed_checkpoints_continue_to_the_bit(flat, at):
    """It makes the state of a new optimizer by a step of zero gradients, which is none of the start's."""
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    run, again = (begun(classifier, start_steps=STEPS) for _ in range(2))
    run.train(0, at)
    model = through_a_file(run.model.state_dict())
    state = through_a_file(get_optimizer_state_dict(run.model, run.optimizer, options=options))
    run.train(at, END)
    again.model.load_state_dict(model)
    set_optimizer_state_dict(again.model, again.optimizer, state, options=options)
    assert again.optimizer.param_groups[0]["lr"] == 1e-2
    again.train(at, END)
    assert_equal_runs(run, again)


def trainer(out, steps: int, **options) -> tuple[Trainer, lora_one.DeferredReport]:
    torch.manual_seed(0)
    model, report = lora_one.init(llama().model, config=lora_one.Config(rank=4, dropout=0.1))
    rows = [{key: value[i] for key, value in batch.items()} for batch in causal_batches(4) for i in range(4)]
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_steps=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    optimizer = lora_one.optimizer(model, 1e-2, 0.01, start_steps=5, **options)
    return Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, None)), report


@pytest.mark.parametrize("options", [{}, {"precondition": True, "reg": 1e-2}])
def test_the_trainer_continues_from_its_checkpoint_to_the_bit(tmp_path, options):
    whole, report = trainer(tmp_path / "whole", 8, **options)
    whole.train()
    assert report.steps == 5 and report.done
    first, _ = trainer(tmp_path / "part", 8, **options)
    first.add_callback(StopAt(3))
    first.train()
    resumed, report_of_resumed = trainer(tmp_path / "part", 8, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-3"))
    assert same(whole.model, resumed.model)
    assert report.to_dict() == report_of_resumed.to_dict()


class StopAt(TrainerCallback):
    """Ends a training early, as a cut off one ends."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def plain_run() -> Run:
    run = begun(start_steps=0)
    run.train(0, 2)
    return run


def in_the_middle(make=mlp, **options) -> Run:
    run = begun(make, start_steps=STEPS, **options)
    run.train(0, 2)
    return run


def wider(rank: int = 4, **options) -> Run:
    """A run of a model with as many parameters as `mlp`, of other shapes."""

    def make():
        case = mlp()
        case.model.up = torch.nn.Linear(12, 32)
        case.model.shared = torch.nn.Linear(32, 32, bias=False)
        case.model.down = torch.nn.Linear(32, 10)
        return case

    return begun(make, config=lora_one.Config(rank=rank), **options)


REFUSED = {
    "no start into one": (plain_run, in_the_middle, "one that made none: make this one with start_steps=0"),
    "a start into none": (in_the_middle, plain_run, "after 2 steps of it, but this optimizer makes none"),
    "a start into none but a preconditioner": (
        in_the_middle,
        lambda: begun(start_steps=0, precondition=True),
        "after 2 steps of it, but this optimizer makes none",
    ),
    "other layers": (lambda: in_the_middle(llama), in_the_middle, r"groups of \[6\] are expected, got \[28\]"),
    "other shapes": (in_the_middle, lambda: wider(start_steps=STEPS), "another model\n  - parameter 1: exp_avg"),
    "another rank": (
        in_the_middle,
        lambda: wider(rank=5, start_steps=STEPS),
        r"start_s of shape \(5,\) is expected, got \(4,\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_does_not_fit_is_refused_and_nothing_changes(name):
    make_saved, make_loading, match = REFUSED[name]
    saved, run = make_saved(), make_loading()
    before = copy.deepcopy(run.optimizer.state_dict())
    factors = [p.detach().clone() for p in run.model.parameters()]
    report = run.report.to_dict()
    with pytest.raises(CheckpointError, match=match):
        run.optimizer.load_state_dict(saved.optimizer.state_dict())
    after = run.optimizer.state_dict()
    assert str(before) == str(after) and report == run.report.to_dict()
    assert all(torch.equal(x, y) for x, y in zip(factors, run.model.parameters(), strict=True))


def test_a_state_in_mid_start_needs_the_factors_that_were_saved_with_it():
    state = in_the_middle().optimizer.state_dict()
    run = begun(start_steps=STEPS)
    run.optimizer.load_state_dict(state)
    run.backward(2)
    with pytest.raises(ModelError, match="lora_B is zero in up, shared, down: load the model's weights"):
        run.optimizer.step()
    assert run.report.steps == 2


def test_factors_in_mid_start_need_the_state_that_was_saved_with_them():
    saved = in_the_middle().model.state_dict()
    run = begun(start_steps=STEPS)
    run.model.load_state_dict(saved)
    run.backward(2)
    with pytest.raises(ModelError, match="weights were loaded without this optimizer's state"):
        run.optimizer.step()
    with pytest.raises(ModelError, match=r"in 3 layers: up, shared, down; .* make the optimizer before the factors"):
        lora_one.optimizer(run.model)


def test_the_state_of_a_start_that_is_made_continues_without_one():
    """The start's steps are over, so that any AdamW may go on, also one of an adapter that was loaded."""
    run, again = begun(start_steps=2), begun(start_steps=0)
    run.train(0, 4)
    again.model.load_state_dict(run.model.state_dict())
    again.optimizer.load_state_dict(through_a_file(run.optimizer.state_dict()))
    run.train(4, END)
    again.train(4, END)
    assert same(run.model, again.model)


def test_a_state_without_what_its_start_has_read_is_refused():
    saved = in_the_middle().optimizer.state_dict()
    with pytest.raises(CheckpointError, match="must have what the 2 steps of LoRA-One's start have read, got nothing"):
        in_the_middle().optimizer.load_state_dict({**saved, "state": {}})
