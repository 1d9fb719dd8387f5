"""The page of the adaptation of a decoder: its statistics, and what it says of the committed results."""

import json
import math
import re

from benchmarks.page import text as page
from benchmarks.text.summary import summarize


def row(name, rate, seed, **measured):
    key = {"task": "cpp", "group": "main", "contender": name, "rank": 8, "rate": rate, "seed": seed}
    return key | measured


def compared(name, rate, seed, loss):
    times = {"seconds_init": 1.0, "seconds_train": 2.0}
    return row(name, rate, seed, test_loss=loss, score=loss / 10, losses=[3.0, 2.0], **times)


def made_up_rows():
    """LoRA has a seed more; LoRA-One's best rate is at its edge."""
    rows = [row("LoRA", rate, 0, valid_loss=loss) for rate, loss in ((1e-3, 3.0), (1.5e-3, 2.0), (2e-3, math.nan))]
    rows += [row("LoRA-One", rate, 0, valid_loss=loss) for rate, loss in ((1e-3, 3.0), (1.5e-3, 2.0))]
    rows += [compared("LoRA", 1.5e-3, 10 + i, loss) for i, loss in enumerate((1.0, 1.2, 9.0))]
    return rows + [compared("LoRA-One", 1.5e-3, 10 + i, loss) for i, loss in enumerate((0.5, 0.5))]


def test_contenders_are_compared_on_the_seeds_that_all_have():
    lora, ours = summarize(made_up_rows(), "cpp", (0,), 1)
    assert [r["seed"] for r in lora.rows] == [r["seed"] for r in ours.rows] == [10, 11]
    assert lora.settled and not ours.settled and lora.rates == 3
    assert lora.seconds == (1.0, 2.0)


def test_numbers_of_made_up_rows(tmp_path):
    result = json.loads((page.RESULTS / page.FILES["smoke"]).read_text())
    result["pretraining"]["made_of"]["size"] |= {"choice_seeds": [0], "strides": [1]}
    result |= {"rows": made_up_rows(), "before": {"cpp": {"test_loss": 4.0, "score": 0.05}}}
    (tmp_path / page.FILES["smoke"]).write_text(json.dumps(result))
    text = page.make_page(tmp_path)
    # differences -0.5 and -0.7: t(1) 12.706 x 0.1414 / sqrt(2) = 1.271
    assert "| before any adaptation |  |  | 4.000 |  | 5.0 |  |" in text
    assert "| LoRA | 0.0015 | 2 | 1.100 ± 1.271 |  | 11.0 ± 12.7 | 1.0 + 2.0 |" in text
    assert "| LoRA-One | 0.0015 (not settled) | 2 | 0.500 ± 0.000 | -0.600 ± 1.271 | 5.0 ± 0.0 | 1.0 + 2.0 |" in text
    assert "| LoRA | 3.000 | **2.000** | diverged |" in text
    assert page.NOT_RUN in text


def test_the_page_says_that_there_was_no_gpu_until_there_was(tmp_path):
    assert page.NOT_RUN in page.make_page(tmp_path)
    result = (page.RESULTS / page.FILES["smoke"]).read_text()
    (tmp_path / page.FILES["full"]).write_text(result)
    assert page.NOT_RUN not in page.make_page(tmp_path)


def test_the_committed_page_is_the_generated_one_and_its_pictures_are_there():
    text = page.PAGE.read_text(encoding="utf-8")
    assert text == page.make_page()
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert any(link.endswith(".png") for link in links)
    assert [link for link in links if not (page.PAGE.parent / link).is_file()] == []
