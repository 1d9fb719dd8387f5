"""Everything that can be wrong: a clear error, and the model as it was."""

import dataclasses
import itertools

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import attach_align_device_hook
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import lora_one
from lora_one.errors import BackendError, BatchError, ConfigError, GradientError, LoraOneError, ModelError
from tests.backends.torch.models import llama, mlp, squared_error

GRADIENTS = [
    pytest.param(lora_one.Config(rank=4, gradient="exact"), id="exact"),
    pytest.param(lora_one.Config(rank=4), id="sketch"),
]


@pytest.fixture(params=GRADIENTS)
def config(request):
    return request.param


def state_of(model: nn.Module) -> dict:
    """Everything that a failed `init` could leave behind."""
    modules = list(model.named_modules())
    return {
        "modules": [(name, id(module), sorted(vars(module))) for name, module in modules],
        "training": [module.training for _, module in modules],
        "hooks": [[dict(v) for k, v in sorted(vars(m).items()) if k.endswith("_hooks")] for _, m in modules],
        "requires_grad": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "gradients": [p.grad for p in model.parameters()],
        "values": [v.clone() for v in model.state_dict().values()],
        "use_cache": getattr(getattr(model, "config", None), "use_cache", None),
    }


def assert_unchanged(model: nn.Module, before: dict) -> None:
    after = state_of(model)
    values = zip(before.pop("values"), after.pop("values"), strict=True)
    assert all(torch.equal(x, y) for x, y in values)
    assert after == before


def fails(model, batches, loss_fn, config, error, match):
    model.train()
    next(model.modules()).training = True
    list(model.modules())[-1].training = False  # a module with a mode of its own
    before = state_of(model)
    with pytest.raises(error, match=match):
        lora_one.init(model, batches, loss_fn, config)
    assert_unchanged(model, before)


@pytest.mark.parametrize("make", [mlp, llama])
def test_non_finite_loss_names_the_batch(make, config):
    case = make()
    calls = itertools.count(1)

    def loss_fn(model, batch):
        loss = case.loss_fn(model, batch) if case.loss_fn else model(**batch).loss
        return loss * float("nan") if next(calls) == 2 else loss

    fails(case.model, case.batches, loss_fn, config, GradientError, "batch 2: the loss must be finite, got nan")


def test_non_finite_gradient_names_the_layer(config):
    case = mlp()

    def loss_fn(model, batch):
        out = model(batch[0])
        return (out * 0).abs().sqrt().mean() + out.pow(2).mean()  # finite, with an infinite slope

    fails(
        case.model, case.batches, loss_fn, config, GradientError, "layer '(up|shared|down)': its gradient .* not finite"
    )


def test_one_shot_iterator_is_an_error_only_where_it_is_read_more_than_once():
    case = mlp()
    for passes in (4, "auto"):
        several = lora_one.Config(rank=4, passes=passes)
        message = f"read {2 if passes == 'auto' else passes} times, got a generator that can be read once: pass a list"
        fails(case.model, (b for b in case.batches), case.loss_fn, several, BatchError, message)
    exact = lora_one.Config(rank=4, gradient="exact")
    again = dataclasses.replace(exact, gamma="auto")
    fails(case.model, iter(case.batches), case.loss_fn, again, BatchError, "read 2 times, got a list_iterator")
    lora_one.init(case.model, (b for b in case.batches), case.loss_fn, exact)


@pytest.mark.parametrize(("batches", "match"), [([], "at least one batch, got none"), (7, "must be iterable, got int")])
def test_no_batches(batches, match, config):
    fails(mlp().model, batches, squared_error, config, BatchError, match)


def test_rank_above_a_layers_size_names_the_layer(config):
    big = dataclasses.replace(config, rank=11)
    fails(mlp().model, mlp().batches, squared_error, big, ModelError, r"layer 'down': rank must be <= .* = 10, got 11")


@pytest.mark.parametrize("targets", [["nowhere"], "no.*where", ("q_projj",)])
def test_target_that_matches_nothing_lists_what_there_is(targets, config):
    config = dataclasses.replace(config, targets=targets)
    fails(
        llama().model,
        llama().batches,
        None,
        config,
        ModelError,
        r"targets must match .* model.layers.0.self_attn.q_proj",
    )


def test_target_that_is_no_linear_layer(config):
    config = dataclasses.replace(config, targets=["q_proj", "input_layernorm"])
    fails(
        llama().model,
        llama().batches,
        None,
        config,
        ModelError,
        "must be linear layers, embeddings or convolutions, got .*LlamaRMSNorm",
    )


@pytest.mark.parametrize(
    ("loss_fn", "match"),
    [
        (lambda model, batch: model(batch[0]), r"must be a scalar tensor, got shape \(16, 10\): return the mean"),
        (lambda model, batch: 1.0, "must be a scalar tensor, got float"),
        (lambda model, batch: model(batch[0]).mean().detach(), "must depend on the target layers"),
        (lambda model, batch: batch[0].mean(), "must depend on the target layers"),
    ],
)
def test_a_loss_that_no_gradient_can_be_had_from(loss_fn, match, config):
    fails(mlp().model, mlp().batches, loss_fn, config, BatchError, match)


def test_all_gradients_zero(config):
    def loss_fn(model, batch):
        return 0.0 * model(batch[0]).sum()

    fails(mlp().model, mlp().batches, loss_fn, config, BatchError, "no target layer has a gradient: got zero in all")


def test_default_loss_needs_a_mapping_with_labels(config):
    case = llama()
    unlabelled = [{"input_ids": batch["input_ids"]} for batch in case.batches]
    fails(
        case.model, unlabelled, None, config, BatchError, r"must return a loss, got none for a batch of \['input_ids'\]"
    )
    pairs = [(batch["input_ids"], batch["labels"]) for batch in case.batches]
    fails(case.model, pairs, None, config, BatchError, "a batch must be a mapping .* got tuple")


def test_the_users_own_exception_passes_through(config):
    class Mine(Exception):
        pass

    def loss_fn(model, batch):
        raise Mine("from loss_fn")

    fails(llama().model, llama().batches, loss_fn, config, Mine, "from loss_fn")

    def batches():
        yield mlp().batches[0]
        raise Mine("from batches")

    fails(mlp().model, Repeat(batches), squared_error, config, Mine, "from batches")


class Repeat:
    def __init__(self, make):
        self.__iter__ = make
        self.make = make

    def __iter__(self):
        return self.make()


def test_failure_on_a_peft_model_keeps_its_factors(config):
    """This also holds after the new factors were assigned: gamma="auto" fails in its forward pass."""
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up", "down"]))
    for p in model.parameters():
        torch.nn.init.normal_(p)

    def loss_fn(model, batch):
        if not torch.is_grad_enabled():
            raise RuntimeError("the last pass")
        return squared_error(model, batch)

    auto = dataclasses.replace(config, gamma="auto")
    fails(model, mlp().batches, loss_fn, auto, RuntimeError, "the last pass")


def test_model_that_had_its_own_hooks_and_frozen_weights_keeps_them(config):
    case = mlp()
    case.model.up.requires_grad_(False)
    case.model.down.register_forward_hook(lambda *_: None)
    case.model.shared.register_full_backward_hook(lambda *_: None)
    case.model.down.weight.grad = torch.ones_like(case.model.down.weight)
    bad = [*case.batches[:1], (case.batches[0][0] * float("inf"), case.batches[0][1])]
    model = case.model
    before = state_of(model)
    with pytest.raises(GradientError):
        lora_one.init(model, bad, case.loss_fn, config)
    gradients = before.pop("gradients")
    assert all(x is y for x, y in zip(gradients, state_of(model).pop("gradients"), strict=True))
    after = state_of(model)
    after.pop("gradients")
    assert all(torch.equal(x, y) for x, y in zip(before.pop("values"), after.pop("values"), strict=True))
    assert after == before


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"lora_bias": True}, "up: a bias in lora_B; attach LoRA without lora_bias"),
        ({"alora_invocation_tokens": [3]}, "up: activated LoRA, .* without alora_invocation_tokens"),
    ],
)
def test_adapters_whose_start_is_another_problem(change, match, config):
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up"], **change))
    fails(model, mlp().batches, squared_error, config, ModelError, match)


def test_disabled_merged_and_foreign_adapters(config):
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(r=4, target_modules=["up"]))
    model.base_model.disable_adapter_layers()
    fails(
        model, mlp().batches, squared_error, config, ModelError, r"up: disabled; call model.enable_adapter_layers\(\)"
    )
    model.base_model.enable_adapter_layers()
    model.merge_adapter()
    fails(
        model,
        mlp().batches,
        squared_error,
        config,
        ModelError,
        r"up: merged into the base weight; call model.unmerge_adapter\(\)",
    )
    other = peft.get_peft_model(mlp().model, peft.IA3Config(target_modules=["up"], feedforward_modules=[]))
    fails(
        other,
        mlp().batches,
        squared_error,
        config,
        ModelError,
        "init needs an adapter that is LoRA, got IA3: .* hand in the base model without it",
    )
    adaptive = peft.AdaLoraConfig(target_modules=["up"], total_step=10)
    adaptive = peft.get_peft_model(mlp().model, adaptive)
    fails(adaptive, mlp().batches, squared_error, config, ModelError, "that is LoRA, got AdaLoRA, which has singular")


def test_weights_that_hold_no_numbers_say_where_they_come_from(config):
    lora = peft.LoraConfig(r=4, target_modules=["up"])
    model = peft.get_peft_model(mlp().model, lora, low_cpu_mem_usage=True)
    with pytest.raises(ModelError, match="up: LoRA weights that hold no numbers, as low_cpu_mem_usage=True makes them"):
        lora_one.init(model, mlp().batches, squared_error, config)


def test_a_head_smaller_than_the_rank_speaks_of_modules_to_save():
    """ViT has such a head, and PEFT has no class for its task."""
    vision = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = ViTForImageClassification(ViTConfig(**vision, image_size=16, patch_size=8, num_labels=3))
    batch = {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 2])}
    with pytest.raises(ModelError, match=r"'classifier': .* = 3, got 8; .*modules_to_save=\['classifier'\]"):
        lora_one.init(model, [batch], config=lora_one.Config(rank=8))
    started, report = lora_one.init(model, [batch], config=lora_one.Config(rank=8, modules_to_save=["classifier"]))
    assert started.base_model.model.classifier.modules_to_save["default"].weight.requires_grad
    assert "classifier" not in [layer.name for layer in report.layers]


def test_a_target_that_is_offloaded(config):
    """PEFT puts its LoRA weights on "meta", where a start would be lost. Other layers may be offloaded."""
    case = llama()
    attach_align_device_hook(case.model.model.layers[1], execution_device="cpu", offload=True)
    before = {name: p.device.type for name, p in case.model.named_parameters()}
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.down_proj: offloaded, .*; load the model where it fits"):
        lora_one.init(case.model, case.batches, None, config)
    assert {name: p.device.type for name, p in case.model.named_parameters()} == before
    cpu_offload(case.model.model.embed_tokens, execution_device=torch.device("cpu"))
    first = dataclasses.replace(config, targets=r".*layers\.0\.mlp\..*_proj")
    model, _ = lora_one.init(case.model, case.batches, None, first)
    expected, _ = lora_one.init(llama().model, case.batches, None, first)
    for (name, got), factor in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        if "lora_" in name:
            torch.testing.assert_close(got, factor)


def test_config_that_contradicts_an_adapter(config):
    model = peft.get_peft_model(mlp().model, peft.LoraConfig(r=6, lora_alpha=12, target_modules=["up"]))
    asked = dataclasses.replace(config, alpha=20.0, targets=["down"])
    message = r"rank 4 \(the adapter's: 6\); alpha 20.0 \(the adapter's: 12\); targets"
    fails(model, mlp().batches, squared_error, asked, ModelError, message)


def test_models_of_no_backend():
    with pytest.raises(BackendError, match=r"one of the frameworks torch.*, got builtins.dict"):
        lora_one.init({}, [])
    with pytest.raises(BackendError, match="backend 'numpy' does not fit the model"):
        lora_one.init(mlp().model, [], backend="numpy")
    with pytest.raises(BackendError, match=r"must be one of numpy, torch.*, got 'tensorflow'"):
        lora_one.init(mlp().model, [], backend="tensorflow")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"rank": 0}, "rank must be an integer >= 1, got 0"),
        ({"rank": 2.5}, "rank must be an integer"),
        ({"alpha": -1}, "alpha must be a number > 0, got -1"),
        ({"gamma": "best"}, "gamma must be a number > 0 or \"auto\", got 'best'"),
        ({"gamma": float("inf")}, "gamma must be a number"),
        ({"passes": 0}, 'passes must be an integer >= 1 or "auto", got 0'),
        ({"oversample": -1}, "oversample must be an integer >= 0"),
        ({"scale": "unit"}, "scale must be one of 'normalized', 'gradient', got 'unit'"),
        ({"gradient": "full"}, "gradient must be one of 'sketch', 'exact'"),
        ({"targets": []}, "targets must be"),
        ({"targets": "(("}, "targets must be a regular expression, got '\\(\\('"),
        ({"dropout": 1.0}, r"dropout must be a number in \[0, 1\), got 1.0"),
        ({"eta": 0}, "eta must be a number > 0"),
    ],
)
def test_config_is_validated_on_construction(values, match):
    with pytest.raises(ConfigError, match=match):
        lora_one.Config(**values)


def test_config_is_frozen_and_round_trips():
    config = lora_one.Config(targets=["a", "b"], gamma="auto")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3
    assert lora_one.Config.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="unknown settings ranks; known are rank"):
        lora_one.Config.from_dict({"ranks": 3})


def test_every_error_is_a_lora_one_error():
    kinds = [value for value in vars(lora_one.errors).values() if isinstance(value, type)]
    errors = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(errors) >= 7 and all(issubclass(kind, LoraOneError) for kind in errors)


def test_batches_that_change_between_passes_are_noticed():
    from lora_one.errors import ChangingBatchesWarning

    case = mlp()
    seeds = itertools.count()

    def batches():
        generator = torch.Generator().manual_seed(next(seeds))
        yield torch.randn(16, 12, generator=generator), torch.randn(16, 10, generator=generator)

    with pytest.warns(ChangingBatchesWarning, match="in pass 1 and .* in pass 2, expected the same"):
        lora_one.init(case.model, Repeat(batches), case.loss_fn, lora_one.Config(rank=4, passes=2))
