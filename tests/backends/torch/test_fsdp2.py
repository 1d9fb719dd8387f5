"""FSDP2: a model that is sharded before its start, or after it, gets what one process gets."""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import lora_one
from lora_one.backends import torch as backend
from lora_one.backends.torch import attach_plain
from lora_one.backends.torch.attachment.sharding import gathered
from lora_one.errors import LoraOneError
from tests.backends.torch.models import llama
from tests.backends.torch.sharded import BATCHES, assert_equal, factors, products, shard, trained
from tests.backends.torch.spawning import in_processes
from tests.outcome import error_of

RANK, PROCESSES = 3, 2  # a rank that the processes cannot share equally
EXACT = lora_one.Config(rank=RANK, gradient="exact")
CONFIGS = {
    "exact": EXACT,
    "one pass": lora_one.Config(rank=RANK),
    "two passes": lora_one.Config(rank=RANK, passes=2),
    "gamma": lora_one.Config(rank=RANK, gradient="exact", gamma="auto"),
    "kept whole": EXACT,
    "bfloat16": EXACT,
    "base": lora_one.Config(rank=RANK),
    "base that was called": EXACT,
    "base in bfloat16": EXACT,
}
POLICIES: dict[str, dict[str, Any]] = {
    "kept whole": {"reshard_after_forward": False},
    "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
}
POLICIES["base in bfloat16"] = POLICIES["bfloat16"]
DTYPES = dict.fromkeys(("bfloat16", "base in bfloat16"), torch.bfloat16)


def start(rank: int, name: str) -> dict[str, Any]:
    config, own = CONFIGS[name], BATCHES[rank::PROCESSES]
    whole, _ = lora_one.init(llama(DTYPES.get(name, torch.float32)).model, own, config=config)
    plain = llama().model
    model = shard(plain if "base" in name else attach_plain(plain, config), **POLICIES.get(name, {}))
    if name == "base that was called":
        model(**BATCHES[0])
    returned, report = lora_one.init(model, own, config=config)
    assert (returned is model) == ("base" not in name)
    model = returned
    result = {"start": products(model), "whole": products(whole), "loss": report.base_loss, "batches": report.batches}
    return {**result, "losses": trained(model, rank, PROCESSES), "end": products(model)}


def before_sharding(rank: int) -> dict[str, Any]:
    model, _ = lora_one.init(llama().model, BATCHES[rank::PROCESSES], config=EXACT)
    return {"losses": trained(shard(model), rank, PROCESSES), "end": products(model)}


def under_fsdp1(rank: int) -> dict[str, Any]:
    """FSDP2's predecessor: a start before it trains right, and more is refused."""
    own, texts = BATCHES[rank::PROCESSES], {}
    model, _ = lora_one.init(llama().model, own, config=EXACT)
    blocks = ModuleWrapPolicy({LlamaDecoderLayer})
    model = FullyShardedDataParallel(
        model, auto_wrap_policy=blocks, use_orig_params=True, device_id=torch.device("cpu")
    )
    for name, call in {
        "init": lambda: lora_one.init(model, own, config=EXACT),
        "save": lambda: lora_one.save(model, "adapter"),
        "merge": lambda: lora_one.merge(model),
        "precondition": lambda: lora_one.optimizer(model, precondition=True),
        "LoRA+": lambda: lora_one.optimizer(model, loraplus_lr_ratio=4.0),
        "without data": lambda: lora_one.optimizer(model, start_steps=2),
    }.items():
        with pytest.raises(LoraOneError) as error:  # its own, or that of the process that came first
            call()
        texts[name] = str(error.value)
    return {"losses": trained(model, rank, PROCESSES), "texts": texts}


def files(rank: int) -> dict[str, Any]:
    """Save, load and merge a sharded model."""
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    model = shard(attach_plain(llama().model, EXACT))
    _, report = lora_one.init(model, BATCHES[rank::PROCESSES], config=EXACT)
    with torch.no_grad():
        model.eval()(**BATCHES[0])  # leaves the weights of its root whole
    calls, save = [], backend.save
    backend.save = lambda *args: (calls.append(args), save(*args))
    lora_one.save(model, f"{folder[0]}/shared", report)
    shared, files = len(calls), sorted(os.listdir(f"{folder[0]}/shared"))
    lora_one.save(model, f"{folder[0]}/own-{rank}", report)
    result = {"shared": shared, "own": len(calls) - shared, "files": files, "factors": factors(model)}
    result |= {f"in {x}": load_file(f"{folder[0]}/{x}/adapter_model.safetensors") for x in ("shared", f"own-{rank}")}

    alone = lora_one.load(shard(llama().model), f"{folder[0]}/shared")
    result["loaded onto the base"] = factors(alone)
    other = attach_plain(llama().model, EXACT)
    shard(other.get_base_model())
    lora_one.load(other, f"{folder[0]}/shared")
    result["loaded"] = factors(other)
    weights = {key: gathered(x.detach()).clone() for key, x in other.get_base_model().named_parameters()}
    with torch.no_grad():
        before = other(**BATCHES[0]).logits
        merged = lora_one.merge(other)
        result["difference"] = float((merged.eval()(**BATCHES[0]).logits - before).abs().max())
    result["base"] = {key.replace("base_layer.", ""): x for key, x in weights.items() if "lora_" not in key}
    lora_one.backends.torch.attachment.sharding.reshard(merged)
    result["merged"] = {key: gathered(x.detach()).clone() for key, x in merged.named_parameters()}
    return result


def errors(rank: int) -> dict[str, str]:
    texts = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        texts[name] = error_of(call)

    def loss_of(factor: float, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss * (factor if rank == 1 else 1.0)

    plain, model = shard(llama().model), shard(attach_plain(llama().model, EXACT))
    before = factors(model)
    own = BATCHES[rank::PROCESSES]
    note("head", lambda: lora_one.init(plain, own, config=lora_one.Config(rank=RANK, modules_to_save=("lm_head",))))
    keys = list(plain.state_dict())
    note("nan", lambda: lora_one.init(plain, own, lambda *x: loss_of(float("nan"), *x), config=EXACT))
    texts["plain again"] = list(plain.state_dict()) == keys
    texts["losses"] = trained(lora_one.init(plain, own, config=EXACT)[0], rank, PROCESSES)
    late = peft.get_peft_model(shard(llama().model), peft.LoraConfig(target_modules="all-linear", r=RANK))
    note("late", lambda: lora_one.init(late, own, lora_one.Config(rank=RANK)))
    note("late optimizer", lambda: lora_one.optimizer(late))
    note("uneven", lambda: lora_one.init(model, BATCHES[: 1 + rank], config=EXACT))
    note("loss", lambda: lora_one.init(model, own, lambda *x: loss_of(float("nan"), *x), config=EXACT))
    note("gradient", lambda: lora_one.init(model, own, lambda *x: loss_of(1e38, *x), lora_one.Config(rank=RANK)))
    half = shard(attach_plain(llama().model, EXACT).half())
    note("float16", lambda: lora_one.init(half, own, config=EXACT))
    texts["unchanged"] = all(np.array_equal(before[key], x) for key, x in factors(model).items())
    note("merge", lambda: lora_one.merge(model))
    note("start", lambda: lora_one.init(model, own, config=EXACT))
    note("save", lambda: lora_one.save(model, f"{__file__}/adapter"))  # below a file, where no folder can be
    return texts


def run_all(rank: int) -> dict[str, Any]:
    starts = {name: start(rank, name) for name in CONFIGS}
    return {
        **starts,
        "before": before_sharding(rank),
        "FSDP1": under_fsdp1(rank),
        "files": files(rank),
        "errors": errors(rank),
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """One process on all batches."""
    model, report = lora_one.init(llama().model, BATCHES, config=EXACT)
    result = {"start": products(model), "loss": report.base_loss}
    return {**result, "losses": trained(model), "end": products(model)}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_sharded_model_gets_the_start_of_a_whole_one(results, name):
    for of_rank in results:
        assert_equal(of_rank[name]["start"], results[0][name]["start"], 0.0)
        assert_equal(of_rank[name]["start"], of_rank[name]["whole"], 0.05 if name in DTYPES else 1e-5)
        assert of_rank[name]["batches"] == len(BATCHES)


@pytest.mark.parametrize("name", ["exact", "kept whole", "base that was called", "before"])
def test_it_starts_and_trains_as_one_process(results, alone, name):
    for of_rank in results:
        got = of_rank[name]
        if name != "before":
            assert_equal(got["start"], alone["start"])
            assert got["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        np.testing.assert_allclose(got["losses"], alone["losses"], rtol=1e-6)
        assert_equal(got["end"], alone["end"], 1e-4)


def test_fsdp1_trains_a_model_that_was_started_before_and_no_more(results, alone):
    for of_rank in results:
        np.testing.assert_allclose(of_rank["FSDP1"]["losses"], alone["losses"], rtol=1e-6)
        texts = of_rank["FSDP1"]["texts"]
        for name in ("init", "save", "merge"):
            assert "is a FullyShardedDataParallel, which shards the weights over processes" in texts[name]
        for name in ("precondition", "LoRA+"):
            assert "needs the factors of each layer as matrices, got 28 flattened ones" in texts[name]
        assert "FullyShardedDataParallel" in texts["without data"] or "whole factors" in texts["without data"]


def test_it_trains_in_mixed_precision(results, alone):
    for name in DTYPES:
        np.testing.assert_allclose(results[0][name]["losses"], alone["losses"], rtol=0.01)


def test_one_process_writes_a_folder_and_it_holds_whole_factors(results):
    assert [of_rank["files"]["shared"] for of_rank in results] == [1, 0]
    assert [of_rank["files"]["own"] for of_rank in results] == [1, 1]
    for rank, of_rank in enumerate(results):
        got = of_rank["files"]
        assert {"adapter_config.json", "adapter_model.safetensors", "lora_one.json"} <= set(got["files"])
        for folder in ("shared", f"own-{rank}"):
            saved = {key.removeprefix("base_model.model.").removesuffix(".weight"): x.double().numpy()
                     for key, x in got[f"in {folder}"].items()}  # fmt: skip
            assert_equal(saved, got["factors"], 0.0)


def test_a_sharded_model_loads_whole_factors(results):
    for of_rank in results:
        assert_equal(of_rank["files"]["loaded"], of_rank["files"]["factors"], 0.0)
        assert_equal(of_rank["files"]["loaded onto the base"], of_rank["files"]["factors"], 0.0)


def test_a_sharded_model_is_merged(results):
    for of_rank in results:
        got = of_rank["files"]
        assert got["difference"] < 1e-5
        assert got["merged"].keys() == got["base"].keys()
        for key, before in got["base"].items():
            layer = key.removesuffix(".weight")
            expected = before.double().numpy()
            if f"{layer}.lora_A" in got["factors"]:
                product = got["factors"][f"{layer}.lora_B"] @ got["factors"][f"{layer}.lora_A"]
                expected = expected + EXACT.scaling * product
            np.testing.assert_allclose(got["merged"][key].double().numpy(), expected, atol=1e-6)


def test_errors_reach_all_processes_and_change_nothing(results, alone):
    first, second = (of_rank["errors"] for of_rank in results)
    np.testing.assert_allclose(first["losses"], alone["losses"], rtol=1e-6)
    for texts in (first, second):
        assert "modules_to_save.default: fully_shard was called before this was attached" in texts["head"]
        assert "GradientError" in texts["nan"] and texts["plain again"] is True
        late = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default: LoRA was attached after fully_shard"
        assert late in texts["late"] and late in texts["late optimizer"]
        assert "the same number of batches in every process, got no batch 2 in 1 of 2" in texts["uneven"]
        assert "float16 needs a loss scale" in texts["float16"]
        assert "fully_shard was called on the PeftModel" in texts["merge"]
        assert texts["unchanged"] is True
        assert texts["start"] == ""
    assert "adapter" in first["save"] and not first["save"].startswith("ProcessError")
    assert second["save"].startswith("ProcessError: lora_one.save failed on rank 0: ")
    assert second["loss"].startswith("GradientError: batch 1: the loss must be finite")
    assert "lora_one.init failed on rank 1: GradientError: batch 1: the loss must be finite" in first["loss"]
    assert second["gradient"].startswith("GradientError: ")
    assert "lora_one.init failed on rank 1: GradientError: " in first["gradient"]
