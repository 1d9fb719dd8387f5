"""The callback and the optimizer of the Trainer, in one process: what it gets is what one would get by hand."""

import copy
import random
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch.nn import functional
from transformers import BertForSequenceClassification, Trainer

import lora_one
from lora_one.checkpoint.metadata import read_report
from lora_one.errors import BatchError, ConfigError, ModelError
from lora_one.integrations.transformers import LoraOneCallback, optimizer
from tests.backends.torch.models import bert_config, llama, tokens

from .trainers import (
    BATCH,
    EXACT,
    SAMPLES,
    Recorder,
    Recording,
    adapted,
    arguments,
    assert_equal,
    factors,
    losses,
    products,
    rows,
)

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "trainers.md"
COUNT = SAMPLES // BATCH  # batches that the start reads


def trained(out, callback: bool = True, model=None, kind=Recording, options=None, resume=None, **settings):
    """Train; return the trainer, with `start` and `recorder`."""
    args = arguments(out, **settings)
    factory = {} if options is None else {"optimizer_cls_and_kwargs": optimizer(args, **options)}
    trainer = kind(adapted() if model is None else model, args, train_dataset=rows(), **factory)
    trainer.start, trainer.recorder = LoraOneCallback(trainer, EXACT, SAMPLES), Recorder()
    for each in [trainer.start] * callback + [trainer.recorder]:
        trainer.add_callback(each)
    torch.manual_seed(1)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without the callback."""
    return trained(tmp_path_factory.mktemp("plain"), callback=False)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("started"))


def summed_loss(model, batch):
    targets = batch["labels"][:, 1:]
    return functional.cross_entropy(model(batch["input_ids"]).logits[:, :-1].mT, targets, reduction="sum")


def test_the_start_and_the_losses_are_those_of_a_loop_by_hand(plain, started):
    model, batches = adapted(), plain.batches[:COUNT]
    items = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    _, report = lora_one.init(model, batches, lambda *x: summed_loss(*x) * COUNT / items, EXACT)
    assert_equal(products(started.recorder.factors), products(factors(model)), 1e-5)
    assert started.start.report.batches == report.batches == COUNT
    assert started.start.report.base_loss == pytest.approx(report.base_loss, rel=1e-6)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    expected = []
    for batch in plain.batches:
        loss = model.train()(**batch).loss
        loss.backward()
        adamw.step()
        adamw.zero_grad()
        expected.append(float(loss))
    np.testing.assert_allclose(losses(started), expected, rtol=1e-6)
    assert_equal(products(factors(started.model)), products(factors(model)), 1e-4)


def test_training_sees_the_batches_and_random_numbers_of_a_run_without_it(plain, started):
    for with_it, without in zip(started.batches, plain.batches, strict=True):
        assert all(torch.equal(with_it[key], x) for key, x in without.items())
    for with_it, without in zip(started.recorder.random_numbers, plain.recorder.random_numbers, strict=True):
        assert np.array_equal(with_it, without)
    assert started.recorder.loaders == plain.recorder.loaders == 1
    assert len(started.accelerator._dataloaders) == len(plain.accelerator._dataloaders)


def weighted(outputs, labels, num_items_in_batch=None):
    loss = functional.cross_entropy(outputs.logits[:, :-1].mT, labels[:, 1:], reduction="sum")
    return 3.0 * loss / num_items_in_batch


class OwnLoss(Recording):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs.pop("labels")  # as some do
        loss = model(**inputs).logits.square().mean()
        return loss if num_items_in_batch is None else loss / self.current_gradient_accumulation_steps


LOSSES = {
    "the model's": {},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "items of each process": {"average_tokens_across_devices": False},
    "compute_loss_func": {"kind": lambda *x, **y: Recording(*x, compute_loss_func=weighted, **y)},
    "compute_loss": {"kind": OwnLoss},
    "bfloat16": {"bf16": True},
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_of_the_start_is_the_trainers_of_one_accumulated_step(tmp_path, name):
    """The Trainer's first logged loss is that of the base model, since lora_B is zero."""
    run = trained(tmp_path, callback=False, gradient_accumulation_steps=COUNT, max_steps=1, **LOSSES[name])
    start = trained(tmp_path, max_steps=1, **LOSSES[name]).start
    assert start.report.base_loss == pytest.approx(losses(run)[0], rel=1e-6)


def test_a_model_without_items_starts_by_the_mean_of_its_batches(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(BertForSequenceClassification(bert_config()), peft.LoraConfig(r=3, task_type="SEQ_CLS"))
    data = [{"input_ids": x, "labels": torch.tensor(i % 3)} for i, x in enumerate(tokens(0, rows=12))]
    for steps, callback in ((3, False), (1, True)):
        args = arguments(tmp_path, max_steps=1, gradient_accumulation_steps=steps)
        trainer = Trainer(copy.deepcopy(model).eval(), args, train_dataset=data)
        start = LoraOneCallback(trainer, EXACT, samples=100)  # more than there are
        if callback:
            trainer.add_callback(start)
        trainer.model.train = lambda mode=True, model=trainer.model: model  # no dropout
        trainer.train()
        if not callback:
            expected = losses(trainer)[0]
    assert start.report.batches == 3
    assert start.report.base_loss == pytest.approx(expected, rel=1e-6)


OPTIMIZERS = {
    "AdamW": None,
    "LoRA+": {"loraplus_lr_ratio": 4.0},
    "preconditioned": {"precondition": True, "reg": 1e-2},
    "first steps": {"start_steps": 4},
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path, name):
    """The callback keeps the factors of the checkpoint; dropout, schedule and clipping go on."""
    settings = {
        "options": OPTIMIZERS[name],
        "callback": name != "first steps",
        "save_strategy": "steps",
        "save_steps": 3,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 0.5,
        "weight_decay": 0.01,
        "gradient_accumulation_steps": 2,
    }
    whole = trained(tmp_path / "whole", model=adapted(lora_dropout=0.1), **settings)
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    resumed = trained(tmp_path / "resumed", model=adapted(lora_dropout=0.1), resume=checkpoint, **settings)
    assert_equal(factors(resumed.model), factors(whole.model), 0.0)
    assert losses(resumed) == losses(whole)
    assert resumed.start.report is None
    assert (whole.start.report is None) == (name == "first steps")


@pytest.mark.parametrize("name", [name for name, options in OPTIMIZERS.items() if options is not None])
def test_the_factorys_optimizer_is_that_of_lora_one(tmp_path, name):
    run = trained(tmp_path, callback=False, options=OPTIMIZERS[name], weight_decay=0.1)
    model = adapted()
    args = arguments(tmp_path, weight_decay=0.1)
    own = lora_one.optimizer(model, args.learning_rate, 0.1, **OPTIMIZERS[name])
    trainer = Trainer(model, args, train_dataset=rows(), optimizers=(own, None))
    torch.manual_seed(1)
    trainer.train()
    assert_equal(factors(run.model), factors(model), 0.0)
    assert type(run.optimizer.optimizer) is type(own)


def test_the_factory_lets_what_the_trainer_lets_go_without_decay(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(BertForSequenceClassification(bert_config()), peft.LoraConfig(r=3, task_type="SEQ_CLS"))
    args = arguments(tmp_path, weight_decay=0.1, learning_rate=1e-3, adam_beta1=0.8, adam_epsilon=1e-7)
    made = [
        Trainer(model, args, optimizer_cls_and_kwargs=factory).create_optimizer()
        for factory in (None, optimizer(args, loraplus_lr_ratio=4.0), optimizer(args, learning_rate=2e-3))
    ]
    names = {id(p): name for name, p in model.named_parameters()}
    decays, betas, rates = (
        [{names[id(p)]: group[key] for group in each.param_groups for p in group["params"]} for each in made]
        for key in ("weight_decay", "betas", "lr")
    )
    assert decays[1] == decays[0] and set(decays[0].values()) == {0.0, 0.1}
    assert betas[1] == betas[0]
    assert {name: rate for name, rate in rates[1].items() if rate != 1e-3} == {
        name: 4e-3 for name in rates[0] if "lora_B" in name
    }
    assert set(rates[2].values()) == {2e-3}


def test_it_keeps_factors_that_are_started(tmp_path, started):
    model = adapted()
    lora_one.init(model, started.batches[:2], config=EXACT)
    before = factors(model)
    run = trained(tmp_path, model=model, max_steps=1)
    assert run.start.report is None
    assert_equal(run.recorder.factors, before, 0.0)
    run.train()  # once more
    assert run.start.report is None


def test_it_gives_back_the_random_numbers_of_a_loader_that_draws_some(tmp_path):
    def collate(batch):
        random.random(), np.random.rand(), torch.rand(())
        return {key: torch.stack([row[key] for row in batch]) for key in batch[0]}

    states = []
    for callback in (False, True):
        run = Trainer(adapted(), arguments(tmp_path, max_steps=1), train_dataset=rows(), data_collator=collate)
        if callback:
            run.add_callback(LoraOneCallback(run, EXACT))
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        run.train()
        states.append((random.random(), np.random.rand(), float(torch.rand(()))))
    assert states[0] == states[1]


def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.add_callback\(LoraOneCallback\(trainer\)\)"):
        LoraOneCallback(EXACT)
    with pytest.raises(ConfigError, match="samples must be an integer >= 1, got 0"):
        LoraOneCallback(Trainer(adapted(), arguments(tmp_path)), samples=0)
    with pytest.raises(
        ModelError, match=r"must have LoRA before training begins, got a LlamaForCausalLM.*peft_config="
    ):
        trained(tmp_path, model=llama().model)
    with pytest.raises(ModelError, match="leave out the callback, or"):
        trained(tmp_path, model=lora_one.init(llama().model)[0], options={})
    trainer = Trainer(adapted(), arguments(tmp_path), train_dataset=rows())
    trainer.add_callback(LoraOneCallback(trainer))
    trainer.get_batch_samples = lambda *x: ([], None)
    with pytest.raises(BatchError, match="got none"):
        trainer.train()


def test_the_page_runs_as_it_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), scope)
    assert "28 layers, 1 pass over 8 batches" in capsys.readouterr().out
    assert scope["trainer"].optimizer.param_groups[0]["start_done"]
    assert read_report(tmp_path / "out" / "adapter").batches == 8
