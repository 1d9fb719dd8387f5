"""How image-text benchmarks are scored: the rules of lmms-eval's tasks, applied to rows and answers."""

import string
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

Row = dict[str, Any]
Graded = Sequence[tuple[Row, str]]  # (row, answer given to it)

COGNITION = {"commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"}


def pope(graded: Graded) -> dict[str, float]:
    """Return the accuracy, and the F1 score of "yes" (Li et al. 2023)."""
    pairs = [(given.lower().strip(), row["answer"].lower().strip()) for row, given in graded]
    true_yes = sum(given == expected == "yes" for given, expected in pairs)
    given_yes = sum(given == "yes" for given, _ in pairs)
    # An answer that is neither yes nor no is wrong, but does not lower the recall: lmms-eval counts this way.
    missed_yes = sum(given == "no" and expected == "yes" for given, expected in pairs)
    return {
        "accuracy": _share(given == expected for given, expected in pairs),
        "f1": 2 * true_yes / (given_yes + true_yes + missed_yes) if given_yes + missed_yes else 0.0,
    }


def mme(graded: Graded) -> dict[str, float]:
    """Return perception and cognition: sums over categories of accuracy and accuracy+, in % (Fu et al. 2023).

    Accuracy+ is the share of pictures for which both questions are answered correctly.
    """
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row, given in graded:
        expected = row["answer"].lower().strip().replace(".", "")
        right[row["category"]][row["question_id"]].append(_yes_or_no(given) == expected)
    totals = {"perception": 0.0, "cognition": 0.0}
    for category, pictures in right.items():
        score = sum(100.0 * (_share(answers) + all(answers)) for answers in pictures.values()) / len(pictures)
        totals["cognition" if category in COGNITION else "perception"] += score
    return totals


def gqa(graded: Graded) -> dict[str, float]:
    """Return the share of exact matches, ignoring case and punctuation (Hudson and Manning 2019)."""
    return {"exact_match": _share(_plain(given) == _plain(row["answer"]) for row, given in graded)}


def scienceqa(graded: Graded) -> dict[str, float]:
    """Return the share of correct letters, given as "A" or as "A. ..." (Lu et al. 2022)."""
    return {"exact_match": _share(_names_letter(given, letter(row)) for row, given in graded)}


def letter(row: Row) -> str:
    """Return the letter of the correct choice of a multiple-choice row."""
    return string.ascii_uppercase[row["answer"]]


def options(choices: Iterable[str]) -> str:
    """Return the choices with their letters, one per line."""
    return "\n".join(f"{name}. {choice}" for name, choice in zip(string.ascii_uppercase, choices, strict=False))


def _names_letter(given: str, expected: str) -> bool:
    return given == expected or given[:2] == f"{expected}."


def _yes_or_no(given: str) -> str:
    text = given.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def _plain(text: str) -> str:
    return text.lower().translate(str.maketrans("", "", string.punctuation)).strip()


def _share(right: Iterable[bool]) -> float:
    values = list(right)
    return sum(values) / len(values)
