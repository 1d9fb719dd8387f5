"""The benchmark of the deferred start: who is compared, and the arithmetic of its tables."""

import dataclasses

import pytest

from benchmarks import deferred
from benchmarks.quality.tasks import TASKS


@pytest.fixture
def small(monkeypatch):
    """A short job, and contenders whose starts it has room for."""
    task = TASKS["t5"]()
    short = dataclasses.replace(task, steps=24, test=task.test[:8], train=task.train[:64])
    monkeypatch.setitem(TASKS, "t5", lambda: short)
    monkeypatch.setattr(deferred, "DEFERRED", {"6 steps": 6, "16 steps": 3})


def test_every_contender_runs_and_rows_that_are_there_are_not_made_again(small):
    rows = list(deferred.quality(["t5"], [4], 1, []))
    assert [row["contender"] for row in rows] == [deferred.EXPLICIT, "6 steps", "16 steps"]
    assert {row["rate"] for row in rows} == {deferred.RATES["t5"] / 2}
    assert len({row["test_loss"] for row in rows}) == 3
    assert list(deferred.quality(["t5"], [4], 1, rows)) == []


def test_the_factors_hold_more_of_the_gradient_after_each_step(small):
    rows = list(deferred.directions(["t5"], [8], 1))
    assert [row["step"] for row in rows] == [1, 2, 3]
    held = [row["median"] for row in rows]
    assert held[0] < 0.2 < held[1] <= held[2] + 0.05


def test_tables_pair_by_seed():
    rows = [
        {"task": "sort", "batch": 4, "contender": name, "seed": seed, "score": score, "test_loss": 1.0}
        for name, scores in {deferred.EXPLICIT: (0.5, 0.6, 0.9), "auto": (0.52, 0.64)}.items()
        for seed, score in enumerate(scores)
    ]
    # Differences 2 and 4 points: mean 3, standard error 1, t of one degree of freedom 12.7.
    assert deferred.difference(rows, "sort", 4, "auto") == "+3.0 ± 12.7 (2)"
    assert deferred.difference(rows, "sort", 4, "6 steps") == ""
    assert "| sort | 4     | 66.7" in deferred.tables({"quality": rows})
