"""The examples of docs/evidence/conformance.md run as they are printed."""

import re
from pathlib import Path

import pytest

from lora_one import conformance

PAGE = (Path(__file__).parents[2] / "docs" / "evidence" / "conformance.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def test_the_example_backend_passes_as_it_is_printed(capsys):
    exec(compile(CODE[0], "docs/evidence/conformance.md", "exec"), {})
    printed = capsys.readouterr().out
    assert printed.count("All 30 checks agree with the spec: array-api-strict") == 2


def test_the_example_test_passes_as_it_is_printed():
    import numpy as np

    from lora_one.backends.numpy import NumpyOps

    scope = {"pytest": pytest, "conformance": conformance, "MyOps": NumpyOps, "my_array": np.zeros((), np.float32)}
    exec(CODE[1], scope)
    assert len(scope["ROWS"]) == 30
    scope["test_mine"](scope["ROWS"][0])
    (compiled, *_) = (check for check in conformance.checks() if check.mode == "compiled")
    with pytest.raises(AssertionError, match=r"nothing to run"):
        scope["test_mine"](compiled)
