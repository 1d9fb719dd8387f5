"""The harness is fair, its statistics are right, and its search for a rate ends where the protocol says."""

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from benchmarks.docstrings import ORDERS, beginnings, disordered_docstrings
from benchmarks.energy import exact_gradients, factors_of, shares_of_best
from benchmarks.preconditioner.rules import Rule
from benchmarks.quality import protocol, stale
from benchmarks.quality.__main__ import cells, taken, without
from benchmarks.quality.contenders import CONTENDERS
from benchmarks.quality.interventions import ByRule, Remembering
from benchmarks.quality.plan import CELLS, FASTER_B, INTERVENTIONS, PRECONDITIONED, TODAY, ablate
from benchmarks.quality.protocol import CHOICE_SEEDS, LADDER, TEST_SEEDS
from benchmarks.quality.results import (
    ABLATIONS,
    Key,
    add_row,
    interval,
    key_of,
    merge,
    read_rows,
    steps_to_reach,
    write_rows,
)
from benchmarks.quality.run import run, train
from benchmarks.quality.summary import by_protocol, paired, summarize
from benchmarks.quality.tasks import NUMPY, TASKS, word_order
from benchmarks.quality.update import factors_by_layer, update_rank


def row(rate=1e-3, seed=0, valid_loss=1.0, contender="LoRA", losses=(1.0,) * 20, score=0.5, test_loss=1.0, **others):
    key = Key("sort", "main", contender, 8, rate, seed)._asdict()
    measured = {"valid_loss": valid_loss, "test_loss": test_loss, "score": score, "losses": list(losses)}
    made_with = {"seconds_init": 1.0, "seconds_train": 2.0, "python": "3", "torch": "2"}
    return key | measured | made_with | {"moved": 0.5, "update_rank": 3.0} | others


def cell(contender="LoRA", rate=2e-3, scores=(0.5,), losses=(1.0,) * 20, **others):
    """All rows of a cell whose best rate is `rate`: the score of test seed i is the i-th, over and over."""
    index = LADDER.index(rate)
    rows = [
        row(LADDER[index + step], seed, 1.0 + abs(step), contender, **others)
        for step in (-2, -1, 0, 1, 2)
        for seed in CHOICE_SEEDS
    ]
    scored = zip(TEST_SEEDS, list(scores) * 10, strict=False)
    return rows + [row(rate, s, None, contender, losses, score, **others) for s, score in scored]


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


def test_the_ladder_has_six_rates_a_decade():
    assert LADDER[LADDER.index(1e-3) : LADDER.index(1e-2) + 1] == (1e-3, 1.5e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2)


def test_no_seed_chooses_and_tests():
    assert len(TEST_SEEDS) == 10 and not set(TEST_SEEDS) & set(CHOICE_SEEDS)


@pytest.mark.parametrize("optimum", [1e-5, 3.2e-4, 4e-3, 0.2])
def test_a_search_ends_with_two_rates_on_each_side_at_all_choice_seeds(optimum):
    """On a loss that is a parabola in log(rate), with noise that the seeds share out: their mean is the parabola."""
    rows = []
    for key in protocol.choice(rows, "sort", "LoRA", 8, 3e-3):
        assert protocol.chosen_rate(rows) is None and list(protocol.test(rows, "sort", "LoRA", 8)) == []
        rows.append(row(key.rate, key.seed, math.log(key.rate / optimum) ** 2 + 0.3 * (key.seed - 1)))
    best = min(LADDER, key=lambda rate: abs(math.log(rate / optimum)))
    assert protocol.chosen_rate(rows) == best
    at = LADDER.index(best)
    complete = protocol.validation(rows)
    assert set(LADDER[at - 2 : at + 3]) <= set(complete)
    assert Counter((r["rate"], r["seed"]) for r in rows).most_common(1)[0][1] == 1
    assert list(protocol.test(rows, "sort", "LoRA", 8)) == [
        Key("sort", "main", "LoRA", 8, best, seed) for seed in TEST_SEEDS
    ]


def test_a_diverged_seed_rules_a_rate_out_and_older_runs_count():
    older = [row(2e-3, 0, 0.1), row(5e-3, 0, 0.05), row(5e-3, 1, math.nan), row(4e-3, 0, 0.0)]  # 4e-3 is no rung
    rows = list(older)
    for key in protocol.choice(rows, "sort", "LoRA", 8, 1e-5):
        rows.append(row(key.rate, key.seed, 1.0 + abs(math.log(key.rate / 3e-3))))
    assert protocol.validation(rows)[5e-3] == math.inf
    assert protocol.chosen_rate(rows) == 2e-3  # (0.1 + 1.41 + 1.41) / 3 by its older run
    assert min(r["rate"] for r in rows) > 5e-4  # the search began where the older runs were best, not at `first`


def test_a_cell_is_compared_when_all_its_test_seeds_are_there():
    rows = cell(scores=(0.4, 0.6))
    assert [r["seed"] for r in protocol.tested(rows, "sort", "LoRA", 8)] == list(TEST_SEEDS)
    assert protocol.tested(rows[:-1], "sort", "LoRA", 8) == []
    assert protocol.tested(rows[1:], "sort", "LoRA", 8) == []  # the rate two below was not run with seed 0


def test_summary_compares_seed_by_seed():
    falls = [4.0] * 10 + [1.0] * 10
    rows = cell(scores=(0.5, 0.3), losses=falls) + cell(TODAY, 3e-3, (0.9, 0.6), [1.0] * 20)
    found = by_protocol(rows, "sort", 8, ("LoRA", "PiSSA", TODAY))
    assert list(found) == ["LoRA", TODAY]
    assert found[TODAY].rate == 3e-3 and found[TODAY].score.mean == pytest.approx(0.75)
    assert found[TODAY].first.mean == 1.0 and set(found[TODAY].steps) == {10} and set(found["LoRA"].steps) == {20}
    difference = paired(found[TODAY].rows, found["LoRA"].rows, "score")
    assert difference.mean == pytest.approx(0.35) and difference.count == 10
    assert summarize("LoRA", []) is None


@pytest.mark.parametrize("comparisons", [2, 17])
def test_an_interval_for_several_comparisons_is_bonferronis(comparisons):
    values = [0.1, 0.4, 0.2, 0.9, 0.3]
    _, high = scipy.stats.t.interval(1 - 0.05 / comparisons, 4, np.mean(values), scipy.stats.sem(values))
    assert interval(values, comparisons).half == pytest.approx(high - np.mean(values), rel=1e-9)


def test_rows_are_written_one_a_line_and_read_back(tmp_path):
    rows = [row(seed=seed, valid_loss=float("nan") if seed else 1.0) for seed in range(3)]
    write_rows(rows, tmp_path / "rows.json")
    again = read_rows(tmp_path / "rows.json")
    assert [key_of(r) for r in again] == [key_of(r) for r in rows] and math.isnan(again[1]["valid_loss"])
    assert len((tmp_path / "rows.json").read_text().splitlines()) == 5


@pytest.mark.parametrize("file", [None, ABLATIONS])
def test_committed_rows_are_all_different_runs(file):
    counts = Counter(map(key_of, read_rows(file) if file else read_rows()))
    assert counts and max(counts.values()) == 1


def test_those_who_add_rows_at_once_lose_none_of_each_other(tmp_path):
    """Threads: the lock is of the opened file, so that it holds between them as between processes."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda seed: add_row(row(seed=seed), tmp_path / "rows.json"), range(40)))
    assert sorted(r["seed"] for r in read_rows(tmp_path / "rows.json")) == list(range(40))


def test_a_cell_that_is_made_again_loses_its_runs_and_no_other_does(tmp_path):
    write_rows(cell() + cell("PiSSA") + [row(seed=1) | {"rank": 4}], tmp_path / "rows.json")
    without([("sort", 8, "LoRA")], tmp_path / "rows.json")
    kept = read_rows(tmp_path / "rows.json")
    assert Counter((r["contender"], r["rank"]) for r in kept) == {("PiSSA", 8): 25, ("LoRA", 4): 1}


def test_a_cell_is_worked_on_by_one_process(tmp_path):
    with taken(tmp_path, CELLS[0]) as mine, taken(tmp_path, CELLS[0]) as again, taken(tmp_path, CELLS[1]) as other:
        assert (mine, again, other) == (True, False, True)
    with taken(tmp_path, CELLS[0]) as mine:
        assert mine


def test_the_plan_has_every_rank_and_names_that_exist():
    assert {rank for _, rank, _ in CELLS} == {4, 8, 16, 32, 64}
    assert {task for task, _, _ in CELLS} == set(TASKS)
    assert {name for *_, name in CELLS} <= set(CONTENDERS) and TODAY in CONTENDERS
    assert len(INTERVENTIONS) == len(PRECONDITIONED) == 4 and len(FASTER_B) == 2
    options = type("Options", (), {"tasks": ["t5"], "ranks": [3], "only": ["LoRA"]})
    assert cells(options) == [("t5", 3, "LoRA")]


def test_ablations_are_at_the_chosen_rate_on_the_first_test_seeds():
    keys = list(ablate(cell(TODAY), "sort", ["gradient", "reg"], 2))
    found = [(key.contender, key.rate, key.seed) for key in keys]
    assert found == [(name, 2e-3, seed) for seed in (10, 11) for name in ("one pass", "exact")]  # no rate for reg


@pytest.fixture(scope="module")
def task():
    full = TASKS["sort"]()
    few = {name: getattr(full, name)[:16] for name in ("valid", "test", "fresh")}
    return replace(full, steps=12, batch_size=4, init_batches=2, **few)


def test_a_seed_fixes_the_data_and_splits_do_not_meet(task):
    first, again, other = ([b["input_ids"].tolist() for b in task.training_batches(seed)] for seed in (0, 0, 1))
    assert first == again != other
    splits = [{tuple(item.tokens) for item in items} for items in (task.train, task.valid, task.test, task.fresh)]
    assert sum(map(len, splits)) == len(set.union(*splits))


@pytest.mark.parametrize("name", ["sort", "desc", "t5"])
def test_new_test_items_are_right_and_were_in_no_other_split(name):
    task = TASKS[name]()
    splits = [set(map(repr, items)) for items in (task.train, task.valid, task.test, task.fresh)]
    assert len(splits[3]) == 512 and not splits[3] & (splits[0] | splits[1] | splits[2])
    other = replace(task, fresh=task.fresh[1:])
    assert task.digest() == TASKS[name]().digest() != other.digest()


def test_minilms_new_texts_are_numpys():
    task = word_order(fit_head_on=0)
    fresh, known = ({tuple(sorted(t.split())) for _, t in x} for x in (task.fresh, disordered_docstrings()))
    assert len(task.fresh) == 512 and not fresh & known
    assert set(task.fresh) <= set(disordered_docstrings(root=NUMPY))


def test_starts_that_should_not_change_the_function_do_not_and_ours_does(task):
    """The first loss, before any step: LoRA, PiSSA and LoRA-GA compute what the base model does."""
    first = next(task.training_batches(0))
    with torch.no_grad():
        base = float(task.loss_fn(task.base.train(), first))
    for name in ("full fine-tuning", "LoRA", "PiSSA", "LoRA-GA", "LoRA+"):
        measured = run(task, CONTENDERS[name], 8, 1e-3, seed=0)
        assert measured["losses"][0] == pytest.approx(base, rel=2e-3), name
        assert len(measured["losses"]) == task.steps and measured["seconds_train"] > 0
    ours = run(task, CONTENDERS[TODAY], 8, 1e-3, seed=0)
    assert ours["losses"][0] < 0.98 * base
    assert ours["gamma"] == 128.0 and ours["passes"] == 1
    gradients = exact_gradients(task.model(), task.start_batches(0), task.loss_fn, task.targets)
    started, _ = CONTENDERS[TODAY].start(task, 8, 0)
    shares = shares_of_best(gradients, {name: factors_of(started, name) for name in gradients})
    assert 0.98 < min(shares.values()) <= 1.0 + 1e-4
    again = run(task, CONTENDERS[TODAY], 8, 1e-3, seed=0)
    assert again["moved"] > 0 and 1.0 < again["update_rank"] <= 8.0
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


def test_what_todays_code_no_longer_makes_is_found(task):
    made = run(task, CONTENDERS[TODAY], 4, 1e-3, seed=1, on=["valid"])
    kept = row(1e-3, 1, contender=TODAY) | {"rank": 4, "data": task.digest(), **made}
    assert stale.reason(kept, task) is None
    assert "loss" in stale.reason(kept | {"contender": "LoRA"} | {"passes": None}, task)
    assert "loss" in stale.reason(kept | {"seed": 2}, task)
    assert stale.reason(kept | {"data": "00000000"}, task) == "other data"
    assert stale.reason(kept | {"passes": 4}, task) == "a start in 4 passes, 1 today"


def test_directions_of_an_update_are_counted():
    """Singular values 1, 1, 1, 1: four directions; with 1, 0, 0, 0 one. A start that moved the base is taken off."""
    model = torch.nn.Module()
    model.lora_A = torch.nn.ModuleDict({"default": torch.nn.Linear(6, 4, bias=False)})
    model.lora_B = torch.nn.ModuleDict({"default": torch.nn.Linear(4, 5, bias=False)})
    with torch.no_grad():
        model.lora_A["default"].weight.copy_(torch.eye(4, 6))
        model.lora_B["default"].weight.copy_(torch.eye(5, 4))
    start = factors_by_layer(model)
    assert update_rank(start, model, moves_base=False) == pytest.approx(4.0)
    with torch.no_grad():
        model.lora_B["default"].weight[0, 0] = 3.0
    assert update_rank(start, model, moves_base=True) == pytest.approx(1.0)
    assert update_rank({}, model, moves_base=True) is None


def test_interventions_do_to_a_what_they_say(task):
    """Against the same run without them, by how far A is from its start after ten steps."""
    paper = train(task, CONTENDERS["LoRA-One, balance 0.5"], 4, 5e-3, seed=0)
    kept, tenth, clamped, restarted = (train(task, CONTENDERS[name], 4, 5e-3, seed=0) for name in INTERVENTIONS)
    assert kept.early == 0.0 and paper.losses[0] == kept.losses[0]
    assert 0.05 < tenth.early / paper.early < 0.3
    assert clamped.early < min(1.1**10 - 1, 0.8 * paper.early)
    assert restarted.losses[:10] == paper.losses[:10] and restarted.losses[11] != paper.losses[11]


def test_the_rules_without_a_preconditioner_are_torchs_adamw(task):
    losses = []
    for make in (Remembering, lambda model, rate: ByRule(model, rate, Rule("adam"))):
        contender = replace(CONTENDERS[TODAY], optimizer=make)
        losses.append(train(task, contender, 4, 1e-3, seed=0).losses)
    np.testing.assert_allclose(*losses, rtol=2e-3)
