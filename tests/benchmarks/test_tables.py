"""The tables and sentences between marks on the pages are what their functions make of the data."""

import re

import pytest

from benchmarks.tables import MARKED, ROOT, TABLES, names, pages, renewed, speed

TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in pages()}
WITH_MARKS = [page for page, text in TEXTS.items() if names(text)]


@pytest.mark.parametrize("page", WITH_MARKS)
def test_a_page_has_what_its_marks_name(page):
    assert TEXTS[page] == renewed(TEXTS[page]), "run python -m benchmarks.tables"


def test_every_mark_is_understood():
    for page, text in TEXTS.items():
        assert text.count("<!-- table") == text.count("<!-- end of table -->") == len(names(text)), page
        assert set(names(text)) <= set(TABLES), page


@pytest.mark.parametrize("page", WITH_MARKS)
def test_an_altered_number_is_noticed(page):
    for found in MARKED.finditer(TEXTS[page]):
        digits = list(re.finditer(r"\d", found[2]))
        if digits:
            place = found.start(2) + digits[len(digits) // 2].start()
            other = str((int(TEXTS[page][place]) + 1) % 10)
            altered = TEXTS[page][:place] + other + TEXTS[page][place + 1 :]
            assert renewed(altered) == TEXTS[page] != altered


def test_every_function_is_used_on_some_page():
    assert {name for text in TEXTS.values() for name in names(text)} == set(TABLES)


def test_the_readmes_numbers_are_those_of_the_page_on_quality():
    page = TEXTS["docs/evidence/quality.md"]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in TABLES["readme-results"]().splitlines()[2:]]
    assert len(rows) >= 3 and all(row[5] for row in rows)
    for task, row in zip(("sort", "desc", "t5", "minilm"), rows, strict=False):
        for rank, (lora, ours, lead) in ((8, row[:3]), (32, row[3:])):
            if lead:
                assert f"\n| {task}, r = {rank} | {lead} |" in page
                found = page.partition(f"quality-{task}-{rank}.png")[0].rpartition(f"| rank {rank} |")[2]
                assert re.search(rf"\n\| LoRA \| [^|]+ \| {lora} ±", found)
                assert re.search(rf"\n\| LoRA-One, [^|]*\(default\) \| [^|]+ \| {ours} ±", found)


def test_ratios_are_to_lora_ga_and_to_a_step(monkeypatch):
    case = {
        speed.STEP: {"cpu_seconds": 2.0, "peak_mib": 1000.0},
        speed.PEER: {"cpu_seconds": 5.0, "peak_mib": 500.0, "energy": 0.0, "energy_A": 0.9},
        "one pass": {"cpu_seconds": 4.0, "outside": 0.25, "energy": 0.5, "energy_A": 0.6},
    }
    monkeypatch.setattr(speed, "read", lambda name: {"cases": {"97.5M": case}})
    assert speed.starts_on_cpu().splitlines()[2:] == [
        "| LoRA step, r = 24 | 2.0 | 0.40 | 1.00 | 1,000 | 2.00 | 1.00 |  |  |",
        "| PEFT LoRA-GA | 5.0 | 1.00 | 2.50 | 500 | 1.00 | 0.50 |  | 0.000 (A alone 0.900) |",
        "| one pass | 4.0 | 0.80 | 2.00 |  |  |  | 25 % | 0.500 |",
    ]


def test_a_step_is_in_times_of_the_frameworks_own(monkeypatch):
    times = {"optax.adamw": 10.0, "lora-one": 25.0, "plain loop": 470.0}
    contenders = {name: {"median": {"ms": ms, "compile_seconds": ms / 10}} for name, ms in times.items()}
    comparison = {"framework": "jax", "size": "0.5B", "rank": 4, "pairs": 168, "contenders": contenders}
    monkeypatch.setattr(speed, "read", lambda name: {"comparisons": [comparison]})
    _, *cells = speed.step_on_cpu().splitlines()[2].strip(" |").split(" | ")
    assert cells == ["10 ms, compiled in 1.0 s", "2.5, compiled in 2.5 s", "47, compiled in 47.0 s"]
