"""Experts whose weights are one parameter: a pair each, by autograd on the plain model in float64, and PEFT's own."""

import copy

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import lora_one
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.errors import CheckpointError, ModelError, ZeroGradientWarning
from tests.arrays import best_rank

RANK = 3
SIZES = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "num_experts_per_tok": 2}  # fmt: skip
MODELS = {
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=4)),
    "qwen3": lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**SIZES, moe_intermediate_size=12, num_experts=8)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, num_local_experts=6, sliding_window=8)),
}
TARGETS = ["experts.gate_up_proj", "experts.down_proj", "q_proj"]


def opened(name: str, rows: int = 1) -> tuple[torch.nn.Module, list[dict[str, torch.Tensor]]]:
    """A model of float64, and batches of few tokens, so that some experts get none."""
    torch.manual_seed(1)
    model = MODELS[name]().double().eval()
    model.set_experts_implementation("eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ids = [torch.randint(3, 60, (rows, 3), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    return model, [{"input_ids": x, "labels": x} for x in ids]


def losses(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    with torch.no_grad():
        return [model(**batch).loss.item() for batch in batches]


@pytest.mark.feature("Experts as one parameter")
@pytest.mark.parametrize(("name", "settings"), [("mixtral", {"gradient": "exact"}), *((x, {}) for x in MODELS)])
def test_each_expert_starts_from_its_own_gradient(name, settings, tmp_path):
    plain, batches = opened(name)
    twin = copy.deepcopy(plain)
    for batch in batches:
        (twin(**batch).loss / 2).backward()
    config = lora_one.Config(rank=RANK, oversample=32, targets=TARGETS, **settings)
    with pytest.warns(ZeroGradientWarning) as caught:
        model, report = lora_one.init(copy.deepcopy(plain), batches, config=config)
    starts = {layer.name: layer.start for layer in report.layers}
    assert report.passes == 1 and not any("router" in layer or ".gate." in layer for layer in starts)
    unreached = 0
    for site in find_sites(model):
        if site.expert is None:
            continue
        parameter, _, number = site.layer.name.rpartition(".")
        g = twin.get_parameter(parameter).grad[int(number)].numpy()
        g = g.T if name == "gpt_oss" else g  # (out, in)
        assert g.shape == (site.layer.out_features, site.layer.in_features)
        a, b = site.parameters
        if not g.any():
            unreached += 1
            assert starts[site.layer.name] == "plain" and site.layer.name in str(caught[0].message)
            assert a.any() and not b.any()
            continue
        step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128.0
        assert np.linalg.norm((b @ a).numpy() - step) <= 1e-5 * np.linalg.norm(step), site.layer.name
    assert 0 < unreached < len(starts) - 1

    optimizer = lora_one.optimizer(model, learning_rate=1e-2)
    model(**batches[0]).loss.backward()
    optimizer.step()
    expected = losses(model, batches)
    assert expected[0] < losses(plain, batches)[0]
    lora_one.save(model, tmp_path / "folder", report)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), str(tmp_path / "folder"))
    assert losses(theirs, batches) == expected
    again = lora_one.load(copy.deepcopy(plain), tmp_path / "folder")
    assert losses(again, batches) == expected
    merged = lora_one.merge(again)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert losses(merged, batches) == pytest.approx(expected, rel=1e-6)


def test_an_adapter_of_peft_is_started_in_place_and_put_back_after_an_error():
    plain, batches = opened("mixtral", rows=4)
    config = peft.LoraConfig(r=RANK, target_modules=[], target_parameters=["experts.down_proj"])
    adapted = peft.get_peft_model(plain, config)
    before = {key: x.clone() for key, x in adapted.state_dict().items()}

    def fails(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"):
        lora_one.init(adapted, batches, fails)
    assert all(torch.equal(x, before[key]) for key, x in adapted.state_dict().items())
    _, report = lora_one.init(adapted, batches)
    assert [layer.name for layer in report.layers] == [f"model.layers.0.mlp.experts.down_proj.{i}" for i in range(4)]
    named, same = lora_one.init(
        opened("mixtral", rows=4)[0], batches, config=lora_one.Config(rank=RANK, alpha=8, use_rslora=False,
                                                                      targets=["experts.down_proj"]),
    )  # fmt: skip
    assert [x.singular_values for x in same.layers] == [x.singular_values for x in report.layers]
    assert list(named.peft_config["default"].target_parameters) == ["experts.down_proj"]


def test_what_they_do_not_have_says_so(tmp_path):
    model, batches = opened("mixtral", rows=4)
    config = lora_one.Config(rank=RANK, targets=["experts.down_proj"])
    before = model.state_dict().keys()
    with pytest.raises(ModelError, match=r"experts that are one parameter is made by lora_one.init\(model, batches\)"):
        lora_one.init(model, config=config)
    with pytest.raises(ModelError, match="does not work with lora_dropout != 0"):
        lora_one.init(model, batches, config=lora_one.Config(targets=["experts.down_proj"], dropout=0.1))
    assert model.state_dict().keys() == before
    started, report = lora_one.init(model, batches, config=config)
    with pytest.raises(ModelError, match="got the experts in 'down_proj', whose pairs are one parameter: leave"):
        lora_one.optimizer(started, precondition=True)
    lora_one.save(started, tmp_path, report)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {key: x[:-1].clone() if ".lora_A." in key else x for key, x in load_file(file).items()}
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"experts.down_proj: lora_A of its experts must be \(12, 24\), got \(11"):
        lora_one.load(opened("mixtral")[0], tmp_path)


@pytest.mark.parametrize("read", [inspect_adapter, lambda path: lora_one.convert(path, path / "mlx", to="mlx")])
def test_what_reads_folders_without_a_model_says_why_it_does_not_read_this_one(tmp_path, read):
    model, batches = opened("mixtral", rows=4)
    started, report = lora_one.init(model, batches, config=lora_one.Config(rank=RANK, targets=["experts.down_proj"]))
    lora_one.save(started, tmp_path, report)
    with pytest.raises(CheckpointError) as raised:
        read(tmp_path)
    [problem] = raised.value.problems
    assert problem.startswith("target_parameters=['experts.down_proj']: LoRA on parameters, such as stacks of experts")
