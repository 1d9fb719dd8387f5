"""The benchmark of what processes send: what is counted is what the formulas say."""

import pytest

from benchmarks import devices

SMALL = 400  # bytes: of losses, counts, and which layers were reached


@pytest.fixture(scope="module")
def counted():
    return {(row.pop("engine"), row.pop("what")): row for row in devices.measure()}


@pytest.mark.parametrize("what", [*devices.STARTS, *devices.STEPS])
@pytest.mark.parametrize("engine", devices.ENGINES)
def test_what_is_sent_is_what_the_formula_says(counted, engine, what):
    tokens = 2 * devices.ROWS * devices.LENGTH  # of two batches
    expected = devices.expected(engine, what, devices.shapes(), devices.RANK, tokens)
    got = counted[engine, what]
    assert got.keys() - {"summed"} == expected.keys() - {"summed"}
    for kind, size in got.items():
        assert 0 <= size - expected[kind] <= (SMALL if kind == "summed" and what in devices.STARTS else 0)


def test_each_process_sends_about_the_same_however_many_there_are():
    numbers = devices.expected("data parallel", "one pass", devices.shapes(**devices.LARGE), 16, 4096)
    assert devices.sent_by_one(numbers, 1024) < 1.5 * devices.sent_by_one(numbers, 2)
