"""How much of the package is typed by `Any`, counted in the source."""

import ast

from tests.test_imports import FILES

LARGEST_SHARE = 0.05  # of the arguments outside backends


def arguments(tree: ast.Module) -> list[ast.arg]:
    """Every annotated argument of every function."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            candidates = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            found += [argument for argument in candidates if argument is not None and argument.annotation is not None]
    return found


def untyped(argument: ast.arg) -> bool:
    """Whether the annotation is `Any` itself: `Mapping[str, Any]`, a JSON object, says something."""
    return isinstance(argument.annotation, ast.Name) and argument.annotation.id == "Any"


def test_few_arguments_may_be_anything():
    total = anything = 0
    for module, file in FILES.items():
        if not module.startswith("lora_one.backends"):
            found = arguments(ast.parse(file.read_text(encoding="utf-8")))
            total, anything = total + len(found), anything + sum(map(untyped, found))
    assert anything <= LARGEST_SHARE * total, f"{anything} of {total} arguments: {anything / total:.1%}"
