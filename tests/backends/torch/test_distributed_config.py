"""Models that transformers spreads over processes when it loads them start and train as in one process.

By tensor parallelism, where each has parts of each layer; and by its own use of FSDP2.
"""

import os
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import AutoModelForCausalLM, __version__
from transformers.distributed import DistributedConfig

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.backends.torch.attachment.sharding import is_dtensor
from lora_one.errors import LoraOneError, ModelError
from tests.backends.torch.models import llama
from tests.backends.torch.sharded import BATCHES, assert_equal, factors, products, train
from tests.backends.torch.spawning import in_processes

PROCESSES, STEPS = 2, 4
HAS_DTENSORS = tuple(map(int, __version__.split(".")[:2])) >= (5, 17)
with_dtensors = pytest.mark.skipif(not HAS_DTENSORS, reason="before 5.17 transformers splits without DTensors")
CONFIGS = {
    "exact": lora_one.Config(rank=3, gradient="exact"),
    "one pass": lora_one.Config(rank=3),
    "two passes": lora_one.Config(rank=3, passes=2),
    "deferred": lora_one.Config(rank=3),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"precondition": True},
    "one pass": {},
    "two passes": {"precondition": True, "loraplus_lr_ratio": 4.0},
    "deferred": {"start_steps": 2, "precondition": True},
}


def shared_folder() -> str:
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    return folder[0]


def split(folder: str) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(tp_size=PROCESSES))


def started(model: nn.Module, name: str) -> tuple[nn.Module, Any]:
    return lora_one.init(model, None if name == "deferred" else BATCHES, config=CONFIGS[name])


def run(model: nn.Module, name: str) -> dict[str, Any]:
    model, report = started(model, name)
    optimizer = lora_one.optimizer(model, learning_rate=1e-2, **OPTIONS[name])
    start = products(model)
    return {"start": start, "report": report, "losses": train(model, optimizer, range(STEPS)), "end": products(model)}


def files(folder: str, rank: int) -> dict[str, Any]:
    """Save and load, and what cannot be merged."""
    model, _ = started(split(folder), "exact")
    lora_one.save(model, f"{folder}/adapter")
    saved = load_file(f"{folder}/adapter/adapter_model.safetensors")
    loaded = lora_one.load(split(folder), f"{folder}/adapter", trainable=True)
    result = {"saved": saved, "factors": factors(model), "loaded": factors(loaded), "error": ""}
    result["losses"] = train(loaded, lora_one.optimizer(loaded, learning_rate=1e-2), range(STEPS))
    try:
        lora_one.merge(model)
    except LoraOneError as error:  # its own, or that of the process that came first
        result["error"] = str(error)
    return result


def resumed(folder: str) -> dict[str, Any]:
    """Stop after one step, which is in the middle of a start, and go on from torch.distributed.checkpoint's files."""

    def begun() -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Any]]:
        model, _ = started(split(folder), "deferred")
        optimizer = lora_one.optimizer(model, learning_rate=1e-2, **OPTIONS["deferred"])
        return model, optimizer, dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    model, optimizer, _ = begun()
    train(model, optimizer, range(1))
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/checkpoint")
    expected = train(model, optimizer, range(1, STEPS))
    end = factors(model)
    model, optimizer, saved = begun()
    checkpoint.load(saved, checkpoint_id=f"{folder}/checkpoint")
    set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
    losses = train(model, optimizer, range(1, STEPS))
    return {"losses": losses, "expected": expected, "end": factors(model), "expected end": end}


def errors(folder: str, rank: int) -> dict[str, str]:
    texts = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
            texts[name] = ""
        except LoraOneError as error:
            texts[name] = f"{type(error).__name__}: {error}"

    note("shares", lambda: lora_one.init(split(folder), BATCHES[rank::PROCESSES], config=CONFIGS["one pass"]))
    whole = split(folder)
    adapted = peft.get_peft_model(whole, peft.LoraConfig(r=3, target_modules=["q_proj"]))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]
    layer.weight = nn.Parameter(layer.weight.to_local().detach())
    note("not split", lambda: lora_one.init(adapted, BATCHES, config=lora_one.Config(rank=3)))
    return texts


def run_all(rank: int) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}  # transformers reads them
    folder = shared_folder()
    if rank == 0:
        llama().model.save_pretrained(folder)
    torch.distributed.barrier()
    runs = {name: run(split(folder), name) for name in CONFIGS}
    adapted = peft.get_peft_model(
        split(folder), peft.LoraConfig(r=3, target_modules="all-linear", lora_alpha=16 / 3**0.5 * 3)
    )
    before, _ = lora_one.init(adapted, BATCHES, config=lora_one.Config(rank=3, gradient="exact"))
    sharded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(fsdp_size=PROCESSES))
    sharded, _ = lora_one.init(sharded, BATCHES[rank::PROCESSES], config=CONFIGS["exact"])
    optimizer = lora_one.optimizer(sharded, learning_rate=1e-2, **OPTIONS["exact"])
    start = products(sharded)
    by_fsdp2 = {
        "start": start,
        "losses": train(sharded, optimizer, range(STEPS), rank, PROCESSES),
        "end": products(sharded),
    }
    kinds = {is_dtensor(p) for p in before.parameters() if p.requires_grad}
    return {"runs": runs, "adapted": products(before), "kinds": kinds, "files": files(folder, rank),
            "errors": errors(folder, rank), "resumed": resumed(folder), "fsdp2": by_fsdp2}  # fmt: skip


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: run(llama().model, name) for name in CONFIGS}


@pytest.mark.feature("Tensor parallel")
@with_dtensors
@pytest.mark.parametrize("name", CONFIGS)
def test_it_starts_and_trains_as_one_process(results, alone, name):
    for of_rank in results:
        got = of_rank["runs"][name]
        assert_equal(got["start"], alone[name]["start"], 1e-5)
        np.testing.assert_allclose(got["losses"], alone[name]["losses"], rtol=1e-5)
        assert_equal(got["end"], alone[name]["end"], 1e-4)
        if name != "deferred":
            assert got["report"].batches == len(BATCHES)
            assert got["report"].base_loss == pytest.approx(alone[name]["report"].base_loss, rel=1e-6)


@with_dtensors
def test_a_model_that_transformers_shards_by_fsdp2_starts_and_trains_as_one_process(results, alone):
    for of_rank in results:
        got = of_rank["fsdp2"]
        assert_equal(got["start"], alone["exact"]["start"], 1e-5)
        np.testing.assert_allclose(got["losses"], alone["exact"]["losses"], rtol=1e-5)
        assert_equal(got["end"], alone["exact"]["end"], 1e-4)


@with_dtensors
def test_lora_that_peft_has_split_gets_the_same_start(results, alone):
    assert results[0]["kinds"] == {True, False}  # one factor of a layer is split, the other is not
    start = alone["exact"]["start"]
    scale = {key: x / np.linalg.norm(x) for key, x in start.items()}
    assert_equal({key: x / np.linalg.norm(x) for key, x in results[0]["adapted"].items()}, scale)


@with_dtensors
def test_a_folder_holds_whole_factors_and_loads(results, alone):
    for of_rank in results:
        got = of_rank["files"]
        saved = {key.removeprefix("base_model.model.").removesuffix(".weight"): x.double().numpy()
                 for key, x in got["saved"].items()}  # fmt: skip
        assert_equal(saved, got["factors"], 0.0)
        assert_equal(got["loaded"], got["factors"], 0.0)
        assert "split by tensor parallelism, where PEFT cannot merge" in got["error"]
    model, _ = started(llama().model, "exact")
    losses = train(model, lora_one.optimizer(model, learning_rate=1e-2), range(STEPS))
    np.testing.assert_allclose(results[0]["files"]["losses"], losses, rtol=1e-5)


@with_dtensors
def test_a_run_that_was_stopped_goes_on_bit_for_bit(results):
    for of_rank in results:
        got = of_rank["resumed"]
        assert got["losses"] == got["expected"]
        assert_equal(got["end"], got["expected end"], 0.0)


@with_dtensors
def test_different_batches_and_factors_that_are_not_split_are_refused(results):
    for of_rank in results:
        texts = of_rank["errors"]
        assert "tensor parallelism needs the same batches in every process: batch 1 has losses of" in texts["shares"]
        assert (
            "q_proj: its weight is split over processes by tensor parallelism, and lora_B is not" in texts["not split"]
        )


def test_weights_that_are_split_without_a_word_are_refused():
    """As transformers before 5.17 split them: each process has a smaller weight, and the module knows."""
    model = llama().model
    model.model.layers[0].self_attn.q_proj._hf_tp_plan = "colwise"
    for call in (lora_one.init, lambda model: attach_plain(model, lora_one.Config(rank=3))):
        with pytest.raises(ModelError, match=r"0.self_attn.q_proj: .* by tensor parallelism, .* transformers 5.17"):
            call(model)
