"""Text that every machine with Python has: the docstrings of the standard library, their words in order or not."""

import ast
import functools
import random
import sysconfig
from pathlib import Path

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
ORDERS = ("as written", "halves exchanged", "reversed", "shuffled")


STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def disordered_docstrings(words: int = 8, seed: int = 0, root: Path = STANDARD_LIBRARY) -> list[tuple[int, str]]:
    """(index in ORDERS, text) pairs in a seeded order: the first `words` words of each docstring, each text once.

    What a docstring is and how many there are depends on the version of Python, or of the package below `root`.
    """
    texts = list(beginnings(words, root))
    rng = random.Random(seed)
    rng.shuffle(texts)
    found = []
    for text in texts:
        order = rng.randrange(len(ORDERS))
        found.append((order, " ".join(_reorder(text.split(), order, rng))))
    return found


def _reorder(words: list[str], order: int, rng: random.Random) -> list[str]:
    half = len(words) // 2
    match ORDERS[order]:
        case "halves exchanged":
            return words[half:] + words[:half]
        case "reversed":
            return words[::-1]
        case "shuffled":
            return rng.sample(words, len(words))
        case _:
            return words


@functools.cache
def beginnings(words: int, root: Path = STANDARD_LIBRARY) -> dict[str, None]:
    """The first words of all functions', classes' and modules' docstrings that have as many."""
    found: dict[str, None] = {}
    for file in sorted(root.rglob("*.py")):
        if _LEFT_OUT & set(file.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                first = (ast.get_docstring(node) or "").split()[:words]
                if len(first) == words:
                    found.setdefault(" ".join(first))
    return found
