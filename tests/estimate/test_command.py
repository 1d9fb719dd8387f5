"""`lora-one estimate`, and that it needs numpy alone."""

import json
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from benchmarks import cost
from lora_one.cli import commands as cli

CONFIG = Path(__file__).parent / "configs" / "llama-3-70b.json"


def run(*arguments: str) -> str:
    result = CliRunner(env={"TERM": "dumb"}).invoke(cli.app, ["estimate", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_table_and_the_json_say_the_same():
    arguments = ["--model", str(CONFIG), "--rank", "16", "--hardware", "H200", "--quantized", "--checkpointing"]
    text, plain = run(*arguments), json.loads(run(*arguments, "--json"))
    assert "70.6 B parameters; LoRA of rank 16 on 560 layers: 207 M" in text
    assert plain["parameters"] == 70_553_706_496
    assert list(plain["jobs"]) == ["training step", "init, sketch", "init, exact"]
    total = plain["jobs"]["init, sketch"]["memory"]["total"]
    assert total == sum(x for part, x in plain["jobs"]["init, sketch"]["memory"].items() if part != "total")
    line = next(line for line in text.splitlines() if line.startswith("total"))
    assert float(line.split()[2]) == float(f"{total / 2**30:.3g}")


def test_no_framework_is_imported():
    code = (
        "import sys; from pathlib import Path; from lora_one.estimate import Workload, estimate, read_architecture\n"
        "from lora_one.estimate.rates.numpy import by_numpy\n"
        f"estimate(read_architecture({str(CONFIG)!r}), Workload(), by_numpy(64))\n"
        "print([n for n in ('torch', 'jax', 'mlx', 'transformers', 'typer') if n in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_benchmark_in_small(tmp_path):
    file = tmp_path / "cost.json"
    cost.main(["--smoke", str(file)])
    rows = json.loads(file.read_text())["rows"]
    assert [row["job"] for row in rows] == ["training step", "init, sketch", "init, exact"]
    for row in rows:
        for measured, estimated, ratio in cost.COMPARED.values():
            assert row[ratio] == row[measured] / row[estimated]
            assert row[estimated] > 0
