"""Models that already have an adapter but are not a PeftModel: injected layers, and a base model given again."""

import copy
import warnings

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.errors import AdapterWarning, CheckpointError, GradientError, ModelError
from tests.backends.torch.models import llama, mlp, squared_error

CONFIG = lora_one.Config(rank=4, gradient="exact")
LORA = dict(r=4, lora_alpha=16, use_rslora=True, target_modules=["q_proj", "down_proj"])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**llama().batches[0]).logits


def nan_loss(model, batch):
    return model(**batch).loss * float("nan")


def tables(model: torch.nn.Module) -> dict:
    """The settings that PEFT's layers and their configuration hold."""
    said = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, (dict, list)) and key not in ("_parameters", "_buffers"):
                said[name, key] = copy.copy(value)
    return said


@pytest.mark.parametrize("other", [{"rank": 2}, {"rank": 4, "alpha": 3.0}, {"targets": ("q_proj",), "dropout": 0.5}])
@pytest.mark.parametrize("ours", [True, False])
def test_a_second_call_that_fails_leaves_the_first_adapter(ours, other):
    base = llama().model
    first = (
        lora_one.init(base, llama().batches, config=CONFIG)[0]
        if ours
        else peft.get_peft_model(base, peft.LoraConfig(**LORA))
    )
    said, before = tables(first), logits(first)
    first.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        with pytest.raises(GradientError if ours else ModelError):
            lora_one.init(base, llama().batches, nan_loss, lora_one.Config(**other))
    assert first.training and tables(first) == said
    assert torch.equal(logits(first), before)


CALLS = {
    "init": lambda model, folder: lora_one.init(model, llama().batches, config=CONFIG),
    "load": lambda model, folder: lora_one.load(model, folder),
    "attach_plain": lambda model, folder: attach_plain(model, CONFIG),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_warning_points_at_the_users_line(call, tmp_path):
    base = llama().model
    lora_one.save(attach_plain(base, CONFIG), tmp_path)
    with pytest.warns(AdapterWarning) as records:
        CALLS[call](base, tmp_path)
    assert [(record.filename, record.lineno) for record in records if record.category is AdapterWarning] == [
        (__file__, CALLS[call].__code__.co_firstlineno)
    ]


def test_a_second_call_is_as_on_a_plain_model():
    """This is a notebook's cell that runs twice, with another rank."""
    base = llama().model
    first, _ = lora_one.init(base, llama().batches, config=CONFIG)
    other = lora_one.Config(rank=2, alpha=8.0, gradient="exact")
    with pytest.warns(AdapterWarning, match="the model that this call returned loses it"):
        second, report = lora_one.init(base, llama().batches, config=other)
    alone, expected = lora_one.init(llama().model, llama().batches, config=other)
    assert torch.equal(logits(second), logits(alone)) and report.base_loss == expected.base_loss
    assert second.peft_config["default"].r == 2
    with pytest.raises(ModelError, match="has been given another adapter since"):
        lora_one.init(first, llama().batches, config=CONFIG)


def test_load_and_attach_plain_onto_a_base_that_has_an_adapter(tmp_path):
    model, _ = lora_one.init(llama().model, llama().batches, config=lora_one.Config(rank=2, gradient="exact"))
    lora_one.save(model, tmp_path)
    base = llama().model
    first, _ = lora_one.init(base, llama().batches, config=CONFIG)
    with pytest.warns(AdapterWarning):
        second = lora_one.load(base, tmp_path)
    assert torch.allclose(logits(second), logits(model), atol=1e-6)
    with pytest.raises(ModelError, match="another adapter since"):
        lora_one.save(first, tmp_path)
    with pytest.warns(AdapterWarning):
        third = attach_plain(base, CONFIG)
    assert torch.equal(logits(third), logits(llama().model))
    before = logits(third)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AdapterWarning)
        with pytest.raises(ModelError, match="targets must match"):
            attach_plain(base, lora_one.Config(targets=("nowhere",)))
    assert torch.equal(logits(third), before)
    lora_one.save(third, tmp_path)


def test_a_base_whose_first_adapter_is_merged_is_refused():
    base = llama().model
    first, _ = lora_one.init(base, llama().batches, config=CONFIG)
    first.merge_adapter()
    with pytest.raises(ModelError, match="merged into the base weight; call unmerge_adapter"):
        lora_one.init(base, llama().batches, config=lora_one.Config(rank=2))
    first.unmerge_adapter()


def injected_by_peft(model):
    return peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model)


def injected_by_transformers(model):
    with pytest.MonkeyPatch.context() as patch:  # transformers asks for the newest PEFT, and needs nothing of it
        patch.setattr("transformers.integrations.peft.check_peft_version", lambda min_version: None)
        model.add_adapter(peft.LoraConfig(**LORA), "mine")
    return model


def wrapped_by_peft(model):
    """The base model of a PeftModel, given instead of the PeftModel."""
    peft.get_peft_model(model, peft.LoraConfig(**LORA))
    return model


@pytest.mark.feature("Merging adopted layers")
@pytest.mark.parametrize("inject", [injected_by_peft, injected_by_transformers, wrapped_by_peft])
def test_injected_layers_are_started_trained_saved_and_merged(inject, tmp_path):
    """They behave as the layers of a PeftModel, with the same numbers."""
    model = inject(llama().model)
    modules = dict(model.named_modules())
    started, report = lora_one.init(model, llama().batches, config=CONFIG)
    assert started is model and dict(model.named_modules()) == modules
    reference = peft.get_peft_model(llama().model, peft.LoraConfig(**LORA))
    reference, expected = lora_one.init(reference, llama().batches, config=CONFIG)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert torch.equal(logits(model), logits(reference))

    for each in (model, reference):
        each.train()
        adamw = lora_one.optimizer(each, learning_rate=1e-2)
        each(**llama().batches[0]).loss.backward()
        adamw.step()
    trained = logits(model)
    assert torch.equal(trained, logits(reference))

    lora_one.save(model, tmp_path, report)
    assert torch.allclose(logits(lora_one.load(llama().model, tmp_path)), trained, atol=1e-6)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(llama().model, tmp_path)), trained, atol=1e-6)
    fresh = inject(llama().model)
    assert lora_one.load(fresh, tmp_path) is fresh
    assert torch.allclose(logits(fresh), trained, atol=1e-6)

    merged = lora_one.merge(model)
    assert merged is model and [n for n, _ in merged.named_parameters()] == [
        n for n, _ in llama().model.named_parameters()
    ]
    assert torch.allclose(logits(merged), trained, atol=1e-5)
    lora_one.init(merged, llama().batches, config=CONFIG)


def test_an_injected_adapter_keeps_its_own_settings_and_its_factors_on_failure():
    model = injected_by_peft(llama().model)
    with pytest.raises(ModelError, match=r"rank 2 \(the adapter's: 4\)"):
        lora_one.init(model, llama().batches, config=lora_one.Config(rank=2))
    with pytest.raises(ModelError, match=r"expected, got one that has \['default'\] already"):
        attach_plain(model, CONFIG)
    said, before = tables(model), logits(model)
    with pytest.raises(GradientError):
        lora_one.init(model, llama().batches, nan_loss, CONFIG)
    assert tables(model) == said and torch.equal(logits(model), before)


def test_a_folder_that_does_not_fit_injected_layers(tmp_path):
    model, _ = lora_one.init(llama().model, llama().batches, config=lora_one.Config(rank=2, targets=("q_proj",)))
    lora_one.save(model, tmp_path)
    model = injected_by_peft(llama().model)
    with pytest.raises(CheckpointError, match="the model has rank 4, the file 2"):
        lora_one.load(model, tmp_path)


@pytest.mark.parametrize("call", [lora_one.init, lora_one.save, lora_one.load, lora_one.merge])
def test_an_adapter_in_a_part_of_the_model_names_the_part(call, tmp_path):
    """The user's own module is around a PeftModel, or around injected layers."""
    case = mlp()
    for part, where in (
        (peft.get_peft_model(case.model, peft.LoraConfig(target_modules=["up"])), "'0.base_model"),
        (peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["up"]), mlp().model), "'0'"),
    ):
        whole = torch.nn.Sequential(part)
        arguments = {lora_one.init: (case.batches, squared_error), lora_one.merge: ()}.get(call, (tmp_path,))
        if call is lora_one.load:
            lora_one.save(part, tmp_path)
        with pytest.raises(ModelError, match=f"hand in the module that has it, {where}"):
            call(whole, *arguments)


def test_injected_adapters_that_are_no_lora():
    model = peft.inject_adapter_in_model(peft.IA3Config(target_modules=["up"], feedforward_modules=[]), mlp().model)
    with pytest.raises(ModelError, match="that is LoRA, got IA3"):
        lora_one.init(model, mlp().batches, squared_error)


def test_of_several_injected_adapters_the_active_one_is_meant(tmp_path):
    model = injected_by_peft(llama().model)
    peft.inject_adapter_in_model(peft.LoraConfig(**LORA), model, "second")
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter("second")
    before = {name: p.clone() for name, p in model.named_parameters() if ".default." in name}
    started, report = lora_one.init(model, llama().batches, config=CONFIG)
    alone, _ = lora_one.init(injected_by_peft(llama().model), llama().batches, config=CONFIG)
    assert torch.equal(logits(started), logits(alone))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in before.items())
    lora_one.save(started, tmp_path, report)
    assert torch.allclose(logits(lora_one.load(llama().model, tmp_path)), logits(alone), atol=1e-6)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(["default", "second"])
    with pytest.raises(ModelError, match="one active adapter is expected"):
        lora_one.init(model, llama().batches, config=CONFIG)


def test_a_leftover_that_changed_the_base_itself_is_refused(tmp_path):
    """Biases that were trained in place, and layers that PEFT replicated, stay when the adapter is removed."""
    torch.manual_seed(0)
    for more in ({"bias": "all"}, {"layer_replication": [[0, 2], [1, 2]]}):
        trained = peft.get_peft_model(llama().model, peft.LoraConfig(**LORA, **more))
        lora_one.save(trained, tmp_path)
        base = llama().model
        first = lora_one.load(base, tmp_path)
        before = logits(first)
        for again in (lambda base: lora_one.load(base, tmp_path), lambda base: attach_plain(base, CONFIG)):
            with pytest.raises(ModelError, match=f"{next(iter(more))}=.* changed the base model itself"):
                again(base)
        assert torch.equal(logits(first), before)


@pytest.mark.parametrize("call", ["save", "load", "merge"])
def test_adapters_that_are_no_lora_are_called_what_they_are(call, tmp_path):
    lora_one.save(attach_plain(mlp().model, lora_one.Config(rank=2, targets=("up",))), tmp_path)
    arguments = () if call == "merge" else (tmp_path,)
    model = peft.get_peft_model(mlp().model, peft.AdaLoraConfig(target_modules=["up"], total_step=10))
    with pytest.raises(ModelError, match=f"{call} needs an adapter that is LoRA, got AdaLoRA"):
        getattr(lora_one, call)(model, *arguments)
    assert isinstance(lora_one.optimizer(model), torch.optim.AdamW)  # which needs no pairs
    prompted = peft.get_peft_model(llama().model, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ModelError, match=f"{call} needs an adapter that is LoRA, got PROMPT_TUNING"):
        getattr(lora_one, call)(prompted, *arguments)


def test_weights_without_numbers_are_not_saved(tmp_path):
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(target_modules=["up"]), low_cpu_mem_usage=True)
    with pytest.raises(ModelError, match=r"up\.lora_A\.weight: it holds no numbers, as low_cpu_mem_usage=True makes"):
        lora_one.save(model, tmp_path / "new")
    assert not any((tmp_path / "new").glob("*"))
