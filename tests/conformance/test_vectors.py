"""The generator makes the committed vectors, and its oracle refuses the answers of a wrong spec."""

import numpy as np
import pytest

from lora_one.conformance.making import generate
from lora_one.conformance.making.cases import all_cases
from lora_one.conformance.suite import SAFETY, relative_error
from lora_one.conformance.vectors import EPS, FILE, read_vectors
from lora_one.core import exact, fold, precondition, step


def test_the_committed_file_is_what_the_generator_makes(tmp_path):
    generate.make(tmp_path / "vectors.safetensors")
    fresh = {(v.computation, v.name): v for v in _read(tmp_path / "vectors.safetensors")}
    committed = read_vectors()
    assert [(v.computation, v.name) for v in committed] == list(fresh)
    for vector in committed:
        other = fresh[vector.computation, vector.name]
        assert (vector.params, vector.narrow, vector.compiled) == (other.params, other.narrow, other.compiled)
        for x, y in zip(vector.inputs, other.inputs, strict=True):
            # LAPACK's own rounding, on another machine, in the inputs that are made with it.
            np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6 * np.max(np.abs(y[np.isfinite(y)]), initial=0.0))
        for working, answers in vector.answers.items():
            # In float64 the rounding of what the draws are compared with, another on each processor, is as large as
            # that of the draws: there is nothing to notice within the margin that the suite leaves for it.
            factor = 1.5 if working == "float32" else SAFETY
            for name, answer in answers.items():
                twin = other.answers[working][name]
                assert relative_error(answer.value, twin.value) <= 1e-5
                assert twin.amplification / factor <= answer.amplification <= twin.amplification * factor


def test_inputs_are_exact_in_float32_and_those_for_narrow_dtypes_in_bfloat16():
    for vector in read_vectors():
        for x in vector.inputs:
            assert np.array_equal(x, x.astype(np.float32).astype(np.float64), equal_nan=True), vector.name
            if vector.narrow:
                bits = x.astype(np.float32).view(np.uint32)
                assert not np.any(bits & 0xFFFF), (vector.computation, vector.name)


def test_conditions_are_what_the_names_say():
    named = {v.name: v.inputs[0] for v in read_vectors() if v.computation == "exact spectrum"}
    s = {name: np.linalg.svd(g, compute_uv=False) for name, g in named.items()}
    assert s["kappa 1e6"][0] / s["kappa 1e6"][-1] == pytest.approx(2.0**20)
    assert np.ptp(s["equal singular values"][:4]) < 1e-14 and s["equal singular values"][4] == pytest.approx(1.0)
    assert np.ptp(s["cut among equals"][:8]) < 1e-14
    assert s["rank-deficient"][2] > 1 and s["rank-deficient"][3] < 1e-13
    assert not named["zero"].any()
    assert np.array_equal(named["scale 1e-20"] * 2.0**132, named["scale 1e20"])


def test_no_answer_is_uncertain_and_well_posed_ones_are_tight():
    """Half of all float32 answers are held to 1e-5, and none to worse than 1 %."""
    tolerances = np.array(
        [4 * EPS["float32"] * a.amplification for v in read_vectors() for a in v.answers["float32"].values()]
    )
    assert np.median(tolerances) < 1e-5 and tolerances.max() < 1e-2


@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"),
    [
        ("exact spectrum", exact, "exact_spectrum", lambda o, g, r, f=exact.exact_spectrum: f(o, -g, r)),
        ("fold, after each batch", fold, "TURN_OF_A_FOLD", 0.1),
        ("precondition", precondition, "precondition",
         lambda o, p, g, r, _, f=precondition.precondition: f(o, p, g, 2 * r)),
        ("AdamW", step, "_adamw", lambda o, p, g, m, lr, b, e, wd, f=step._adamw: f(o, p, g, m, lr, b, 1e-6, wd)),
    ],
)  # fmt: skip
def test_the_oracle_stops_a_wrong_reference_from_becoming_the_answer(name, module, function, wrong, monkeypatch):
    monkeypatch.setattr(module, function, wrong)
    case = next(case for case in all_cases() if case.computation == name)
    with pytest.raises(ValueError, match=rf"{name}, .* from the oracle"):
        generate.judged(case, EPS["float64"])


def test_every_case_has_a_name_of_its_own():
    names = [(case.computation, case.name) for case in all_cases()]
    assert len(set(names)) == len(names) == len(read_vectors())
    assert FILE.stat().st_size < 2**20


def _read(file):
    from unittest import mock

    from lora_one.conformance import vectors

    with mock.patch.object(vectors, "FILE", file):
        return vectors.read_vectors.__wrapped__()
