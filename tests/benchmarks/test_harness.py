import pytest

from benchmarks import harness
from benchmarks.harness import Contender, PeakMemory, measure, run_in_own_process, table


def allocate(mib: int) -> dict[str, float]:
    """A contender: touches `mib` MiB that it gives back, then holds none."""
    with PeakMemory() as memory:
        block = bytearray(b"x") * (mib * harness.MIB)
        del block
    return {"peak_mib": memory.peak / harness.MIB}


def fail() -> dict[str, float]:
    raise ValueError("of this contender")


HERE = "tests.benchmarks.test_harness"


def test_rounds_take_turns_and_the_peak_is_what_was_needed_above_the_start():
    said = []
    contenders = {f"{mib} MiB": Contender(f"{HERE}:allocate", {"mib": mib}) for mib in (20, 60)}
    found = measure(contenders, rounds=2, say=said.append)
    assert [line.split(": ")[1] for line in said] == ["20 MiB", "60 MiB", "20 MiB", "60 MiB"]
    for mib in (20, 60):
        peaks = [row["peak_mib"] for row in found[f"{mib} MiB"]["rounds"]]
        assert all(abs(peak - mib) < 1 for peak in peaks)  # the kernel counts in batches of pages
        assert found[f"{mib} MiB"]["median"]["peak_mib"] == sum(peaks) / 2


def test_a_contender_that_fails_says_why():
    with pytest.raises(RuntimeError, match="of this contender"):
        run_in_own_process(Contender(f"{HERE}:fail", {}))


def test_table():
    assert table(["a", "ratio"], [["x", 1.23456]]) == "| a | ratio |\n|---|-------|\n| x | 1.23  |"
