"""Docstrings are whole phrases, and those of public names are long enough and have an example that runs."""

import ast
import doctest
import importlib
import inspect
import re
import warnings

import pytest

from tests.test_imports import FILES, part

FRAGMENT = re.compile(r"(Of|As|That|Which|By|And|But|So|From where|With|Where|Whose|In|To)\b")
SECTIONS = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Source|Example):|^>>>", flags=re.MULTILINE)
# Packages whose `__all__` a user meets.
FACES = [
    "lora_one",
    "lora_one.backends.torch",
    "lora_one.backends.jax",
    "lora_one.backends.mlx",
    "lora_one.conformance",
    "lora_one.integrations.transformers",
]


@pytest.mark.parametrize("name", sorted({part(module) for module in FILES}))
def test_no_docstring_begins_with_a_fragment(name):
    for module, file in FILES.items():
        if part(module) != name:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or "Nothing."
                where = f"{module}.{getattr(node, 'name', '')}: {text.splitlines()[0]}"
                assert not FRAGMENT.match(text), where
                assert re.match(r"[A-Z`(]|[|\w]+ ", text), where


def public() -> dict[str, object]:
    """Return name -> function or class, for all of ours that a package's face offers."""
    names = {}
    for face in FACES:
        module = importlib.import_module(face)
        for name in module.__all__:
            thing = getattr(module, name)
            if (inspect.isfunction(thing) or inspect.isclass(thing)) and thing.__module__.startswith("lora_one"):
                text = thing.__doc__ or ""
                if not text.startswith("See `"):
                    names[f"{face}.{name}"] = thing
    return names


@pytest.mark.parametrize("name", public())
def test_a_public_docstring_says_enough_and_shows_it(name):
    """A public docstring has at least 40 words beside the example, and at most 80 before the sections."""
    text = inspect.getdoc(public()[name])
    prose = re.sub(r"^ *(>>>|\.\.\.).*$", "", text, flags=re.MULTILINE)
    assert len(prose.split()) >= 40, f"{len(prose.split())} words"
    assert len(SECTIONS.split(text)[0].split()) <= 80, f"{len(SECTIONS.split(text)[0].split())} words"
    assert ">>> " in text


@pytest.mark.parametrize("name", [name for name, file in FILES.items() if ">>> " in file.read_text(encoding="utf-8")])
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0 and result.failed == 0
