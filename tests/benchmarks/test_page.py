"""docs/evidence/quality.md is what the generator makes of the committed JSON."""

import re

from benchmarks.page import PAGE, make_page
from benchmarks.page.markdown import table, with_interval
from benchmarks.quality.results import Interval, write_rows
from tests.benchmarks.test_quality import row


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
    rows = []
    for contender, level, losses in (("LoRA", 0.4, [3.0] * 80 + [1.0] * 20), ("LoRA-One", 0.5, [1.0] * 100)):
        for rate in (1e-3, 2e-3, 5e-3):
            rows.append(row(rate, 0, abs(rate - 2e-3), contender, losses, score=level, test_loss=0.25))
        rows.append(row(2e-3, 1, 0.0, contender, losses, score=level + 0.1, test_loss=0.25))
    write_rows(rows, tmp_path / "quality.json")
    page = make_page(tmp_path)
    # mean of 40 and 50, t(1) 12.706 x 7.071 / sqrt(2) = 63.5
    assert "| LoRA | 0.002 | 2 | 45.0 ± 63.5 | 0.250 ± 0.000 | 3.00 ± 0.00 | 100 | 3.0 | 1.0 + 2.0 |" in page
    # LoRA-One is at LoRA's final loss of 1.0 as soon as there are ten losses to average
    assert "| LoRA-One | 0.002 | 2 | 55.0 ± 63.5 | 0.250 ± 0.000 | 1.00 ± 0.00 | 10 (10.0x) | 1.2 | 1.0 + 2.0 |" in page
    assert "| sort, r = 8 | **+10.0 ± 0.0** |" in page
    assert "| LoRA-One | 3 rates, 2 seeds | not run | not run | not run | not run |" in page


def test_ablations_are_compared_within_a_seed(tmp_path):
    """A sketch that loses 5 and 15 points to the exact gradient: 10, and t(1) 12.706 x 7.071 / sqrt(2) = 63.5."""
    ablated = {"group": "sketch", "energy": 0.9, "task": "minilm"}
    scores = {"passes 2, oversample 0": (0.5, 0.6), "exact": (0.55, 0.75)}
    rows = [row(seed=s, contender=n, score=x) | ablated for n, both in scores.items() for s, x in enumerate(both)]
    write_rows(rows, tmp_path / "quality.json")
    page = make_page(tmp_path)
    assert "seeds | accuracy, % | test loss | loss of steps 1-20 | points over exact | seconds of the start |" in page
    assert "| passes 2, oversample 0 | 0.900 ± 0.000 | 2 | 55.0 ± 63.5 |" in page
    assert "| 1.00 ± 0.00 | -10.0 ± 63.5 | 1.0 |" in page
    assert "| exact | 0.900 ± 0.000 | 2 | 65.0 ± 127.1 | 1.000 ± 0.000 | 1.00 ± 0.00 |  | 1.0 |" in page


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


def test_what_gamma_auto_chose_is_in_its_name(tmp_path):
    rows = [row(seed=s, contender="LoRA-One, gamma auto") | {"gamma": g} for s, g in enumerate((512.0, 128.0, 512.0))]
    write_rows(rows, tmp_path / "quality.json")
    assert "| LoRA-One, gamma auto: 128, 512 | 0.001 (edge) | 3 |" in make_page(tmp_path)


def test_what_the_head_alone_can_do_is_beside_its_task(tmp_path):
    write_rows([row() | {"task": "minilm"}], tmp_path / "quality.json")
    (tmp_path / "heads.json").write_text('{"fitted_head_alone": 0.425, "overlap": {}, "rank": 8, "layers": 36}')
    assert "\n\nThe fitted head alone, from which all go on, is right in 42.5 %.\n\n|" in make_page(tmp_path)


def test_markdown():
    assert table(["", "x"], [["a", "1"]]) == "|  | x |\n| --- | ---: |\n| a | 1 |\n"
    assert with_interval(Interval(0.5, 0.25, 3), 100) == "50.0 ± 25.0"
    assert with_interval(Interval(-0.5, float("nan"), 1), 1, 2, "+") == "-0.50"
