"""A new head that is trained as a whole beside the LoRA layers: `Config(modules_to_save=...)`."""

import copy
import re
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification as Auto
from transformers import BertForQuestionAnswering, BertForTokenClassification

import lora_one
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.errors import CheckpointError, ConfigError, ModelError
from tests.backends.torch.models import bert_config, classifier, mlp, squared_error, tokens

HEADS = Path(__file__).parents[4] / "docs" / "guide" / "new-heads.md"
CONFIG = lora_one.Config(rank=4, modules_to_save=("down",), gradient="exact")


def started(config: lora_one.Config = CONFIG):
    case = mlp()
    return case, *lora_one.init(copy.deepcopy(case.model), case.batches, case.loss_fn, config)


def output(case, model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(case.batches[0][0])


def take_steps(case, model, count: int = 3) -> None:
    model.train()
    optimizer = lora_one.optimizer(model, learning_rate=1e-2)
    for _ in range(count):
        for batch in case.batches:
            optimizer.zero_grad()
            squared_error(model, batch).backward()
            optimizer.step()


def test_the_head_gets_no_lora_and_the_layers_start_as_without_it():
    """The gradient of a layer does not depend on what else is trained."""
    case, model, report = started()
    assert [layer.name for layer in report.layers] == ["up", "shared"]
    config = lora_one.Config(rank=4, gradient="exact", targets=("up", "shared"))
    _, alone, _ = started(config)
    for ours, theirs in zip(find_sites(model), find_sites(alone), strict=True):
        assert torch.equal(ours.lora_A.weight, theirs.lora_A.weight)
        assert torch.equal(ours.lora_B.weight, theirs.lora_B.weight)
    assert torch.equal(output(case, model), output(case, alone))


def test_head_and_factors_are_trainable_and_nothing_else():
    _, model, _ = started()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert sum("modules_to_save" in name for name in names) == 2  # weight and bias
    assert len(names) == 2 + 4 and all("lora_" in name or "down.modules_to_save" in name for name in names)


def test_the_head_follows_torchs_adamw():
    """The optimizer's first step on the head is torch.optim.AdamW's on a copy of it."""
    case, model, _ = started()
    head = model.base_model.model.down.modules_to_save["default"]
    squared_error(model, case.batches[0]).backward()
    copied = [nn.Parameter(p.detach().clone()) for p in head.parameters()]
    for mine, theirs in zip(copied, head.parameters(), strict=True):
        mine.grad = theirs.grad.clone()
    torch.optim.AdamW(copied, lr=1e-2, weight_decay=0.0).step()
    lora_one.optimizer(model, learning_rate=1e-2).step()
    for mine, theirs in zip(copied, head.parameters(), strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-7)


@pytest.mark.feature("New heads (modules_to_save)")
def test_a_trained_head_is_saved_and_loaded_and_opens_in_peft(tmp_path):
    case, model, report = started()
    take_steps(case, model)
    expected = output(case, model)
    trained = model.base_model.model.down.modules_to_save["default"].weight
    assert (trained - case.model.down.weight).abs().max() > 1e-3
    lora_one.save(model, tmp_path, report)
    assert torch.equal(output(case, lora_one.load(copy.deepcopy(case.model), tmp_path)), expected)
    assert torch.equal(output(case, peft.PeftModel.from_pretrained(copy.deepcopy(case.model), str(tmp_path))), expected)
    fresh = started()[1]
    assert torch.equal(output(case, lora_one.load(fresh, tmp_path)), expected)
    assert torch.equal(case.model.down.weight, fresh.base_model.model.down.original_module.weight)


def test_a_head_that_only_one_side_has_is_an_error(tmp_path):
    """PEFT would ignore it without a message."""
    case, model, _ = started()
    plain = started(lora_one.Config(rank=4, targets=("up", "shared")))[1]
    lora_one.save(model, tmp_path / "with")
    lora_one.save(plain, tmp_path / "without")
    before = output(case, plain)
    with pytest.raises(CheckpointError, match=r"down\.weight: the file has it, the model has no such module to save"):
        lora_one.load(plain, tmp_path / "with")
    assert torch.equal(output(case, plain), before)
    with pytest.raises(CheckpointError, match=r"down\.bias: the model keeps it whole, the file has none"):
        lora_one.load(model, tmp_path / "without")


def test_merge_keeps_the_trained_head():
    case, model, _ = started()
    take_steps(case, model)
    expected, head = output(case, model), model.base_model.model.down.modules_to_save["default"].weight.detach().clone()
    merged = lora_one.merge(model)
    assert torch.equal(merged.down.weight, head)
    np.testing.assert_allclose(output(case, merged), expected, rtol=0, atol=1e-5)


def test_a_peft_model_keeps_its_own():
    case = mlp()
    config = peft.LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules=["up"], modules_to_save=["down"])
    model = peft.get_peft_model(copy.deepcopy(case.model), config)
    model, report = lora_one.init(model, case.batches, case.loss_fn, CONFIG)
    assert [layer.name for layer in report.layers] == ["up"]
    assert model.base_model.model.down.modules_to_save["default"].weight.requires_grad
    with pytest.raises(ModelError, match=r"modules_to_save \('shared',\) \(the adapter's: \('down',\)\)"):
        lora_one.init(model, case.batches, case.loss_fn, lora_one.Config(rank=4, modules_to_save=("shared",)))


def test_a_classifier_of_transformers_keeps_its_head_unasked():
    """PEFT knows the heads of transformers' sequence classifiers by name."""
    case = classifier()
    model, report = lora_one.init(case.model, case.batches, None, lora_one.Config(rank=4))
    assert model.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    assert not any(layer.name == "classifier" for layer in report.layers)


TASKS = {
    "classifier": (BertForTokenClassification, {"labels": tokens(1, vocabulary=6) - 3}),
    "qa_outputs": (
        BertForQuestionAnswering,
        {"start_positions": torch.tensor([1, 2, 3, 4]), "end_positions": torch.tensor([4, 5, 6, 9])},
    ),
}


@pytest.mark.parametrize("head", TASKS)
def test_heads_that_pefts_all_linear_takes_for_targets(head, tmp_path):
    """PEFT fails on them: `modules_to_save cannot be applied to modules of type ...Linear`."""
    make, labels = TASKS[head]
    torch.manual_seed(0)
    config = bert_config()
    config.num_labels = 3 if "labels" in labels else 2  # the beginning and the end of an answer
    base = make(config).eval()
    batch = {"input_ids": tokens(0), **labels}
    model, report = lora_one.init(copy.deepcopy(base), [batch], None, lora_one.Config(rank=4))
    assert len(report.layers) == 12 and not any(head in layer.name for layer in report.layers)
    trained = [name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name]
    assert trained == [f"base_model.model.{head}.modules_to_save.default.{kind}" for kind in ("weight", "bias")]
    lora_one.save(model, tmp_path)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    with torch.no_grad():
        for got, expected in zip(again(**batch).values(), model.eval()(**batch).values(), strict=True):
            torch.testing.assert_close(got, expected)


def test_names_that_the_model_does_not_have():
    case = mlp()
    before = dict(case.model.named_modules())
    with pytest.raises(ModelError, match=r"got \['haed'\]; at its top are: up, shared, down"):
        lora_one.init(case.model, case.batches, case.loss_fn, lora_one.Config(modules_to_save=("haed",)))
    assert dict(case.model.named_modules()) == before


def test_a_failing_init_takes_the_head_back():
    case = mlp()
    before, head = list(case.model.named_modules()), case.model.down

    def fails(model, batch):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        lora_one.init(case.model, case.batches, fails, CONFIG)
    assert list(case.model.named_modules()) == before and case.model.down is head
    assert all(parameter.requires_grad for parameter in case.model.parameters())


def test_one_name_is_not_a_sequence_of_letters():
    with pytest.raises(ConfigError, match="modules_to_save must be a list, got 'head'"):
        lora_one.Config(modules_to_save="head")


def test_the_documented_recipe(tmp_path, monkeypatch):
    """docs/guide/new-heads.md, word for word: the fit lowers the loss, and the adapter carries the head."""
    monkeypatch.chdir(tmp_path)
    case = classifier()
    case.model.bert.save_pretrained("encoder")
    batches = [{**batch, "labels": batch["labels"] + 5} for batch in case.batches]
    code = re.search(r"```python\n(.*?)```", HEADS.read_text(encoding="utf-8"), re.DOTALL)[1].replace("...\n", "")
    fit, rest = code.split("config = ")
    names = {"lora_one": lora_one, "torch": torch, "batches": batches, "AutoModelForSequenceClassification": Auto}
    exec(fit, names)
    with torch.no_grad():
        fitted = float(sum(names["model"].eval()(**batch).loss for batch in batches))
        untrained = Auto.from_pretrained("encoder", num_labels=16).eval()
        assert fitted < 0.8 * float(sum(untrained(**batch).loss for batch in batches))
        exec("config = " + rest, names)
        expected = names["model"].eval()(**batches[0]).logits
        again = lora_one.load(Auto.from_pretrained("encoder", num_labels=16), "adapter").eval()
        assert torch.equal(again(**batches[0]).logits, expected)
