"""The peak memory against that of PyTorch's allocator on a GPU: benchmarks/results/init_h100.json."""

import pytest

from benchmarks.tables.estimates import gpu_cases, gpu_pairs

NEAR = {"LoRA step, r = 8": 0.012, "LoRA step, r = 24": 0.012, "one pass": 0.03, "exact": 0.03}  # and 0.115


@pytest.mark.parametrize(("case", "name"), gpu_cases())
def test_peaks_on_an_h100_are_those_estimated(case, name):
    memory, _ = gpu_pairs(case, name)
    assert memory.measured == pytest.approx(memory.estimated, rel=NEAR.get(name, 0.115))
