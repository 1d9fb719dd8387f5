"""Text that every machine with Python has: the docstrings of the standard library, by the package they are from."""

import ast
import functools
import sysconfig
from collections import Counter
from pathlib import Path

import numpy as np

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def classified_docstrings(classes: int, largest: int, seed: int = 0) -> tuple[list[tuple[int, str]], list[str]]:
    """Docstrings with the number of the top-level package or module they are from, in a seeded order.

    Args:
        classes: packages, those with the most docstrings.
        largest: texts that a package gives at most.

    Returns:
        (class, text) pairs, and the packages' names. Both depend on Python's version.
    """
    texts = _texts()
    names = [name for name, _ in Counter(name for name, _ in texts).most_common(classes)]
    rng = np.random.default_rng(seed)
    found = []
    for index, name in enumerate(names):
        mine = [text for package, text in texts if package == name]
        found += [(index, mine[i]) for i in rng.permutation(len(mine))[:largest]]
    return [found[i] for i in rng.permutation(len(found))], names


@functools.cache
def _texts() -> list[tuple[str, str]]:
    """(top-level package, docstring) of all functions, classes and modules, each text once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, str] = {}
    for file in sorted(root.rglob("*.py")):
        path = file.relative_to(root)
        if _LEFT_OUT & set(path.parts):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) > 40:
                    found.setdefault(text, path.with_suffix("").parts[0])
    return [(package, text) for text, package in found.items()]
