"""Ranks by the gradients' spectra on PyTorch: the start, PEFT's settings of it, files, and what is refused."""

import copy
import json

import peft
import pytest
import torch
from torch import nn

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.backends.torch.attachment import reversible
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.checkpoint.scales import scaling_of
from lora_one.errors import ConfigError, ModelError
from tests.backends import adaptive
from tests.backends.torch.attachment.test_experts import TARGETS, losses, opened


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, weight in adaptive.weights().items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            layer.weight = nn.Parameter(torch.tensor(weight))
            setattr(self, name, layer)

    def forward(self, x, z):
        return self.out(torch.tanh(self.wide(x) + self.narrow(z)))


def batches():
    return [tuple(map(torch.tensor, batch)) for batch in adaptive.batches()]


def squared_error(model, batch):
    x, z, target = batch
    return (model(x, z) - target).square().mean()


def started(**options):
    config = lora_one.Config(**{**adaptive.CONFIG.to_dict(), **options})
    return lora_one.init(Net(), batches(), squared_error, config)


def outputs(model):
    x, z, _ = batches()[0]
    with torch.no_grad():
        return model(x, z)


def pairs_of(model):
    return {
        site.layer.name: tuple(factor.weight.detach().double().numpy() for factor in (site.lora_A, site.lora_B))
        for site in find_sites(model)
    }


@pytest.mark.feature("Adaptive rank")
@pytest.mark.parametrize("options", [{}, {"gradient": "exact"}, {"passes": 2}, {"passes": "auto"}], ids=str)
def test_the_start_has_the_ranks_that_hold_most_energy_for_the_parameters(options):
    model, report = started(**options)
    adaptive.assert_started(pairs_of(model))
    assert {layer.name: layer.rank for layer in report.layers} == adaptive.ranks()
    assert report.passes == (2 if options.get("passes") == 2 else 1)
    trainable = [p for p in model.parameters() if p.requires_grad]
    uniform = attach_plain(Net(), adaptive.CONFIG)
    assert sum(p.numel() for p in trainable) == sum(p.numel() for p in uniform.parameters() if p.requires_grad)
    assert all(layer.share_of_best == pytest.approx(1.0, abs=1e-5) for layer in report.layers)


def test_pefts_layers_and_settings_state_ranks_and_one_scale():
    model, _ = started()
    settings = model.peft_config["default"].to_dict()
    for site in find_sites(model):
        module, rank = site.module, adaptive.ranks()[site.layer.name]
        assert (module.r["default"], module.scaling["default"]) == (rank, pytest.approx(adaptive.CONFIG.scaling))
        assert module.lora_alpha["default"] / rank == pytest.approx(adaptive.CONFIG.scaling)
        assert (site.lora_A.out_features, site.lora_B.in_features) == (rank, rank)
        assert scaling_of(settings, site.layer.name) == pytest.approx(adaptive.CONFIG.scaling)


def test_peft_and_load_open_the_folder_and_merge_adds_the_same(tmp_path):
    model, report = started()
    lora_one.optimizer(model, 1e-2).step(lambda: squared_error(model, batches()[0]))
    lora_one.save(model, tmp_path, report)
    expected = outputs(model)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["r"], written["rank_pattern"]) == (5, {"^narrow": 1, "^out": 3})
    for theirs in (peft.PeftModel.from_pretrained(Net(), tmp_path), lora_one.load(Net(), tmp_path)):
        torch.testing.assert_close(outputs(theirs), expected, rtol=0, atol=0)
    onto, _ = started()
    torch.testing.assert_close(outputs(lora_one.load(onto, tmp_path)), expected, rtol=0, atol=0)
    torch.testing.assert_close(outputs(lora_one.merge(model)), expected)


def test_gamma_auto_tries_the_start_at_its_ranks_and_an_error_then_takes_all_back():
    _, report = started(gamma="auto")
    assert report.gamma_trials[-1].loss <= report.base_loss
    net, before = Net(), Net().state_dict()

    def fails_without_gradient(model, batch):
        if not torch.is_grad_enabled():
            raise ValueError("a user's error")
        return squared_error(model, batch)

    with pytest.raises(ValueError, match="a user's error"):
        lora_one.init(net, batches(), fails_without_gradient, lora_one.Config(rank=3, rank_max=6, gamma="auto"))
    assert {name: torch.equal(x, before[name]) for name, x in net.state_dict().items()} == dict.fromkeys(before, True)


def test_a_model_with_its_own_adapter_keeps_its_ranks():
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["wide", "out"]))
    with pytest.raises(ModelError, match=r"rank_max 6 \(the adapter's: None\)"):
        lora_one.init(model, batches(), squared_error, lora_one.Config(rank=3, rank_max=6))


def test_without_batches_there_is_nothing_to_go_by():
    with pytest.raises(ConfigError, match="no gradient at hand for rank_max=6: pass batches"):
        lora_one.init(Net(), config=adaptive.CONFIG)


def test_sharded_weights_are_refused(monkeypatch):
    monkeypatch.setattr(reversible, "is_sharded", lambda model: True)
    net = Net()
    with pytest.raises(ModelError, match="rank_max needs weights that are whole"):
        lora_one.init(net, batches(), squared_error, adaptive.CONFIG)
    assert [type(module) for module in net.children()] == [nn.Linear] * 3


def test_the_printed_report_shows_the_ranks_as_bars():
    _, report = started()
    rows = {line.split()[0]: line.split()[-1] for line in str(report).splitlines()[-3:]}
    assert rows == {name: "█" * rank for name, rank in adaptive.ranks().items()}
    assert "█" not in str(started(rank_max=None)[1])


class Mixed(nn.Module):
    """An embedding, a convolution and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.line, self.head = nn.Embedding(20, 12), nn.Conv1d(12, 16, 3, padding=1), nn.Linear(16, 8)

    def forward(self, x):
        return self.head(torch.tanh(self.line(self.table(x).mT)).mean(-1))


def test_embeddings_and_convolutions_get_ranks_too(tmp_path):
    torch.manual_seed(1)
    batch = torch.randint(0, 20, (16, 7)), torch.randn(16, 8)
    config = lora_one.Config(rank=3, rank_max=8, targets=["table", "line", "head"])
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    model, report = lora_one.init(Mixed(), [batch], loss, config)
    ranks = {layer.name: layer.rank for layer in report.layers}
    assert len(set(ranks.values())) > 1
    for site in find_sites(model):
        a, b = site.parameters
        assert (a.shape[0], b.shape[1]) == (ranks[site.layer.name], ranks[site.layer.name])
        assert site.layer.rank == ranks[site.layer.name]
    lora_one.save(model, tmp_path, report)
    opened = peft.PeftModel.from_pretrained(Mixed(), tmp_path)
    torch.testing.assert_close(opened(batch[0]), model(batch[0]), rtol=0, atol=0)


def test_experts_in_one_parameter_have_one_rank(tmp_path):
    plain, token_batches = opened("mixtral", rows=4)
    config = lora_one.Config(rank=4, rank_max=12, targets=[*TARGETS, "k_proj", "v_proj", "o_proj"])
    model, report = lora_one.init(copy.deepcopy(plain), token_batches, config=config)
    ranks: dict[str, set[int]] = {}
    for site in find_sites(model):
        a, b = site.parameters
        assert (len(a), b.shape[1]) == (site.layer.rank, site.layer.rank)
        ranks.setdefault(site.layer.module or site.layer.name, set()).add(site.layer.rank)
    assert all(len(of_parameter) == 1 for of_parameter in ranks.values())
    assert ranks["model.layers.0.mlp.experts.down_proj"] not in ({4}, ranks["model.layers.0.self_attn.k_proj"])
    price = sum(layer.rank * (layer.out_features + layer.in_features) for layer in report.layers)
    assert price <= 4 * sum(layer.out_features + layer.in_features for layer in report.layers)
    lora_one.save(model, tmp_path, report)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    again = lora_one.load(copy.deepcopy(plain), tmp_path)
    assert losses(theirs, token_batches) == losses(again, token_batches) == losses(model, token_batches)
