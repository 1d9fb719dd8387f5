"""A run that is killed and resumed is, bit for bit, the run that never was."""

import json
import random
from pathlib import Path

import pytest

from lora_one import demo
from lora_one.checkpoint.folder import METADATA
from tests.files import killed

SMALL = {"rank": 2, "batch_size": 2, "init_batches": 1, "passes": 2, "warmup": 1, "targets": ["q_proj"]}
EVALUATION = {"eval_every": 3, "keep_best": True, "learning_rate": 0.1}
# 10 sequences: an epoch is 5 micro-batches, which two do not divide; the moments are in different epochs.
TORCH = {
    "start": {"rank_max": 4, "dropout": 0.2, "epochs": 3, "accumulation": 2, "schedule": "cosine", **EVALUATION},
    "plain": {"dropout": 0.2, "steps": 9, "precondition": True, "reg": 1e-2, "dtype": "bfloat16", "plain": True},
}
_MOMENTS = random.Random(0)
KILLS = {
    "start": [
        {"step": 1},  # before the first checkpoint
        *({"change": _MOMENTS.randrange(1, 40)} for _ in range(2)),
        {"step": 8},
    ],
    "plain": [{"change": _MOMENTS.randrange(20, 40)}, {"step": 8}],
}


@pytest.fixture
def settings(tmp_path):
    rows = demo.TRAIN.read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:10]))
    (tmp_path / "valid.jsonl").write_text("\n".join(rows[10:12]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[12:14]))
    return {**SMALL, "model": str(demo.MODEL), "data": str(tmp_path), "save_every": 2, "resume": True}


def uninterrupted(settings: dict, out: Path) -> dict:
    whole = killed.run({**settings, "out": str(out), "save_every": None, "resume": False})
    assert not (out / "checkpoints").exists()
    assert whole["losses"] == whole["told"]
    return whole


def files(folder: Path) -> dict[str, bytes]:
    """The adapter that a user gets; but for the times and the memory that its metadata has."""
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name != METADATA}


def check_same(found: dict, whole: dict, out: Path, reference: Path) -> None:
    for name in ("losses", "told", "validations", "scores", "start"):
        assert found[name] == whole[name], name
    assert files(out) == files(reference)
    made, expected = (json.loads((folder / METADATA).read_text())["report"] or {} for folder in (out, reference))
    assert made.get("layers") == expected.get("layers")


@pytest.mark.feature("Resume", "torch")
@pytest.mark.parametrize("job", TORCH)
def test_torch_is_killed_again_and_again(job, settings, tmp_path):
    settings |= {"backend": "torch", "test": str(tmp_path / "test.jsonl"), **TORCH[job]}
    reference, out = tmp_path / "whole", tmp_path / "out"
    whole = uninterrupted(settings, reference)
    assert len(whole["losses"]) == 9
    assert whole["validations"]["before"] != whole["validations"]["after"]
    again = {**settings, "out": str(out)}
    for moment in KILLS[job]:
        assert killed.run(again, **moment) is None
    found = killed.run(again)
    check_same(found, whole, out, reference)
    assert found["resumed"] == 6
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-9"]


@pytest.mark.parametrize("backend", [pytest.param(x, marks=pytest.mark.feature("Resume", x)) for x in ("jax", "mlx")])
def test_the_others_are_killed_once(backend, settings, tmp_path):
    settings |= {"backend": backend, "steps": 6, "accumulation": 2, "schedule": "cosine"}
    settings |= {"precondition": True, "reg": 1e-2, "dropout": 0.2}
    # JAX compiles for seconds what a start and a validation need.
    alone = {"plain": True, "data": str(tmp_path / "train.jsonl")}
    settings |= alone if backend == "jax" else {"rank_max": 4, **EVALUATION}
    reference, out = tmp_path / "whole", tmp_path / "out"
    whole = uninterrupted(settings, reference)
    again = {**settings, "out": str(out)}
    assert killed.run(again, step=5) is None
    found = killed.run(again)
    check_same(found, whole, out, reference)
    assert found["resumed"] == 4
