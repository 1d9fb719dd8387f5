"""The harness is fair, its statistics are right, and its plan ends where it says."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.docstrings import ORDERS, beginnings, disordered_docstrings
from benchmarks.quality.__main__ import main
from benchmarks.quality.contenders import CONTENDERS
from benchmarks.quality.plan import repeat, sweep
from benchmarks.quality.results import (
    LADDER,
    Key,
    best_rate,
    interval,
    key_of,
    merge,
    missing_edge,
    read_rows,
    steps_to_reach,
    write_rows,
)
from benchmarks.quality.run import run
from benchmarks.quality.summary import paired, summarize
from benchmarks.quality.tasks import TASKS


def row(rate=1e-3, seed=0, valid_loss=1.0, contender="LoRA", losses=(1.0,) * 20, score=0.5, test_loss=1.0):
    key = Key("sort", "main", contender, 8, rate, seed)._asdict()
    measured = {"valid_loss": valid_loss, "test_loss": test_loss, "score": score, "losses": list(losses)}
    return key | measured | {"seconds_init": 1.0, "seconds_train": 2.0, "python": "3", "torch": "2"}


@pytest.mark.parametrize("values", [[1.0, 2.0], [0.1, 0.4, 0.2, 0.9, 0.3], list(range(10))])
def test_interval_is_scipys(values):
    found = interval(values)
    low, high = scipy.stats.t.interval(0.95, len(values) - 1, np.mean(values), scipy.stats.sem(values))
    assert found.mean == pytest.approx(np.mean(values))
    assert found.half == pytest.approx((high - low) / 2, rel=2e-4)  # the table of t has four digits
    assert found.count == len(values)


def test_one_value_has_no_interval():
    assert interval([3.0]).mean == 3.0 and math.isnan(interval([3.0]).half)


def test_steps_to_reach_by_hand():
    losses = [10.0] * 5 + [0.0] * 15  # the mean of the last ten: 5.0 at step 10, then 4, 3, 2, 1, 0
    assert steps_to_reach(losses, 5.0) == 10
    assert steps_to_reach(losses, 2.5) == 13
    assert steps_to_reach(losses, 0.0) == 15
    assert steps_to_reach(losses, -1.0) is None


def test_the_best_rate_is_chosen_on_validation_at_seed_0_and_a_diverged_run_never_is():
    rows = [row(1e-3, valid_loss=math.nan), row(2e-3, valid_loss=0.3), row(5e-3, valid_loss=0.4)]
    rows.append(row(5e-3, seed=1, valid_loss=0.1))
    assert best_rate(rows) == 2e-3
    assert missing_edge(rows) is None
    assert missing_edge(rows[1:]) == 1e-3
    assert missing_edge(rows[:2]) == 5e-3


@pytest.mark.parametrize("optimum", [1e-5, 3e-4, 4e-3, 0.3])
def test_a_sweep_goes_on_until_its_best_is_inside(optimum):
    """On a loss that is a parabola in log(rate)."""
    rows = []
    for key in sweep(rows, "sort", ["LoRA"], 8):
        rows.append(row(key.rate, valid_loss=math.log(key.rate / optimum) ** 2))
    rates = sorted(r["rate"] for r in rows)
    assert len(rates) >= 5 and len(set(rates)) == len(rates) and set(rates) <= set(LADDER)
    assert rates[0] < best_rate(rows) < rates[-1]
    assert best_rate(rows) == min(LADDER, key=lambda rate: abs(math.log(rate / optimum)))
    assert list(repeat(rows, "sort", ["LoRA", "PiSSA"], 8, 3)) == [
        Key("sort", "main", "LoRA", 8, best_rate(rows), seed) for seed in (1, 2)
    ]


def test_rates_that_are_asked_for_are_all_that_is_swept():
    assert [key.rate for key in sweep([], "sort", ["LoRA"], 8, [1e-3, 5e-3])] == [1e-3, 5e-3]


def test_summary_compares_seed_by_seed():
    falls = [4.0] * 10 + [1.0] * 10
    lora = [row(rate, valid_loss=abs(rate - 2e-3), losses=falls) for rate in (1e-3, 2e-3, 5e-3)]
    lora.append(row(2e-3, seed=1, score=0.3, losses=falls))
    ours = [row(rate, valid_loss=abs(rate - 2e-3), contender="LoRA-One", score=0.9, losses=[1.0] * 20)
            for rate in (1e-3, 2e-3, 5e-3)]  # fmt: skip
    ours.append(row(2e-3, seed=1, contender="LoRA-One", score=0.6, losses=[1.0] * 20))
    reference = summarize(lora + ours, "sort", "LoRA", 8, None)
    found = summarize(lora + ours, "sort", "LoRA-One", 8, reference)
    assert found.rate == 2e-3 and found.swept == 3 and not found.edge
    assert found.score.mean == pytest.approx(0.75) and found.first.mean == 1.0
    assert found.steps == [10, 10] and reference.steps == [20, 20]
    difference = paired(found.rows, reference.rows, "score")
    assert difference.mean == pytest.approx(0.35) and difference.count == 2


def test_rows_are_written_one_a_line_and_read_back(tmp_path):
    rows = [row(seed=seed, valid_loss=float("nan") if seed else 1.0) for seed in range(3)]
    write_rows(rows, tmp_path / "rows.json")
    again = read_rows(tmp_path / "rows.json")
    assert [key_of(r) for r in again] == [key_of(r) for r in rows] and math.isnan(again[1]["valid_loss"])
    assert len((tmp_path / "rows.json").read_text().splitlines()) == 5


def test_committed_rows_are_all_different_runs():
    counts = Counter(map(key_of, read_rows()))
    assert counts and max(counts.values()) == 1


@pytest.fixture(scope="module")
def task():
    full = TASKS["sort"]()
    return replace(full, steps=12, batch_size=4, init_batches=2, valid=full.valid[:16], test=full.test[:16])


def test_a_seed_fixes_the_data_and_splits_do_not_meet(task):
    first, again, other = ([b["input_ids"].tolist() for b in task.training_batches(seed)] for seed in (0, 0, 1))
    assert first == again != other
    splits = [{tuple(item.tokens) for item in items} for items in (task.train, task.valid, task.test)]
    assert not splits[0] & splits[1] and not splits[0] & splits[2] and not splits[1] & splits[2]


def test_starts_that_should_not_change_the_function_do_not_and_ours_does(task):
    """The first loss, before any step: LoRA, PiSSA and LoRA-GA compute what the base model does."""
    first = next(task.training_batches(0))
    with torch.no_grad():
        base = float(task.loss_fn(task.base.train(), first))
    for name in ("full fine-tuning", "LoRA", "PiSSA", "LoRA-GA", "LoRA+"):
        measured = run(task, CONTENDERS[name], 8, 1e-3, seed=0)
        assert measured["losses"][0] == pytest.approx(base, rel=2e-3), name
        assert len(measured["losses"]) == task.steps and measured["seconds_train"] > 0
    ours = run(task, CONTENDERS["LoRA-One"], 8, 1e-3, seed=0, measure_energy=True)
    assert ours["losses"][0] < 0.98 * base
    assert 0.98 < ours["energy"] <= 1.0 + 1e-4 and ours["gamma"] == 128.0
    again = run(task, CONTENDERS["LoRA-One"], 8, 1e-3, seed=0)
    assert again["losses"] == ours["losses"] and again["score"] == ours["score"]


def test_docstrings_are_in_the_order_that_they_are_labelled_with():
    """Against the text as it was written, found by its words; no text comes twice, so splits cannot share one."""
    written = beginnings(8)
    bags = Counter(tuple(sorted(text.split())) for text in written)
    known = {bag: text.split() for text in written if bags[bag := tuple(sorted(text.split()))] == 1}
    texts = disordered_docstrings()
    assert len(texts) == len(written) > 3000 and texts == disordered_docstrings()
    orders = Counter()
    for order, text in texts:
        words = text.split()
        if (original := known.get(tuple(sorted(words)))) is not None:
            back = {"as written": words, "reversed": words[::-1], "halves exchanged": words[4:] + words[:4]}
            assert back.get(ORDERS[order], original) == original
            orders[ORDERS[order]] += 1
            orders["untouched"] += words == original
    assert min(orders[name] for name in ORDERS) > len(texts) / 5
    assert orders["untouched"] == pytest.approx(orders["as written"], abs=20)  # but for repeated words


def test_merging_takes_what_is_new_and_refuses_what_differs(tmp_path):
    ours, theirs = [row(seed=0), row(seed=1, valid_loss=math.nan)], [row(seed=1, valid_loss=math.nan), row(seed=2)]
    assert [r["seed"] for r in merge(ours, theirs)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"1 runs .*\nsort main LoRA 8 0.001 2"):
        merge([*ours, row(seed=2, test_loss=0.9)], theirs)


def test_the_command_merges_files(tmp_path, monkeypatch, capsys):
    mine, all_of_them = tmp_path / "mine.json", tmp_path / "all.json"
    write_rows([row(seed=0)], all_of_them)
    write_rows([row(seed=1)], mine)
    monkeypatch.setattr("sys.argv", ["quality", "--result", str(all_of_them), "--merge", str(mine)])
    main()
    assert [r["seed"] for r in read_rows(all_of_them)] == [0, 1] and "2 runs" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["quality", "--result", str(all_of_them), "--merge", str(tmp_path / "none.json")])
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        main()
