"""Numbers that look measured: their section of the page names a command, a result file or a test that shows them."""

import re

import pytest

from benchmarks.tables import MARKED, ROOT

# Whole, with own tests.
GENERATED = {f"docs/evidence/{name}.md" for name in ("quality", "preconditioner", "text")} | {"docs/features.md"}
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {
    name: page.read_text(encoding="utf-8") for page in PAGES if (name := str(page.relative_to(ROOT))) not in GENERATED
}
NUMBER = r"(?<![\w.])\d[\d.,]*"
WORD = r"\b(?:half an?|one|two|three|four|five|six|seven|eight|nine|ten|twenty|thirty|sixty)"
UNIT = r"(?:%|(?:s|ms|us|µs)\b|[kKMGT]i?B\b)"
LONG_UNIT = r"(?:(?:milli|micro)?seconds?|minutes?|hours?|points)\b"
MEASURED = re.compile(
    rf"±|{NUMBER} ?{UNIT}|(?:{NUMBER}|{WORD}) {LONG_UNIT}|{NUMBER}(?: to {NUMBER})? (?:times|x) (?!\d)"
    r"|(?:to|within) \d[\d.]*e-\d+"
)
SOURCE = re.compile(
    r"python -m benchmarks\.\w|benchmarks/results/\w|make demo\b|lora-one (?:estimate|conformance)\b|tests/[\w/]+\.py"
)
# What is no measurement, as it stands on the pages, and why.
ALLOWED = {
    "95 % interval": "what ± means",
    "two minutes": "a time-out of the code",
    "16 times the rate": "the ratio of LoRA+ in the example",
    "more than 1 % of a layer's adapter": "from where on `merge` warns",
}


def unsourced(text: str) -> dict[str, list[str]]:
    """Return, for each section without a source, its heading and the numbers that look measured."""
    prose = re.sub(r"```.*?```", "", MARKED.sub("", text), flags=re.DOTALL)
    found = {}
    for section in re.split(r"^(?=#+ )", prose, flags=re.MULTILINE):
        words = " ".join(re.sub(r"`[^`]*`", "", section).split())
        for allowed in ALLOWED:
            words = words.replace(allowed, "")
        if not SOURCE.search(section) and (numbers := MEASURED.findall(words)):
            found[section.partition("\n")[0]] = numbers
    return found


@pytest.mark.parametrize("page", TEXTS)
def test_measured_numbers_name_their_source(page):
    assert unsourced(TEXTS[page]) == {}, "put them between marks of benchmarks.tables, or name the command beside them"


@pytest.mark.parametrize(
    "claim",
    [
        "It is 3 % faster.",
        "It takes 12.5 s.",
        "It takes half a minute.",
        "A start takes 1.36 times a step.",
        "Its peak is 512 MiB.",
        "LoRA-One is 10.6 ± 9.1 ahead.",
        "LoRA-One is two points ahead.",
        "Losses agree within 6e-5.",
    ],
)
def test_a_number_without_a_source_is_noticed(claim):
    page = f"# A page\n\n`python -m benchmarks.quality` made the numbers here.\n\n## A section\n\n{claim}\n"
    assert list(unsourced(page)) == ["## A section"]
    assert unsourced(page + "\n`benchmarks/results/quality.json` has it.\n") == {}
    assert unsourced(f"<!-- table: speed, python -m benchmarks.tables -->\n{claim}\n<!-- end of table -->") == {}


def test_every_exception_is_needed():
    texts = " ".join(" ".join(text.split()) for text in TEXTS.values())
    assert [allowed for allowed in ALLOWED if allowed not in texts] == []
