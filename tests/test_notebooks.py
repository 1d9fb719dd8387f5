"""Each notebook runs from top to bottom, and its last cell's numbers show what its text says."""

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.frameworks import said_beside_bitsandbytes

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
NAMES = ["pytorch", "jax", "mlx"]


def pictures(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in code(notebook) for output in cell.outputs)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def numbers(notebook) -> dict[str, float]:
    return ast.literal_eval(code(notebook)[-1].outputs[-1].data["text/plain"])


def check(notebook) -> None:
    """LoRA-One is ahead at first, the energies are shares of a whole, and a loaded adapter computes the same."""
    assert pictures(notebook) == 2
    streams = (output for cell in code(notebook) for output in cell.outputs if output.get("name") == "stderr")
    assert [line for output in streams for line in said_beside_bitsandbytes(output["text"])] == []
    values = numbers(notebook)
    assert values["early loss, LoRA-One"] < 0.9 * values["early loss, plain LoRA"]
    assert 0.7 < values["least energy"] < values["largest energy"] <= 1.0
    assert values["difference after loading"] <= 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_in_an_empty_folder(name, tmp_path):
    committed = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    executed = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    client = NotebookClient(executed, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    check(executed)
    assert numbers(executed) == pytest.approx(numbers(committed), rel=0.02, abs=1e-6)
    assert (tmp_path / "runs" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_has_small_outputs_of_a_run_from_top_to_bottom(name):
    file = NOTEBOOKS / f"{name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    check(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert file.stat().st_size < 300_000
    assert not [cell for cell in code(notebook) if "/site-packages/" in str(cell.outputs)]
