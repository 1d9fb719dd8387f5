"""A save that is killed leaves the old adapter or the new one, on each backend."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform == "win32", reason="kills by POSIX signals")
@pytest.mark.parametrize("backend", ["torch", "jax", "mlx"])
def test_a_save_killed_at_any_moment_leaves_the_old_adapter_or_the_new_one(backend, tmp_path):
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-m", "tests.files.killed_worker", backend, str(tmp_path / "runs" / "adapter")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, old, new = (int(word) for word in done.stdout.split() if word.isdigit())
    assert kills == old + new and old > 0 and new > 0
