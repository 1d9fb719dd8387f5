"""docs/evidence/quality.md is what the generator makes of the committed JSON."""

import re

import numpy as np
import pytest
import scipy.stats

from benchmarks.page import PAGE, make_page
from benchmarks.page.comparisons import compare, counted, named
from benchmarks.page.markdown import table, with_interval
from benchmarks.quality.plan import FASTER_B, INTERVENTIONS, OURS, PEERS, TODAY
from benchmarks.quality.results import Interval, write_rows
from tests.benchmarks.test_quality import cell, row


def test_the_committed_page_is_the_generated_one():
    assert PAGE.read_text(encoding="utf-8") == make_page()


def test_every_picture_and_page_it_links_is_there():
    links = re.findall(r"\]\((?!http)([^)#]+)", PAGE.read_text(encoding="utf-8"))
    assert any(link.endswith(".png") for link in links)
    assert [link for link in links if not (PAGE.parent / link).is_file()] == []


def test_without_results_there_is_an_introduction_and_nothing_else(tmp_path):
    page = make_page(tmp_path)
    assert page.startswith("# Results") and page.count("#") == 1


def test_numbers_of_made_up_rows(tmp_path):
    """Two contenders whose table can be worked out by hand."""
    falls = [3.0] * 80 + [1.0] * 20
    rows = cell("LoRA", 2e-3, (0.4, 0.5), falls, test_loss=0.25)
    rows += cell(TODAY, 3e-3, (0.5, 0.6), [1.0] * 100, test_loss=0.25)
    write_rows(rows, tmp_path / "quality.json")
    page = make_page(tmp_path)
    # five times 40 and 50: mean 45, standard deviation 5 sqrt(10 / 9), t(9) 2.262 x 5.27 / sqrt(10) = 3.8
    assert "| LoRA | 0.002 | 45.0 ± 3.8 | 0.250 ± 0.000 | 3.00 ± 0.00 | 100 | 3.0 | 1.0 + 2.0 |" in page
    # LoRA-One is at LoRA's final loss of 1.0 as soon as there are ten losses to average
    ours = f"{TODAY} (default) | 0.003 | 55.0 ± 3.8 | 0.250 ± 0.000 | 1.00 ± 0.00 | 10 (10.0x) | 1.2 | 1.0 + 2.0 |"
    assert ours in page
    assert "| sort, r = 8 | **+10.0 ± 0.0** |" in page and "1 comparisons, paired by seed" in page
    assert "LoRA-One is ahead in 1, level in 0, behind in 0 of 1 cells" in page
    assert "| LoRA | 3.000 | 2.000 | **1.000** | 2.000 | 3.000 |  |" in page  # the sweep
    assert f"{len(rows)} runs, " in page


def test_a_lead_is_bold_only_if_it_holds_for_all_comparisons_of_the_table(tmp_path):
    """Leads by seed of 1, 2, 3, ..., 10 points less a shift, over five peers: what one alone would show is italic."""
    by_seed = [0.5 + 0.01 * i for i in range(10)]  # mean 0.545, standard deviation 0.0303: t(9) gives 2.17 points
    rows = cell(TODAY, 2e-3, by_seed)
    for peer, level in zip(PEERS, (0.5, 0.52, 0.544, 0.57, 0.6), strict=True):
        rows += cell(peer, 2e-3, (level,))
    comparisons = compare(rows, (TODAY,), PEERS)
    assert [c.verdict for c in comparisons] == ["ahead", "level", "level", "level", "behind"]
    assert [c.cell for c in comparisons] == [
        "**+4.5 ± 2.2**",
        "*+2.5 ± 2.2*",
        "+0.1 ± 2.2",
        "*-2.5 ± 2.2*",
        "**-5.5 ± 2.2**",
    ]
    wide = scipy.stats.t.ppf(1 - 0.025 / 5, 9) * np.std(by_seed, ddof=1) / 10**0.5
    assert comparisons[0].corrected.half == pytest.approx(wide)
    assert counted(comparisons) == "ahead in 1, level in 3, behind in 1 of 5"
    assert named(comparisons, "behind") == "sort at rank 8"


def test_the_verdict_of_an_interval():
    leads = [(0.2, 0.1), (-0.2, 0.1), (0.1, 0.1), (-0.1, 0.2), (0.0, 0.0), (0.2, float("nan"))]
    verdicts = [Interval(mean, half, 10).verdict for mean, half in leads]
    assert verdicts == ["ahead", "behind", "level", "level", "level", "level"]


def test_the_counts_against_peers_are_told_apart_by_rank(tmp_path):
    """Ahead of one and level with one at rank 8, level with one at rank 32."""
    rows = cell(TODAY, 2e-3, (0.6,)) + cell("PiSSA", 2e-3, (0.5,)) + cell("LoRA+", 2e-3, (0.6,)) + cell()
    rows += [r | {"rank": 32} for r in cell(TODAY, 2e-3, (0.6,)) + cell("rsLoRA", 2e-3, (0.6,))]
    write_rows(rows, tmp_path / "quality.json")
    counts = "ahead in 1, level in 1, behind in 0 of 2, at higher ranks ahead in 0, level in 1, behind in 0 of 1;"
    assert f"ahead in 1, level in 2, behind in 0 of 3**: up to rank 16 {counts}" in make_page(tmp_path)


def test_a_loss_that_may_be_chance_is_told_as_well(tmp_path):
    """Behind one of two peers by 2.5 +- 2.2 points at one rank, which the correction for five comparisons widens."""
    by_seed = [0.5 + 0.01 * i for i in range(10)]  # mean 0.545
    rows = cell(TODAY, 2e-3, by_seed) + cell("LoRA-GA", 2e-3, (0.57,)) + cell("PiSSA", 2e-3, (0.545,)) + cell()
    rows += [r | {"rank": 64} for r in rows]
    rows = [r for r in rows if (r["rank"], r["contender"]) != (8, "LoRA-GA")]
    write_rows(rows, tmp_path / "quality.json")
    page = make_page(tmp_path)
    assert "ahead in 0, level in 3, behind in 0 of 3**" in page
    assert "alone it is behind LoRA-GA in sort at rank 64 (-2.5 ± 2.2)." in page


def test_the_balances_are_compared_with_the_papers(tmp_path):
    paper, even, between = OURS
    rows = cell(paper, 2e-3, (0.5,), moved=4.0, update_rank=2.0) + cell(even, 2e-3, (0.6,), moved=0.5, update_rank=6.0)
    rows += cell(between, 2e-3, (0.55,))
    for name, score in zip(INTERVENTIONS, (0.51, 0.52, 0.53, 0.5), strict=True):
        rows += [r | {"rank": 32} for r in cell(name, 2e-3, (score,))]
    rows += [r | {"rank": 32} for r in cell(paper, 2e-3, (0.5,)) + cell(even, 2e-3, (0.6,))]
    write_rows(rows, tmp_path / "quality.json")
    page = make_page(tmp_path)
    assert "3 comparisons" in page and "|  | balance 0 | balance 0.25, gamma 64 |" in page
    assert "| sort, r = 8 | **+10.0 ± 0.0** | **+5.0 ± 0.0** |" in page
    assert "| +0.000 ± 0.000 | 4.00 | 0.50 | 2.0 | 6.0 |" in page  # how far A moved, and the directions
    kept = "| sort: the paper's start, A kept for 20 steps | 0.002 | 51.0 ± 0.0 | **+1.0 ± 0.0** |"
    assert kept in page


def test_ablations_are_compared_within_a_seed(tmp_path):
    """The exact gradient loses 5 and 15 points to one pass: 10, and t(1) 12.706 x 7.071 / sqrt(2) = 63.5."""
    ablated = {"group": "gradient", "task": "minilm"}
    scores = {"exact": (0.5, 0.6), "one pass": (0.55, 0.75)}
    rows = [row(seed=s, contender=n, score=x) | ablated for n, both in scores.items() for s, x in enumerate(both)]
    write_rows(rows, tmp_path / "ablations.json")
    page = make_page(tmp_path)
    assert (
        "seeds | accuracy, % | test loss | loss of steps 1-20 | points over one pass | seconds of the start |" in page
    )
    assert "| exact | 2 | 55.0 ± 63.5 | 1.000 ± 0.000 | 1.00 ± 0.00 | -10.0 ± 63.5 | 1.0 |" in page
    assert "| one pass | 2 | 65.0 ± 127.1 | 1.000 ± 0.000 | 1.00 ± 0.00 |  | 1.0 |" in page


def test_a_higher_rate_of_b_is_compared_with_the_same_rate(tmp_path):
    write_rows(cell(TODAY, 2e-3, (0.5,)) + cell(FASTER_B[1], 5e-4, (0.45,)), tmp_path / "quality.json")
    page = make_page(tmp_path)
    assert "|  | B at 16x the rate |" in page and "| sort, r = 8 | **-5.0 ± 0.0** |" in page


def test_a_random_heads_quality_is_by_the_protocol(tmp_path):
    (tmp_path / "heads.json").write_text('{"fitted_head_alone": 0.425, "overlap": {}, "rank": 8, "layers": 36}')
    rows = cell("LoRA", 2e-3, (0.5,)) + cell(TODAY, 1e-3, (0.55,))
    write_rows([r | {"task": "minilm-random"} for r in rows], tmp_path / "quality.json")
    page = make_page(tmp_path)
    assert "| LoRA, random head | 0.002 | 50.0 ± 0.0 | 1.000 ± 0.000 |" in page
    assert f"| {TODAY}, random head | 0.001 | 55.0 ± 0.0 | 1.000 ± 0.000 |" in page


def test_spread_ranks_are_compared_with_uniform_ones_within_a_seed(tmp_path):
    """5 and 15 points over the uniform ranks: 10, and t(1) 12.706 x 7.071 / sqrt(2) = 63.5."""
    scores = {"LoRA-One": (0.5, 0.6), "LoRA-One, adaptive rank": (0.55, 0.75)}
    size = {"parameters": 10}
    rows = [row(seed=s, contender=n, score=x) | size for n, both in scores.items() for s, x in enumerate(both)]
    write_rows(rows, tmp_path / "adaptive_rank.json")
    page = make_page(tmp_path)
    assert "| sort: LoRA-One, rank 8 everywhere | 0.001 | 2 | 10 | 55.0 ± 63.5 |  | 1.000 ± 0.000 |  |" in page
    assert "(S_i / S_1)² | 0.001 | 2 | 10 | 65.0 ± 127.1 | +10.0 ± 63.5 | 1.000 ± 0.000 | +0.000 ± 0.000 |" in page


def test_the_lead_of_lora_ones_start_for_dora_is_within_a_seed(tmp_path):
    """5 and 15 points over DoRA: 10, and t(1) 12.706 x 7.071 / sqrt(2) = 63.5."""
    scores = {"DoRA": (0.5, 0.6), "LoRA-One, DoRA": (0.55, 0.75)}
    rows = [row(seed=s, contender=n, score=x) for n, both in scores.items() for s, x in enumerate(both)]
    write_rows(rows, tmp_path / "dora.json")
    page = make_page(tmp_path)
    assert (
        "| sort: DoRA, its own start | 0.001 | 2 | 55.0 ± 63.5 | +10.0 ± 63.5 | 1.000 ± 0.000 | 1.00 ± 0.00 |" in page
    )


def test_what_the_head_alone_can_do_is_beside_its_task(tmp_path):
    write_rows([r | {"task": "minilm"} for r in cell()], tmp_path / "quality.json")
    (tmp_path / "heads.json").write_text('{"fitted_head_alone": 0.425, "overlap": {}, "rank": 8, "layers": 36}')
    assert "The fitted head alone, from which all go on, is right in 42.5 % of the older" in make_page(tmp_path)


def test_markdown():
    assert table(["", "x"], [["a", "1"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |\n"
    assert with_interval(Interval(0.5, 0.25, 3), 100) == "50.0 ± 25.0"
    assert with_interval(Interval(-0.5, float("nan"), 1), 1, 2, "+") == "-0.50"
