"""Metrics of answers against scikit-learn, and the visual benchmarks' rules on cases worked out by hand."""

import random

import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from lora_one.finetune.evaluation.scores import exact_match, matthews
from lora_one.finetune.evaluation.visual_rules import gqa, mme, options, pope, scienceqa


@pytest.mark.parametrize("labels", [["yes", "no"], ["a", "b", "c", "never expected"]])
def test_metrics_are_scikit_learns(labels):
    draw = random.Random(0)
    pairs = [(draw.choice(labels), draw.choice(labels[:3])) for _ in range(200)]
    given, expected = zip(*pairs, strict=True)
    assert exact_match(pairs) == pytest.approx(accuracy_score(expected, given), abs=1e-12)
    assert matthews(pairs) == pytest.approx(matthews_corrcoef(expected, given), abs=1e-12)


def test_matthews_of_answers_that_never_change_is_zero():
    assert matthews([("a", "a"), ("a", "b")]) == 0.0
    assert matthews([("a", "a"), ("b", "b")]) == 1.0
    assert matthews([("b", "a"), ("a", "b")]) == -1.0


def graded(*answers, **row):
    return [({**row, "answer": expected}, given) for given, expected in answers]


def test_pope_is_accuracy_and_f1_of_yes():
    draw = random.Random(1)
    answers = [(draw.choice(["yes", "no"]), draw.choice(["yes", "no"])) for _ in range(50)]
    found = pope(graded(*((given.upper() + " ", expected) for given, expected in answers)))
    given, expected = zip(*answers, strict=True)
    assert found["accuracy"] == pytest.approx(accuracy_score(expected, given))
    assert found["f1"] == pytest.approx(f1_score(expected, given, pos_label="yes"))
    # "Maybe" is wrong, and neither a yes nor a missed one.
    assert pope(graded(("yes", "yes"), ("Maybe", "yes"))) == {"accuracy": 0.5, "f1": 1.0}
    assert pope(graded(("no", "no"))) == {"accuracy": 1.0, "f1": 0.0}


def test_mme_adds_accuracy_and_accuracy_plus_over_categories():
    colour = [
        *graded(("Yes.", "Yes"), ("no", "No"), category="color", question_id="1"),
        *graded(("y", "Yes"), ("Yes, it is", "No"), category="color", question_id="2"),
    ]
    code = graded(("No idea", "Yes"), ("what", "No"), category="code_reasoning", question_id="1")
    # colours: (100 + 100) and (50 + 0), their mean; code: nothing right.
    assert mme([*colour, *code]) == {"perception": 125.0, "cognition": 0.0}
    assert mme(graded(("no", "No"), ("yes", "Yes"), category="count", question_id="1"))["perception"] == 200.0


def test_gqa_is_exact_match_without_case_and_punctuation():
    assert gqa(graded(("Cup.", "cup"), ("a cup", "cup"), ("T-shirt", "tshirt"), ("", "cup"))) == {"exact_match": 0.5}


def test_scienceqa_takes_the_letter_alone_or_before_a_full_stop():
    answers = [("A", 0), ("B. down", 1), ("A", 1), ("the answer is A", 0), ("a", 0), ("", 0)]
    assert scienceqa(graded(*answers)) == {"exact_match": 2 / 6}
    assert options(["up", "down"]) == "A. up\nB. down"
