"""Layers that the forward pass never calls: where code reads LoRA's factors they start as usual, others are named."""

import copy
import dataclasses

import numpy as np
import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lora_one
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.errors import BatchError, ZeroGradientWarning
from tests.arrays import best_rank
from tests.backends.torch.test_init_errors import fails

RANK = 3
EXACT = lora_one.Config(rank=RANK, gradient="exact", targets=["up", "down"])
SKETCH = lora_one.Config(rank=RANK, passes=10, targets=["up", "down"])
SETTINGS = [pytest.param(EXACT, id="exact"), pytest.param(SKETCH, id="sketch")]
# Float32 holds eight orders of the spectrum's decay: an exact SVD and ten passes find them all.
TOLERANCE = 2e-4


class Mlp(nn.Module):
    """With `with_lora` the model reads the factors and never calls the layers, like the kernels of Unsloth and axolotl.

    Without it the model reads only W, like Liger's fused linear cross-entropy."""

    def __init__(self, fused: tuple[str, ...] = (), with_lora: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 10)
        self.fused, self.with_lora = fused, with_lora

    def forward(self, x: Tensor) -> Tensor:
        return self.apply_layer("down", torch.tanh(self.apply_layer("up", x)))

    def apply_layer(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        if name not in self.fused:
            return layer(x)
        if not hasattr(layer, "lora_A"):
            return functional.linear(x, layer.weight, layer.bias)
        base = layer.base_layer
        if not self.with_lora:
            return functional.linear(x, base.weight, base.bias)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        delta = (layer.scaling["default"] * (b @ a)).to(base.weight.dtype)
        return functional.linear(x, base.weight + delta, base.bias)


class Both(Mlp):
    """A model that calls each layer once, and reads its factors once."""

    def forward(self, x: Tensor) -> Tensor:
        self.fused = ()
        y = super().forward(x)
        self.fused = ("up", "down")
        return y + super().forward(2.0 * x)


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 12, generator=generator), torch.randn(16, 10, generator=generator)) for _ in range(2)]


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).pow(2).mean()


def weight_gradients(model: nn.Module, loss_fn=loss_fn, batches=batches) -> dict[str, np.ndarray]:
    """The weight gradients of the mean loss, by autograd in float64: module -> (out, in)."""
    model = copy.deepcopy(model).double().train()
    wide = [tuple(x.double() if x.is_floating_point() else x for x in batch) for batch in batches()]
    (sum(loss_fn(model, batch) for batch in wide) / len(wide)).backward()
    return {name.removesuffix(".weight"): p.grad.numpy() for name, p in model.named_parameters() if p.ndim == 2}


def assert_starts(model: nn.Module, gradients: dict[str, np.ndarray], names: list[str]) -> None:
    sites = {site.layer.name: site for site in find_sites(model)}
    for name in names:
        site, g = sites[name], gradients[name]
        product = (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().numpy()
        step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128
        assert np.linalg.norm(product - step) <= TOLERANCE * np.linalg.norm(step), name


def make(kind: type[Mlp] = Mlp, **settings) -> Mlp:
    torch.manual_seed(0)
    return kind(**settings)


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("fused", [("up",), ("down",), ("up", "down")], ids=" and ".join)
@pytest.mark.parametrize("kind", [Mlp, Both])
def test_a_kernel_that_reads_the_factors(config, fused, kind):
    model = make(kind, fused=fused)
    expected = weight_gradients(model)
    adapted, report = lora_one.init(model, batches(), loss_fn, config)
    assert_starts(adapted, expected, ["up", "down"])
    assert [layer.start for layer in report.layers] == ["spectral"] * 2 and all(layer.called for layer in report.layers)
    assert report.base_loss == pytest.approx(np.mean([loss_fn(make(kind), batch).item() for batch in batches()]))
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 4 and all("lora_" in name for name in trained)
    assert all(p.grad is None and p.is_contiguous() for p in adapted.parameters())


@pytest.mark.parametrize("config", SETTINGS)
def test_an_adapter_that_is_there_is_started_again(config):
    """Its factors do not multiply to zero, and its scale is no power of two."""
    lora_config = peft.LoraConfig(r=RANK, lora_alpha=5, target_modules=["up", "down"], init_lora_weights=False)
    model = peft.get_peft_model(make(fused=("up", "down")), lora_config)
    expected = weight_gradients(make())
    adapted, _ = lora_one.init(model, batches(), loss_fn, dataclasses.replace(config, targets="all-linear"))
    assert_starts(adapted, expected, ["up", "down"])


@pytest.mark.parametrize("config", SETTINGS)
def test_a_kernel_that_reads_the_weight_alone_is_named(config):
    model = make(fused=("up",), with_lora=False)
    with pytest.warns(ZeroGradientWarning, match=r"1 of 2 layers .*: up\. Of these no forward pass called up: "):
        adapted, report = lora_one.init(model, batches(), loss_fn, config)
    assert_starts(adapted, weight_gradients(make()), ["down"])
    assert [(layer.name, layer.start, layer.called) for layer in report.layers] == [
        ("up", "plain", False),
        ("down", "spectral", True),
    ]
    assert "never called: plain LoRA start" in str(report) and "zero gradient" not in str(report)
    assert lora_one.report.Report.from_dict(report.to_dict()) == report


@pytest.mark.parametrize("config", SETTINGS)
def test_where_no_layer_is_called_the_error_says_so(config):
    model = make(fused=("up", "down"), with_lora=False)
    message = "batch 1: .* no target layer was called, 'up' for one: .* LoRA would have no effect"
    fails(model, batches(), loss_fn, config, BatchError, message)

    def half(model, batch):  # one is called, and the loss does not depend on it
        return loss_fn(model, batch) + 0.0 * model.down(torch.ones(20)).sum()

    message = r"no target layer has a gradient: .* Of these no forward pass called up: "
    fails(make(fused=("up", "down"), with_lora=False), batches(), half, config, BatchError, message)


def test_exact_takes_a_second_pass_over_what_is_read():
    fails(make(fused=("up",)), iter(batches()), loss_fn, EXACT, BatchError, "read twice, got a list_iterator .*: up")


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 30)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(x)))


def tags() -> list[tuple[Tensor]]:
    return [(torch.randint(0, 30, (4, 7), generator=torch.Generator().manual_seed(i)),) for i in range(2)]


def tag_loss(model: nn.Module, batch: tuple[Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]).flatten(0, 1), batch[0].flatten())


def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("enabled", [True, False])
def test_the_fused_path_of_transformer_layers_is_off_meanwhile(config, enabled):
    expected = weight_gradients(tagger(), tag_loss, tags)
    names = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    found = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        settings = dataclasses.replace(config, targets=["linear1", "linear2"], gamma="auto")
        adapted, report = lora_one.init(tagger(), tags(), tag_loss, settings)
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(found)
    assert_starts(adapted, expected, names)
    adapted.train()  # where PyTorch calls the layers at any rate
    loss = np.mean([tag_loss(adapted, batch).item() for batch in tags()])
    assert report.gamma_trials[-1].loss == pytest.approx(loss, rel=1e-5) and loss < report.base_loss


@pytest.mark.parametrize("config", SETTINGS)
def test_attention_whose_weights_peft_merges_in_each_call(config):
    """nn.MultiheadAttention as a target: PEFT's LoRA is on its input projection and on its output projection."""
    gradients = weight_gradients(tagger(), tag_loss, tags)
    adapted, report = lora_one.init(tagger(), tags(), tag_loss, dataclasses.replace(config, targets=["self_attn"]))
    names = [layer.name for layer in report.layers]
    of_weight = {
        name: gradients[name.replace(".base_layer", "") if "out_proj" in name else f"{name}.in_proj_weight"]
        for name in names
    }
    assert len(names) == 4 and all(layer.called for layer in report.layers)
    assert_starts(adapted, of_weight, names)


def test_the_output_projection_of_attention_is_never_called():
    settings = dataclasses.replace(EXACT, targets=["out_proj", "linear1"])
    with pytest.warns(ZeroGradientWarning, match=r"no forward pass called encoder\.layers\.0\.self_attn\.out_proj"):
        lora_one.init(tagger(), tags(), tag_loss, settings)
