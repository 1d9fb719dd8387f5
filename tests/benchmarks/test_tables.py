"""The tables and sentences between marks on the pages are what their functions make of the data."""

import re

import pytest

from benchmarks.tables import MARKED, ROOT, TABLES, names, pages, renewed

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
        digits = list(re.finditer(r"\d", found[3]))
        if digits:
            place = found.start(3) + digits[len(digits) // 2].start()
            other = str((int(TEXTS[page][place]) + 1) % 10)
            altered = TEXTS[page][:place] + other + TEXTS[page][place + 1 :]
            assert renewed(altered) == TEXTS[page] != altered
