"""Models in torch.compile and DataParallel have the plain model's names, layers and numbers in every function."""

import peft
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.errors import GradientError, ModelError
from tests.backends.torch.models import llama, mlp

CONFIG = lora_one.Config(rank=2, gradient="exact")
CONFIG_OF_MLP = lora_one.Config(rank=2, targets=["up", "shared", "down"])
OURS = dict(r=2, lora_alpha=16.0, use_rslora=True)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def compiled_blocks(model: nn.Module) -> nn.Module:
    layers = (model.get_base_model() if isinstance(model, peft.PeftModel) else model).model.layers
    for index, block in enumerate(layers):
        layers[index] = compiled(block)
    return model


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def both(model: nn.Module) -> nn.Module:
    return parallel(compiled(compiled_blocks(model)))


WRAPS = [compiled, compiled_in_place, compiled_blocks, parallel, both]


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**llama().batches[0]).logits


@pytest.fixture(autouse=True)
def without_the_compiler():
    """The compiler takes seconds for each model, for the same numbers."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(scope="module")
def plain():
    model, report = lora_one.init(llama().model, llama().batches, config=CONFIG)
    return report, logits(model)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_model_gets_what_the_plain_one_gets(wrap, plain, tmp_path):
    expected, right = plain
    model, report = lora_one.init(wrap(llama().model), llama().batches, config=CONFIG)
    assert [layer.name for layer in report.layers] == [layer.name for layer in expected.layers]
    assert report.base_loss == pytest.approx(expected.base_loss, abs=1e-6)
    assert torch.allclose(logits(model), right, atol=1e-6)
    lora_one.save(model, tmp_path, report)
    assert torch.allclose(logits(lora_one.load(llama().model, tmp_path)), right, atol=1e-6)
    assert torch.allclose(logits(peft.PeftModel.from_pretrained(llama().model, tmp_path)), right, atol=1e-6)
    assert torch.allclose(logits(lora_one.load(wrap(llama().model), tmp_path)), right, atol=1e-6)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_wrapped_adapter_is_started_trained_saved_and_merged(wrap, plain, tmp_path):
    """It was wrapped after it got its LoRA: `init` returns what it was given."""
    inner = attach_plain(llama().model, CONFIG)
    model = wrap(inner)
    names = [name for name, _ in model.named_modules()]
    started, _ = lora_one.init(model, llama().batches, config=CONFIG)
    assert started is model and [name for name, _ in model.named_modules()] == names
    assert torch.allclose(logits(model), plain[1], atol=1e-6)

    adamw = lora_one.optimizer(model, learning_rate=1e-2)
    model.train()(**llama().batches[0]).loss.backward()
    adamw.step()
    trained = logits(model)
    assert not torch.allclose(trained, plain[1], atol=1e-3)
    lora_one.save(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names
    assert torch.allclose(logits(lora_one.load(llama().model, tmp_path)), trained, atol=1e-6)
    fresh = wrap(attach_plain(llama().model, CONFIG))
    assert lora_one.load(fresh, tmp_path) is fresh
    assert torch.allclose(logits(fresh), trained, atol=1e-6)
    assert torch.allclose(logits(lora_one.merge(model)), trained, atol=1e-5)


@pytest.mark.parametrize("wrap", WRAPS)
def test_a_failing_init_leaves_the_wrappers(wrap):
    model = wrap(llama().model)
    modules = dict(model.named_modules())
    with pytest.raises(GradientError):
        lora_one.init(model, llama().batches, lambda m, b: m(**b).loss * float("nan"), CONFIG)
    assert dict(model.named_modules()) == modules


def test_peft_that_was_given_a_compiled_model_saves_plain_names(tmp_path):
    model = peft.get_peft_model(compiled(llama().model), peft.LoraConfig(**OURS, target_modules="all-linear"))
    model, report = lora_one.init(model, llama().batches)
    lora_one.save(model, tmp_path)
    assert not any("_orig_mod" in layer.name for layer in report.layers)
    layers = [layer for layer in report.layers if layer.name != "lm_head"]  # PEFT takes that one for a target, too
    assert len(layers) == 14
    opened = peft.PeftModel.from_pretrained(llama().model, tmp_path)
    assert torch.allclose(logits(opened), logits(model), atol=1e-6)


def test_a_compiled_layer_that_is_a_target_itself():
    base = llama().model
    base.model.layers[0].mlp.up_proj = compiled(base.model.layers[0].mlp.up_proj)
    _, report = lora_one.init(base, llama().batches, config=CONFIG)
    assert "model.layers.0.mlp.up_proj" in [layer.name for layer in report.layers]
    assert hasattr(base.model.layers[0].mlp.up_proj, "lora_A")


def test_passes_run_without_the_compiler_and_what_was_compiled_sees_the_start():
    """Compiling a graph for each kind of pass would cost more than the pass."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    case = mlp()
    with torch.compiler.set_stance("default"):
        model = torch.compile(case.model, backend=backend)
        before = model(case.batches[0][0])
        assert len(graphs) == 1
        started, _ = lora_one.init(model, case.batches, case.loss_fn, CONFIG)
        assert len(graphs) == 1
        after = model(case.batches[0][0])
        assert len(graphs) > 1
    assert torch.allclose(after, started(case.batches[0][0]), atol=1e-6)
    assert not torch.allclose(after, before, atol=1e-4)


def test_wrappers_that_shard_or_that_would_miss_lora_are_refused():
    class FullyShardedDataParallel(nn.Module):  # what counts is its name: no process group here
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ModelError, match=r"is a FullyShardedDataParallel, which shards the weights .* before sharding"):
        lora_one.init(FullyShardedDataParallel(llama().model), llama().batches)

    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ModelError, match=r"has an optimizer of its own: make lora_one.optimizer\(model\) before"):
        lora_one.optimizer(DeepSpeedEngine(attach_plain(mlp().model, CONFIG_OF_MLP)))

    class PipelineEngine(DeepSpeedEngine):
        pass

    with pytest.raises(ModelError, match=r"is a PipelineEngine, which shards the weights"):
        lora_one.init(PipelineEngine(llama().model), llama().batches)


@pytest.mark.parametrize("setting", [{"precondition": True}, {"loraplus_lr_ratio": 16.0}])
def test_settings_that_need_matrices_refuse_flat_factors(setting):
    """FSDP1 flattens the factors, so that a rate for lora_B would apply to none."""
    model = attach_plain(mlp().model, CONFIG_OF_MLP)
    for factor in (model.base_model.model.up.lora_A["default"], model.base_model.model.up.lora_B["default"]):
        factor.weight = nn.Parameter(factor.weight.detach().flatten())
    with pytest.raises(ModelError, match=r"needs the factors of each layer as matrices, got 2 flattened ones"):
        lora_one.optimizer(model, **setting)
    assert len(lora_one.optimizer(model).param_groups) == 1


def test_files_of_empty_tensors_are_not_written(tmp_path):
    """ZeRO-3 leaves no numbers in the modules."""
    model = attach_plain(mlp().model, CONFIG_OF_MLP)
    model.base_model.model.up.lora_B["default"].weight.data = torch.empty(0)
    with pytest.raises(ModelError, match=r"up.lora_B.weight: it holds no numbers, .* gather the weights"):
        lora_one.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_distributed_data_parallel(tmp_path):
    """Around the model it is unwrapped; around a part it would not average LoRA's gradients."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        case = mlp()
        model, report = lora_one.init(DistributedDataParallel(case.model), case.batches, case.loss_fn, CONFIG)
        assert [layer.name for layer in report.layers] == ["up", "shared", "down"]
        started = DistributedDataParallel(model)
        again, _ = lora_one.init(started, case.batches, case.loss_fn, CONFIG)
        assert again is started
        lora_one.save(started, tmp_path / "adapter")
        opened = lora_one.load(mlp().model, tmp_path / "adapter")
        x = case.batches[0][0]
        assert torch.allclose(opened(x), started(x), atol=1e-6)
        whole = nn.Sequential(DistributedDataParallel(mlp().model))
        with pytest.raises(ModelError, match=r"0 is in DistributedDataParallel, .* wrap it after init or load"):
            lora_one.init(whole, case.batches, case.loss_fn, CONFIG)
    finally:
        torch.distributed.destroy_process_group()
