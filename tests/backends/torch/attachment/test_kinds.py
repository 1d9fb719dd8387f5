"""LoRA on embeddings and convolutions: their G by autograd on the plain model in float64, and PEFT's own layers."""

import copy
import functools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import lora_one
from lora_one.backends.torch import TorchOps, TorchSession
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.passes import over_batches
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.core.factors import Factors
from lora_one.core.gradient import RowProduct, as_matrix
from lora_one.core.precondition import precondition
from lora_one.errors import CheckpointError, ModelError
from tests.arrays import best_rank
from tests.backends.torch.models import Case, llama, tokens

RANK = 3
EPS = 1e-8  # Adam's
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


class Layers(nn.Module):
    """All kinds of layers, with strides, paddings and kernels that differ from axis to axis."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12, padding_idx=0)
        self.line = nn.Conv1d(12, 16, 3, stride=2, padding=1)
        self.plane = nn.Conv2d(1, 20, (3, 5), padding="same")
        self.space = nn.Conv3d(1, 10, (2, 3, 3), stride=(1, 2, 1), padding=(1, 0, 1), bias=False)
        self.head = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.line(self.table(x).mT))  # (n, 16, t)
        h = torch.tanh(self.plane(h[:, None]))  # (n, 20, 16, t)
        h = torch.stack([torch.tanh(self.space(each)) for each in h[:, None]])  # without a batch axis
        return self.head(h.mean((2, 3, 4)))


def layers() -> Case:
    batches = [(tokens(i, length=12, vocabulary=40) - 3, torch.randn(4, 6)) for i in range(3)]
    return Case(Layers(), batches, lambda model, batch: (model(batch[0]) - batch[1]).pow(2).mean())


def gemma() -> Case:
    """Its embedding multiplies what it looks up, and is tied to the output layer."""
    config = hf.Gemma3TextConfig(vocab_size=60, head_dim=16, num_key_value_heads=1, **SIZES)
    return Case(hf.Gemma3ForCausalLM(config), llama().batches, None)


def whisper() -> Case:
    config = hf.WhisperConfig(
        vocab_size=60, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_source_positions=10,
        max_target_positions=12, decoder_start_token_id=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    batch = {"input_features": torch.randn(2, 8, 20), "labels": tokens(0, 2, 6)}
    return Case(hf.WhisperForConditionalGeneration(config), [batch], None)


def siglip() -> Case:
    config = hf.SiglipVisionConfig(image_size=16, patch_size=4, **SIZES)
    pictures = [torch.randn(2, 3, 16, 16) for _ in range(2)]
    return Case(hf.SiglipVisionModel(config), pictures, lambda model, x: model(x).last_hidden_state.pow(3).mean())


def qwen_vl() -> Case:
    config = hf.Qwen2VLConfig(vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2,
                                             "patch_size": 4, "mlp_ratio": 1}).vision_config  # fmt: skip
    model = hf.models.qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    grid, patches = torch.tensor([[1, 4, 4]]), torch.randn(16, 3 * 2 * 4 * 4)
    return Case(model, [patches], lambda model, x: model(x, grid_thw=grid).pooler_output.pow(3).mean())


def unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, cross_attention_dim=8, attention_head_dim=2,
        norm_num_groups=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), in_channels=4, out_channels=4,
    )  # fmt: skip
    batch = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8)
    return Case(model, [batch], lambda model, x: model(x[0], 7, x[1]).sample.pow(2).mean())


def dit() -> Case:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=1, norm_num_groups=4,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    x, time, label = torch.randn(2, 4, 8, 8), torch.tensor([3, 7]), torch.tensor([1, 4])
    return Case(model, [x], lambda model, x: model(x, timestep=time, class_labels=label).sample.pow(2).mean())


CASES: dict[str, tuple[Any, list[str]]] = {
    "layers": (layers, ["table", "line", "plane", "space", "head"]),
    "tied": (lambda: llama(tie=True), ["embed_tokens", "q_proj"]),
    "gemma": (gemma, ["embed_tokens", "q_proj"]),
    "whisper": (whisper, ["conv1", "conv2", "embed_tokens", "q_proj"]),
    "siglip": (siglip, ["patch_embedding", "position_embedding", "q_proj"]),
    "qwen_vl": (qwen_vl, ["patch_embed.proj", "qkv"]),
    "unet": (unet, ["conv_in", "conv1", "conv2", "conv_shortcut", "conv", "to_q", "to_out.0"]),
    "dit": (dit, ["pos_embed.proj", "embedding_table", "to_q"]),
}


@functools.cache
def _made(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name][0]()


def opened(name: str) -> tuple[Case, list[str]]:
    """A fresh copy of a case, in eval mode and in float64."""

    def wide(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: wide(value) for key, value in x.items()}
        return tuple(map(wide, x)) if isinstance(x, tuple) else x.double() if x.is_floating_point() else x

    case = _made(name)
    model = copy.deepcopy(case.model).eval().double()
    return case._replace(model=model, batches=[wide(batch) for batch in case.batches]), CASES[name][1]


def loss_of(case: Case, model: nn.Module, batch: Any) -> Tensor:
    return model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)


@functools.cache
def gradients(name: str, layers: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The mean of G, (out, in), by autograd, of the layers with LoRA; a tied output layer is none of them."""
    case, _ = opened(name)
    modules = {layer: case.model.get_submodule(layer) for layer in layers}
    for module in modules.values():
        module.weight = nn.Parameter(module.weight.detach().clone())  # parted from the output layer
    for batch in case.batches:
        loss_of(case, case.model, batch).backward()
    weights = {layer: module.weight.grad / len(case.batches) for layer, module in modules.items()}
    return {
        layer: (g.T if isinstance(modules[layer], nn.Embedding) else g.flatten(1)).numpy()
        for layer, g in weights.items()
    }


def started(name: str, **settings: Any) -> tuple[Case, Any, Any]:
    case, targets = opened(name)
    config = lora_one.Config(rank=RANK, targets=targets, **settings)
    model, report = lora_one.init(copy.deepcopy(case.model), case.batches, case.loss_fn, config)
    return case, model, report


STARTS = [(name, {"gradient": "exact"}) for name in CASES] + [
    (name, {"passes": 3}) for name in ("layers", "tied", "dit")
]


@pytest.mark.parametrize(("name", "settings"), STARTS, ids=lambda x: x if isinstance(x, str) else next(iter(x)))
def test_a_start_is_the_truncated_svd_of_the_gradient(name, settings):
    case, model, report = started(name, oversample=32, **settings)
    sites = find_sites(model)
    expected = gradients(name, tuple(site.layer.name for site in sites))
    for site, layer in zip(sites, report.layers, strict=True):
        g = expected[layer.name]
        assert (site.layer.out_features, site.layer.in_features) == g.shape
        s = np.linalg.svd(g, compute_uv=False)
        step = -best_rank(g, RANK) / s[0] / 128.0
        a, b = (x.detach().flatten(1) for x in site.parameters)
        assert np.linalg.norm((b @ a).numpy() - step) <= 1e-5 * np.linalg.norm(step), layer.name
        assert layer.gradient_norm == pytest.approx(np.linalg.norm(s), rel=1e-6)
    plain = {key.replace(".base_layer", ""): x for key, x in model.get_base_model().state_dict().items()}
    assert all(torch.equal(plain[key], x) for key, x in case.model.state_dict().items())


def moved(model: nn.Module) -> nn.Module:
    """The model with factors that are far from their start."""
    for i, site in enumerate(find_sites(model)):
        for parameter in site.parameters:
            with torch.no_grad():
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
                parameter.add_(0.1 * noise)
    return model


@pytest.mark.feature("Embeddings")
@pytest.mark.feature("Convolutions")
@pytest.mark.parametrize("name", ["layers", "gemma", "whisper", "unet"])
def test_a_folder_is_pefts_own_and_merging_changes_nothing(name, tmp_path):
    case, model, report = started(name)
    moved(model)
    with torch.no_grad():
        expected = [loss_of(case, model, batch).item() for batch in case.batches]
        lora_one.save(model, tmp_path / "folder", report)
        again = lora_one.load(copy.deepcopy(case.model), tmp_path / "folder")
        assert [loss_of(case, again, batch).item() for batch in case.batches] == expected
        for (key, x), (_, y) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
            assert torch.equal(x, y), key
        if name != "whisper":  # it reads the stride of its convolutions, which PEFT's layers do not have
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(case.model), str(tmp_path / "folder"))
            assert [loss_of(case, theirs, batch).item() for batch in case.batches] == expected
        update = {site.layer.name: site.layer.scaling * np.linalg.norm(product(site)) for site in find_sites(model)}
        inspected = inspect_adapter(tmp_path / "folder")
        assert {layer.name: pytest.approx(layer.norm) for layer in inspected.layers} == update
        merged = lora_one.merge(model)
        assert not any("lora" in key for key in merged.state_dict())
        assert [loss_of(case, merged, batch).item() for batch in case.batches] == pytest.approx(expected, rel=1e-9)


def product(site: Any) -> np.ndarray:
    a, b = (x.detach().double().flatten(1) for x in site.parameters)
    return (b @ a).numpy()


def test_the_preconditioner_takes_their_factors_as_matrices():
    case, model, _ = started("layers")
    moved(model)
    optimizer = lora_one.optimizer(model, learning_rate=1e-3, precondition=True, eps=EPS)
    assert len(optimizer.pairs) == 5
    loss_of(case, model, case.batches[0]).backward()
    expected = {}
    for site in find_sites(model):
        pair, gradient = zip(*((x.detach().flatten(1), x.grad.flatten(1)) for x in site.parameters), strict=True)
        direction = precondition(TorchOps(), Factors(*pair), Factors(*gradient), 1e-6, "absolute")
        steps = (1e-3 * d / (d.abs() + EPS) for d in direction)  # Adam's first one
        expected[site.layer.name] = [x - step for x, step in zip(pair, steps, strict=True)]
    optimizer.step()
    for site in find_sites(model):
        for parameter, values in zip(site.parameters, expected[site.layer.name], strict=True):
            torch.testing.assert_close(parameter.detach().flatten(1), values, rtol=0, atol=1e-9)


def test_a_start_without_data_is_made_of_their_first_gradients():
    """A single gradient of lora_B, from A as it was drawn: W's gradient, projected on the rows of A."""
    case, targets = opened("layers")
    model, report = lora_one.init(copy.deepcopy(case.model), config=lora_one.Config(rank=RANK, targets=targets))
    optimizer = lora_one.optimizer(model, start_steps=1)
    before = {site.layer.name: site.parameters.lora_A.detach().flatten(1).clone() for site in find_sites(model)}
    expected = gradients_of_first_batch(case)
    loss_of(case, model, case.batches[0]).backward()
    optimizer.step()
    assert report.done
    for site in find_sites(model):
        q, _ = torch.linalg.qr(before[site.layer.name].mT)
        g = expected[site.layer.name] @ (q @ q.mT).numpy()
        s = np.linalg.svd(g, compute_uv=False)
        np.testing.assert_allclose(product(site), -g / s[0] / 128.0, atol=1e-9 / 128)


def gradients_of_first_batch(case: Case) -> dict[str, np.ndarray]:
    model = copy.deepcopy(case.model)
    loss_of(case, model, case.batches[0]).backward()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "weight")}
    return {
        name: (x.weight.grad.T if isinstance(x, nn.Embedding) else x.weight.grad.flatten(1)).numpy()
        for name, x in layers.items()
    }


@pytest.mark.parametrize("config", [{"passes": 2}, {"gradient": "exact"}], ids=str)
def test_factors_that_other_code_reads_give_the_same_start(config, monkeypatch):
    """LoRA's own gradients, where no tap sees a layer: here the taps are taken away from some layers."""
    _, model, _ = started("layers", oversample=32, **config)
    true_tap, hidden = over_batches.tap, ("Conv2d", "Embedding")

    def tap(layer: Any, base: Any, *args: Any) -> Any:
        return nullcontext() if type(base).__name__ in hidden else true_tap(layer, base, *args)

    monkeypatch.setattr(over_batches, "tap", tap)
    _, other, report = started("layers", oversample=32, **config)
    assert report.passes >= 1
    for site, same in zip(find_sites(model), find_sites(other), strict=True):
        np.testing.assert_allclose(product(site), product(same), atol=1e-7 / 128)


def test_layers_in_stacks_and_in_bfloat16(monkeypatch):
    """As on a GPU; an embedding is never in a stack. Rounding to bfloat16 turns a start a little."""
    monkeypatch.setattr(TorchSession, "stacks_layers", True)
    case, targets = opened("layers")
    narrow = copy.deepcopy(case.model).bfloat16()
    loss_fn = lambda model, batch: (model(batch[0]).float() - batch[1].float()).pow(2).mean()  # noqa: E731
    model, _ = lora_one.init(narrow, case.batches, loss_fn, lora_one.Config(rank=RANK, targets=targets))
    expected = gradients("layers", tuple(targets))
    for site in find_sites(model):
        u, s, vt = np.linalg.svd(expected[site.layer.name], full_matrices=False)
        step = product(site)
        held = np.linalg.norm(step) / np.linalg.norm(s[:RANK] / s[0] / 128.0)
        assert held == pytest.approx(1.0, abs=0.1) and site.parameters.lora_A.dtype == torch.float32
        assert -np.sum((u[:, :1] * vt[:1]) * step) == pytest.approx(1 / 128, rel=0.1)


def test_an_exact_pass_forms_the_gradient_of_an_embedding_as_a_matrix():
    case, targets = opened("layers")
    config = lora_one.Config(rank=RANK, targets=targets, gradient="exact")
    kinds = {}
    with TorchSession(case.model, case.batches[:1], case.loss_fn, config) as session:
        session.exact_pass(lambda name, g: kinds.setdefault(name, g))
    assert not isinstance(kinds["table"], RowProduct)
    expected = gradients_of_first_batch(opened("layers")[0])
    for name, g in kinds.items():
        np.testing.assert_allclose(as_matrix(TorchOps(), g).numpy(), expected[name], atol=1e-12)


REFUSED = {
    "groups": (nn.Conv2d(6, 6, 3, groups=3), "groups=3, where PEFT's factors mix the groups"),
    "dilation": (nn.Conv2d(6, 6, 3, dilation=2, padding=2), r"dilation=\(2, 2\), which PEFT's lora_A leaves out"),
    "padding": (nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"), "pads with zeros"),
    "transposed": (nn.ConvTranspose2d(6, 6, 3), "must be linear layers, embeddings or convolutions"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_pefts_layers_do_not_compute_is_refused(kind):
    layer, message = REFUSED[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    with pytest.raises(ModelError, match=message):
        lora_one.init(model, [torch.randn(1, 6, 8, 8)], lambda m, x: m(x).sum(), lora_one.Config(rank=3, targets=["0"]))
    assert type(model[0]) is type(layer)


def test_rank_and_max_norm_are_checked():
    config = lora_one.Config(rank=4, targets=["0"])
    with pytest.raises(ModelError, match="groups=3 and rank 4"):
        lora_one.init(nn.Sequential(nn.Conv2d(6, 6, 3, groups=3)), [torch.randn(1, 6, 8, 8)], None, config)
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=1.0))
    with pytest.raises(ModelError, match="max_norm"):
        lora_one.init(model, [torch.arange(4)], lambda m, x: m(x).sum(), config)


def test_a_folder_for_another_kind_of_layer_does_not_fit(tmp_path):
    config = lora_one.Config(rank=2, targets=["0"])
    model, report = lora_one.init(nn.Sequential(nn.Embedding(9, 6)), [torch.arange(4)], lambda m, x: m(x).sum(), config)
    lora_one.save(model, tmp_path / "folder", report)
    for other, kind in ((nn.Linear(9, 6), "a linear layer"), (nn.Conv1d(3, 6, 3), r"a convolution of \(3,\)")):
        with pytest.raises(CheckpointError, match=f"0: the model has {kind} there, the file factors of an embedding"):
            lora_one.load(nn.Sequential(other), tmp_path / "folder")


def test_the_page_runs():
    text = (Path(__file__).parents[4] / "docs" / "guide" / "layers.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0], names)
    assert [layer.name for layer in names["report"].layers] == ["0", "2"]
