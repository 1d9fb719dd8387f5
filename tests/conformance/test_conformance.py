"""Every backend agrees with the spec, row by row, and none that the environment requires can be left out."""

import pytest

from lora_one.conformance import check_backend, check_installed
from lora_one.conformance.suite import applies, checks, run
from lora_one.conformance.targets.loading import DTYPES, REQUIRED, backends, open_target
from lora_one.errors import BackendError, ConfigError

TARGETS = [(backend, dtype) for backend in backends() for dtype in DTYPES if (backend, dtype) != ("numpy", "bfloat16")]


@pytest.mark.parametrize("check", checks(), ids=lambda check: check.name)
@pytest.mark.parametrize("on", TARGETS, ids="-".join)
def test_agrees_with_the_spec(on, check):
    target = open_target(*on, device="cpu")
    if applies(check, target):
        result = run(check, target)
        assert result.passed, f"{result.where}: {result.failure or result.error} > {result.tolerance}"


def test_what_applies_to_whom():
    """No row is left out by accident: all of them in float32 and float64, the narrow ones in bfloat16."""
    counts = {on: sum(applies(check, open_target(*on)) for check in checks()) for on in TARGETS}
    rows, eager = len(checks()), sum(check.mode == "eager" for check in checks())
    for (backend, dtype), count in counts.items():
        assert count == (6 if dtype == "bfloat16" else eager if backend == "numpy" else rows), (backend, dtype)


def test_a_required_framework_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setenv(REQUIRED, "numpy, torch")
    monkeypatch.setattr("lora_one.conformance.targets.loading._installed", lambda name: name == "numpy")
    with pytest.raises(BackendError, match=r"torch: required by LORA_ONE_BACKENDS, not installed: pip install"):
        backends()
    with pytest.raises(BackendError, match=r"mlx: asked for, not installed"):
        backends("mlx")
    monkeypatch.setenv(REQUIRED, "tensorflow")
    with pytest.raises(ConfigError, match=r"one of numpy, torch, jax, mlx, got tensorflow"):
        backends()
    monkeypatch.delenv(REQUIRED)
    assert backends() == ["numpy"]


def test_what_does_not_exist_is_an_error():
    with pytest.raises(ConfigError, match=r"dtype must be one of float32, float64, bfloat16, got 'int8'"):
        check_installed("numpy", dtype="int8")
    for backend in ("torch", "jax", "mlx"):
        with pytest.raises(ConfigError, match=rf"{backend} has no device 'abacus' here"):
            open_target(backend, "float32", "abacus")
    import numpy as np

    from lora_one.backends.numpy import ops

    with pytest.raises(ValueError, match=r"dtype of `like` must be one of .*, got int64"):
        check_backend(ops, np.zeros((), np.int64))
