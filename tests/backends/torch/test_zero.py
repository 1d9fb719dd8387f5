"""DeepSpeed's ZeRO-1, 2 and 3: a model that is started before its engine, or after, gets what one process gets."""

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import lora_one
from lora_one.backends.torch import attach_plain
from tests.backends.torch.models import causal_batches, llama
from tests.backends.torch.sharded import assert_equal, factors, products
from tests.backends.torch.spawning import in_processes
from tests.outcome import error_of

RANK, PROCESSES, LEARNING_RATE = 3, 2, 1e-2
EXACT = lora_one.Config(rank=RANK, gradient="exact")
BATCHES = causal_batches(4)
SETTINGS = {
    "exact": EXACT,
    "one pass": lora_one.Config(rank=RANK),
    "two passes": lora_one.Config(rank=RANK, passes=2),
    "gamma": lora_one.Config(rank=RANK, gradient="exact", gamma="auto"),
}
FOLDED = ("one pass", "two passes")  # merged from what each process has, so compared with whole weights in as many


@dataclass(frozen=True)
class Case:
    """A training in DeepSpeed's engine.

    Attributes:
        stage: of ZeRO.
        zero: further settings of it.
        settings: further settings of the engine.
        start: "before" the engine is made, "after" it, or after it by handing in the "engine".
        in_parts: whether the weights are in parts from the beginning, as the Trainer loads a model for stage 3.
        config: name of the start's settings.
        options: of `lora_one.optimizer`.
    """

    stage: int
    start: str
    zero: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    in_parts: bool = False
    config: str = "exact"
    options: dict[str, Any] = field(default_factory=dict)


NOT_PERSISTENT = {"stage3_param_persistence_threshold": 0}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES = {f"{stage} {start}": Case(stage, start) for stage in (1, 2, 3) for start in ("before", "after", "engine")}
CASES |= {f"3 {name}": Case(3, "after", NOT_PERSISTENT, config=name) for name in SETTINGS}
CASES |= {
    "3 before, in parts": Case(3, "before", NOT_PERSISTENT, in_parts=True),
    "3 before, in parts, one pass": Case(3, "before", in_parts=True, config="one pass"),
    "3 after, in parts": Case(3, "after", in_parts=True),
    "2 after, offloaded": Case(2, "after", OFFLOAD),
    "3 after, offloaded": Case(3, "after", OFFLOAD),
    "2 LoRA+": Case(2, "after", options={"loraplus_lr_ratio": 4.0}),
    "3 LoRA+": Case(3, "after", options={"loraplus_lr_ratio": 4.0}),
    "3 LoRA+, in parts": Case(3, "before", in_parts=True, options={"loraplus_lr_ratio": 4.0}),
    "2 bfloat16": Case(2, "after", settings={"bf16": {"enabled": True}}),
    "3 bfloat16": Case(3, "after", settings={"bf16": {"enabled": True}}),
}


def masters(model: nn.Module) -> dict[str, np.ndarray]:
    """What the engine trains."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {
        name: safe_get_full_fp32_param(x).double().numpy() for name, x in model.named_parameters() if x.requires_grad
    }


def settings_of(case: Case) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": case.stage, **case.zero},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        **case.settings,
    }


def base_model(case: Case, folder: str) -> nn.Module:
    if not case.in_parts:
        return llama().model
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    kept = HfDeepSpeedConfig(settings_of(case))  # while it lives, transformers loads each weight in parts
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert all(x.numel() == 0 and hasattr(x, "ds_id") for x in model.parameters()), kept
    return model


def engine_of(model: nn.Module, case: Case) -> Any:
    import deepspeed

    optimizer = lora_one.optimizer(model, learning_rate=LEARNING_RATE, **case.options)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings_of(case))[0]


def started(case: Case, rank: int, folder: str) -> tuple[Any, nn.Module, Any]:
    """Return the engine, the model in it, and the report."""
    own, config, report = BATCHES[rank::PROCESSES], SETTINGS[case.config], None
    model = base_model(case, folder)
    if case.start == "before":
        model, report = lora_one.init(model, own, config=config)
    else:
        model = attach_plain(model, config)
    engine = engine_of(model, case)
    if case.start != "before":
        given = engine if case.start == "engine" else model
        returned, report = lora_one.init(given, own, config=config)
        assert returned is given
    return engine, model, report


def trained(engine: Any, rank: int = 0) -> list[float]:
    """Train for some steps; return the mean losses of all processes' batches."""
    losses = []
    for batch in BATCHES[:3]:
        loss = engine(**{key: value[rank::PROCESSES] for key, value in batch.items()}).loss
        engine.backward(loss)
        engine.step()
        mean = loss.detach().float().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / PROCESSES)
    return losses


def run(case: Case, rank: int, folder: str) -> dict[str, Any]:
    engine, model, report = started(case, rank, folder)
    result = {"start": products(model), "loss": report.base_loss, "batches": report.batches}
    return {**result, "losses": trained(engine, rank), "end": products(model)}


def files(rank: int, folder: str) -> dict[str, Any]:
    """Save an engine of stage 3, and load what it has written into others."""
    case = Case(3, "engine", NOT_PERSISTENT)
    engine, model, report = started(case, rank, folder)
    shared = f"{folder}/adapter"
    lora_one.save(engine, shared, report)
    result = {"saved": load_file(f"{shared}/adapter_model.safetensors"), "factors": factors(model)}
    for name, target in {"present": case, "new": replace(case, in_parts=True), "2": Case(2, "after")}.items():
        other = base_model(target, folder)
        if name == "new":
            other = lora_one.load(other, shared, trainable=True)
            engine = engine_of(other, target)
        else:
            other = attach_plain(other, EXACT)
            engine = engine_of(other, target)
            assert lora_one.load(engine, shared, trainable=True) is engine
        result[f"loaded, {name}"] = factors(other)
        result[f"losses, {name}"] = trained(engine, rank)
    return result


def left_whole(rank: int, folder: str, stage: int) -> dict[str, Any]:
    """Save and merge what an engine has trained that leaves the weights whole."""
    engine, model, report = started(Case(stage, "before"), rank, folder)
    trained(engine, rank)
    lora_one.save(engine, f"{folder}/stage-{stage}-{rank}", report)
    result = {"saved": load_file(f"{folder}/stage-{stage}-{rank}/adapter_model.safetensors"), "factors": factors(model)}
    with torch.no_grad():
        before = model.eval()(**BATCHES[0]).logits
        result["difference"] = float((lora_one.merge(engine)(**BATCHES[0]).logits - before).abs().max())
    return result


class FailsLate:
    """A loss that fails in one process, at a time when the factors are written."""

    def __init__(self, rank: int):
        self.calls_left = len(BATCHES) // PROCESSES + 1 if rank == 1 else 10**9

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.calls_left -= 1
        loss = model(**batch).loss
        if self.calls_left == 0:
            raise OSError("no data left")
        return loss


def resumed(rank: int, folder: str, stage: int) -> list[list[float]]:
    """The losses of a training, and of one that continues from its checkpoint."""
    case, losses = Case(stage, "after"), []
    engine, _, _ = started(case, rank, folder)
    trained(engine, rank)
    engine.save_checkpoint(f"{folder}/checkpoint-{stage}")
    losses.append(trained(engine, rank))
    engine = engine_of(attach_plain(llama().model, EXACT), case)
    engine.load_checkpoint(f"{folder}/checkpoint-{stage}")
    return [*losses, trained(engine, rank)]


def errors(rank: int, folder: str) -> dict[str, Any]:
    texts: dict[str, Any] = {}

    def note(name: str, call: Callable[[], Any]) -> None:
        texts[name] = error_of(call)

    def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss * (float("nan") if rank == 1 else 1.0)

    own = BATCHES[rank::PROCESSES]
    for stage in (2, 3):
        engine, model, _ = started(Case(stage, "after"), rank, folder)
        before = factors(model), masters(model)
        note(f"{stage} loss", lambda: lora_one.init(engine, own, loss_of, EXACT))  # noqa: B023
        fails = FailsLate(rank)
        note(f"{stage} late", lambda: lora_one.init(engine, own, fails, SETTINGS["gamma"]))  # noqa: B023
        after = factors(model), masters(model)
        texts[f"{stage} unchanged"] = all(
            np.array_equal(x[key], y[key]) for x, y in zip(before, after, strict=True) for key in x
        )
        note(f"{stage} optimizer", lambda: lora_one.optimizer(model))  # noqa: B023
        note(f"{stage} optimizer of the engine", lambda: lora_one.optimizer(engine))  # noqa: B023
        note(f"{stage} merge", lambda: lora_one.merge(model))  # noqa: B023
        import deepspeed

        plain = llama().model
        adam = torch.optim.AdamW(plain.parameters())
        engine = deepspeed.initialize(model=plain, optimizer=adam, config=settings_of(Case(stage, "after")))[0]
        model = attach_plain(llama().model, EXACT)
        adam = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
        deepspeed.initialize(model=model, optimizer=adam, config=settings_of(Case(stage, "after")))
        note(f"{stage} without data", lambda: lora_one.init(model))  # noqa: B023
        note(f"{stage} plain", lambda: lora_one.init(plain, own, config=EXACT))  # noqa: B023
        note(f"{stage} plain engine", lambda: lora_one.init(engine, own, config=EXACT))  # noqa: B023
    for stage in (1, 2, 3):
        for name, options in {"precondition": {"precondition": True}, "start": {"start_steps": 2}}.items():
            case = Case(stage, "after", NOT_PERSISTENT, options={**options, "loraplus_lr_ratio": 2.0})
            model = attach_plain(llama().model, EXACT)
            engine, before = engine_of(model, case), factors(model)
            note(f"{stage} {name}", lambda: trained(engine, rank))  # noqa: B023
            texts[f"{stage} {name} unchanged"] = all(
                np.array_equal(before[key], x) for key, x in factors(model).items()
            )
    in_parts, _ = lora_one.init(base_model(Case(3, "before", in_parts=True), folder))
    note("start in parts", lambda: lora_one.optimizer(in_parts))
    note("precondition in parts", lambda: lora_one.optimizer(in_parts, precondition=True, start_steps=0))
    return texts


def run_all(rank: int) -> dict[str, Any]:
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    warnings.simplefilter("ignore", FutureWarning)  # of torch.distributed, about DeepSpeed
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    if rank == 0:
        llama().model.save_pretrained(folder[0])
    torch.distributed.barrier()
    own = BATCHES[rank::PROCESSES]
    folded = {name: products(lora_one.init(llama().model, own, config=SETTINGS[name])[0]) for name in FOLDED}
    results = {name: run(case, rank, folder[0]) for name, case in CASES.items()}
    return {
        **results,
        "folded": folded,
        "files": files(rank, folder[0]),
        "errors": errors(rank, folder[0]),
        "left whole": {stage: left_whole(rank, folder[0], stage) for stage in (1, 2)},
        "resumed": {stage: resumed(rank, folder[0], stage) for stage in (1, 2, 3)},
    }


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return in_processes(run_all, PROCESSES)


@pytest.fixture(scope="module")
def alone() -> Callable[[Case], dict[str, Any]]:
    """One process on all batches."""
    kept: dict[str, dict[str, Any]] = {}

    def of(case: Case) -> dict[str, Any]:
        key = f"{case.config} {case.options}"
        if key not in kept:
            model, report = lora_one.init(llama().model, BATCHES, config=SETTINGS[case.config])
            result = {"start": products(model), "loss": report.base_loss}
            optimizer, losses = lora_one.optimizer(model, learning_rate=LEARNING_RATE, **case.options), []
            for batch in BATCHES[:3]:
                loss = model.train()(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
            kept[key] = {**result, "losses": losses, "end": products(model)}
        return kept[key]

    return of


@pytest.mark.feature("Sharded weights")
@pytest.mark.parametrize("name", CASES)
def test_a_model_in_an_engine_starts_and_trains_as_one_process(results, alone, name):
    expected, narrow = alone(CASES[name]), "bf16" in CASES[name].settings
    for of_rank in results:
        got = of_rank[name]
        assert_equal(got["start"], results[0][name]["start"], 0.0)
        if CASES[name].config in FOLDED:
            assert_equal(got["start"], of_rank["folded"][CASES[name].config])
            continue
        assert_equal(got["start"], expected["start"], 0.1 if narrow else 1e-5)
        assert got["batches"] == len(BATCHES)
        assert got["loss"] == pytest.approx(expected["loss"], rel=0.01 if narrow else 1e-6)
        np.testing.assert_allclose(got["losses"], expected["losses"], rtol=0.01 if narrow else 1e-6)
        assert_equal(got["end"], results[0][name]["end"], 0.0)
        if not narrow:
            assert_equal(got["end"], expected["end"], 5e-3 if CASES[name].options else 1e-4)


def test_an_engine_saves_whole_factors_and_others_load_them(results, alone):
    expected = alone(Case(3, "engine"))
    for of_rank in results:
        got = of_rank["files"]
        saved = {key.removeprefix("base_model.model.").removesuffix(".weight"): x.double().numpy()
                 for key, x in got["saved"].items()}  # fmt: skip
        assert_equal(saved, got["factors"], 0.0)
        for name in ("present", "new", "2"):
            assert_equal(got[f"loaded, {name}"], got["factors"], 0.0)
            np.testing.assert_allclose(got[f"losses, {name}"], expected["losses"], rtol=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_an_engine_that_leaves_weights_whole_is_saved_and_merged(results, stage):
    for of_rank in results:
        got = of_rank["left whole"][stage]
        saved = {key.removeprefix("base_model.model.").removesuffix(".weight"): x.double().numpy()
                 for key, x in got["saved"].items()}  # fmt: skip
        assert_equal(saved, got["factors"], 0.0)
        assert got["difference"] < 1e-5


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_training_continues_from_deepspeeds_checkpoint_to_the_bit(results, stage):
    for of_rank in results:
        whole, continued = of_rank["resumed"][stage]
        assert whole == continued
        assert whole[0] < of_rank[f"{stage} after"]["losses"][0]


@pytest.mark.parametrize("stage", [2, 3])
def test_errors_reach_all_processes_and_change_nothing(results, stage):
    for of_rank in results:
        texts = of_rank["errors"]
        assert "the loss must be finite" in texts[f"{stage} loss"]
        assert "OSError: no data left" in texts[f"{stage} late"]
        assert texts[f"{stage} unchanged"] is True
        assert "make lora_one.optimizer(model) before" in texts[f"{stage} optimizer"]
        assert "make lora_one.optimizer(model) before" in texts[f"{stage} optimizer of the engine"]
        assert "lora_one.init(model, batches) starts a model in an engine" in texts[f"{stage} without data"]
        assert "DeepSpeed ZeRO-3 keeps the weights in parts" in texts["3 merge"]
        assert "deepspeed.initialize was called before the model had LoRA" in texts[f"{stage} plain"]
        assert "deepspeed.initialize was called before the model had LoRA" in texts[f"{stage} plain engine"]


def test_what_needs_whole_factors_in_each_step_is_refused_before_anything_changes(results):
    for of_rank in results:
        texts = of_rank["errors"]
        for name in ("precondition", "start"):
            for stage in (1, 2, 3):
                assert "flatten weights, train with precondition=False" in texts[f"{stage} {name}"]
                assert texts[f"{stage} {name} unchanged"] is True
            assert "in parts, by deepspeed.zero.Init" in texts[f"{name} in parts"]
