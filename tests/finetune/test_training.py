"""Training as people run it: the same settings give the same losses on every framework."""

import json

import numpy as np
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

from lora_one.errors import ConfigError, DataError, ModelError
from lora_one.finetune import preparation
from lora_one.finetune.data import Example
from lora_one.finetune.job import finetune
from lora_one.finetune.recipe import Recipe, make_recipe
from lora_one.finetune.tuners.torch import trainer as torch_trainer
from tests.finetune.recipes.standins import make_t5
from tests.finetune.test_fit import make_folder
from tests.finetune.tuners.test_all import Diary


def marked(backend, *names):
    return pytest.param(backend, marks=[pytest.mark.feature(name, backend) for name in names])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one layer; 9 examples of unequal lengths, and 3 that are held out."""
    path = make_folder(tmp_path_factory.mktemp("model"), eos_token="</s>")
    rows = [
        {
            "prompt": " ".join(f"w{(3 * i + j) % 50}" for j in range(2 + i % 4)),
            "completion": " ".join(["w5"] * (1 + i % 3)),
        }
        for i in range(12)
    ]
    for name, part in (("train", rows[:9]), ("valid", rows[9:])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return path


# Every step sees all examples, so that their order does not matter, in several micro-batches of unequal size.
WHOLE = {
    "batch_size": 3,
    "accumulation": 3,
    "init_batches": 3,
    "rank": 2,
    "targets": ["q_proj"],
    "learning_rate": 0.3,
    "weight_decay": 0.1,
    "max_grad_norm": 0.05,
    "schedule": "cosine",
    "warmup": 2,
    "steps": 12,
    "eval_every": 2,
    "keep_best": True,
    "early_stopping": 2,
    "gradient_checkpointing": True,
}


def trained(folder, out, **settings):
    diary = Diary()
    paths = {"model": str(folder), "data": str(folder), "out": str(out), "device": "cpu"}
    return finetune(make_recipe({**paths, **settings}), diary), diary


def metrics(out, name):
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if name in line}


@pytest.fixture(scope="module")
def reference(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("torch") / "out"
    return (*trained(folder, out, backend="torch", **WHOLE), out)


@pytest.mark.feature("Evaluation while training", "torch")
@pytest.mark.feature("Best checkpoint", "torch")
@pytest.mark.feature("Early stopping", "torch")
def test_the_best_step_is_kept_and_the_training_ends_when_nothing_gets_better(reference):
    outcome, diary, out = reference
    measured = metrics(out, "eval_loss")
    losses = [loss for step, loss in measured.items() if step > 0]
    best = losses.index(min(losses))
    assert 0 < best < 4  # neither the first nor, after two more, the last of six
    assert list(measured) == [0, *range(2, 2 * len(losses) + 1, 2)]
    assert len(outcome.losses) == 2 * (best + 1 + 2)
    assert metrics(out, "loss") == dict(enumerate(outcome.losses, start=1))
    assert {f"at step {step}": loss for step, loss in measured.items() if step} == {
        when: loss for when, loss in diary.validations.items() if when.startswith("at")
    }
    assert diary.validations["after"] == min(losses) < diary.validations["before"]


@pytest.mark.parametrize(
    "backend",
    [
        marked(name, "Evaluation while training", "Best checkpoint", "Early stopping", "Gradient accumulation", *more)
        for name, more in (("jax", ["Learning-rate schedules"]), ("mlx", ["Learning-rate schedules"]))
    ],
)
def test_every_loss_is_torchs(backend, folder, reference, tmp_path):
    """Accumulation over tokens, clipping, weight decay, warm-up, schedule, checkpointing, evaluation: all at once."""
    outcome, diary = trained(folder, tmp_path / "out", backend=backend, **WHOLE)
    assert outcome.losses == pytest.approx(reference[0].losses, rel=2e-4)
    assert diary.validations == pytest.approx(reference[1].validations, rel=2e-4)


@pytest.mark.parametrize("backend", ["torch", "mlx"])
def test_a_run_that_stopped_early_trains_nothing_when_it_is_resumed(backend, folder, tmp_path):
    """Its last step has a checkpoint, which holds the best step's arrays."""
    rough = {"learning_rate": 1.0, "schedule": "constant", "eval_every": 1, "early_stopping": 1, "plain": True}
    settings = {**WHOLE, **rough, "backend": backend, "save_every": 100}
    outcome, diary = trained(folder, tmp_path, **settings)
    assert 1 < len(outcome.losses) < 12
    adapter = (tmp_path / "adapter_model.safetensors").read_bytes()
    again, same = trained(folder, tmp_path, **settings, resume=True)
    assert again.resumed == len(again.losses) == len(outcome.losses)
    assert again.losses == outcome.losses
    assert same.validations == diary.validations
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == adapter


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedules_are_transformers(schedule, warmup):
    from lora_one.finetune.tuners import jax
    from lora_one.finetune.tuners.mlx import tuner as mlx

    recipe = Recipe(schedule=schedule, warmup=warmup, steps=10, learning_rate=0.5)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    name = torch_trainer.training_arguments(recipe, on_cpu=True).lr_scheduler_type
    scheduler = transformers.get_scheduler(name, adamw, warmup, 10)
    expected = []
    for _ in range(10):
        expected.append(scheduler.get_last_lr()[0])
        scheduler.step()
    for rate in (jax._schedule(recipe), mlx._schedule(recipe)):
        assert [float(np.asarray(rate(step))) for step in range(10)] == pytest.approx(expected, abs=1e-7)


def test_the_gradient_that_mlx_takes_a_step_with_is_clipped():
    import mlx.core as mx

    from lora_one.finetune.tuners.mlx.training import clipped

    class Spy:
        def update(self, model, gradients):
            self.gradients = gradients

    gradients = {"a": mx.array([3.0, 0.0]), "b": mx.array([[4.0]])}
    for norm, scale in ((1.0, 0.2), (10.0, 1.0), (0.0, 1.0)):
        spy = Spy()
        clipped(spy, norm).update(None, gradients)
        assert np.array(spy.gradients["a"])[0] == pytest.approx(3.0 * scale, rel=1e-5)
        assert np.array(spy.gradients["b"])[0, 0] == pytest.approx(4.0 * scale, rel=1e-5)


def test_activations_that_mlx_computes_again_have_no_dropout(folder, tmp_path):
    """mx.checkpoint draws other zeros the second time: the gradient would be that of another loss."""
    settings = {**SHORT, "gradient_checkpointing": True, "dropout": 0.1}
    with pytest.raises(ConfigError, match="gradient_checkpointing with dropout needs the backend torch or jax"):
        trained(folder, tmp_path, backend="mlx", **settings)


SHORT = {"steps": 4, "batch_size": 3, "init_batches": 1, "rank": 2, "targets": ["q_proj"], "warmup": 0, "plain": True}


def test_a_share_of_the_data_is_held_out_and_packed_rows_are_trained_on(folder, tmp_path):
    data = {"data": str(folder / "train.jsonl"), "valid_share": 0.3, "packing": True, "max_length": 12}
    outcome, diary = trained(folder, tmp_path / "a", **{**SHORT, **data, "eval_every": 3})
    assert list(diary.validations) == ["before", "at step 3", "at step 4", "after"]
    assert diary.validations["after"] == diary.validations["at step 4"]
    assert len(outcome.losses) == 4
    same, _ = trained(folder, tmp_path / "b", **{**SHORT, **data})
    assert same.losses == outcome.losses  # a measurement changes nothing
    with pytest.raises(ConfigError, match="eval_every needs held-out data: give valid, valid_share, or a folder"):
        trained(folder, tmp_path / "c", **{**SHORT, "data": data["data"], "eval_every": 1})


def test_rows_that_are_cut_or_left_out_are_counted(folder, tmp_path):
    """Prompts have 2 to 5 tokens, completions 1 to 3 and the end."""
    _, diary = trained(folder, tmp_path, **{**SHORT, "steps": 1, "max_length": 4})
    assert diary.warnings == [
        "4 of 9 examples are longer than max_length 4: they are cut",
        "4 of 9 examples have a prompt that fills max_length: they are left out",
        "1 of 3 held-out examples are longer than max_length 4: they are cut",
        "2 of 3 held-out examples have a prompt that fills max_length: they are left out",
    ]


@pytest.mark.parametrize("backend", ["torch", "jax", "mlx"])
def test_pictures_without_a_model_that_reads_them(backend, folder, tmp_path, monkeypatch):
    seen = Example("w1", "w2", "set, row 3", pictures=list)
    monkeypatch.setattr(preparation, "open_examples", lambda data: [seen])
    with pytest.raises(
        DataError, match=r"^set, row 3: pictures need a model of images and text, with the backend torch"
    ):
        trained(folder, tmp_path, backend=backend, **SHORT)


class Tracker(transformers.TrainerCallback):
    logs: list

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((state.global_step, dict(logs)))


@pytest.mark.feature("Trackers", "torch")
def test_tensorboard_shows_the_losses_of_the_run(folder, tmp_path):
    out = tmp_path / "adapter"
    outcome, diary = trained(folder, out, **SHORT, eval_every=2, report_to=["tensorboard"])
    [file] = (out / "runs").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file)).Reload()
    shown = {name: {x.step: x.value for x in events.Scalars(name)} for name in ("train/loss", "eval/loss")}
    assert shown["train/loss"] == pytest.approx(dict(enumerate(outcome.losses, start=1)), rel=1e-6)
    assert shown["eval/loss"] == pytest.approx({x: diary.validations[f"at step {x}"] for x in (2, 4)}, rel=1e-6)


def test_trackers_are_the_trainers(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(Tracker, "logs", [], raising=False)
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "wandb", Tracker)
    settings = {**SHORT, "eval_every": 2, "report_to": ["wandb"], "schedule": "constant", "learning_rate": 0.25}
    with pytest.raises(ConfigError, match=r"report_to must name trackers that are installed here .*, got wandb"):
        trained(folder, tmp_path, **settings)
    monkeypatch.setattr(torch_trainer, "get_available_reporting_integrations", lambda: ["wandb"])
    outcome, diary = trained(folder, tmp_path, **settings)
    logged = {name: {step: logs[name] for step, logs in Tracker.logs if name in logs} for name in ("loss", "eval_loss")}
    assert logged["loss"] == dict(enumerate(outcome.losses, start=1))
    assert logged["eval_loss"] == {step: diary.validations[f"at step {step}"] for step in (2, 4)}
    assert [logs["learning_rate"] for _, logs in Tracker.logs if "loss" in logs] == [0.25] * 4


@pytest.mark.parametrize(
    "backend", [pytest.param(x, marks=pytest.mark.feature("Trackers", x, refused=True)) for x in ("jax", "mlx")]
)
def test_without_a_trainer_there_are_no_trackers(backend):
    with pytest.raises(ConfigError, match=r"report_to needs the backend torch so far, .* \(metrics.jsonl in out has"):
        Recipe(backend=backend, report_to=["wandb"])


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_other_kinds_of_models_and_data_are_refused_by_name(backend, folder, tmp_path):
    make_t5(tmp_path / "t5")
    with pytest.raises(ModelError, match="t5"):
        trained(tmp_path / "t5", tmp_path / "out", **SHORT, data=str(folder), backend=backend)
