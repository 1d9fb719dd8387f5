"""The script for mlx-lm, and mlx-lm's own commands on the folders that lora-one writes."""

import json
import runpy
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate, lora

import lora_one
from lora_one import demo
from lora_one.backends.mlx import load_pretrained
from lora_one.checkpoint.metadata import read_report

SCRIPT = Path(__file__).parents[2] / "adapters" / "mlx_lm" / "finetune.py"


@pytest.fixture
def command(monkeypatch):
    """Run a program in this process, by its main()."""

    def run(main, *arguments):
        monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
        main()

    return run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """mlx-lm's data layout: text, completions and chat give three kinds of files."""
    folder = tmp_path_factory.mktemp("data")
    rows = [json.loads(line) for line in demo.TRAIN.read_text().splitlines()[:40]]
    for name, part in (("train", rows[:32]), ("valid", rows[32:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A start that the model can feel, as `lora-one init --backend mlx` writes it."""
    from typer.testing import CliRunner

    from lora_one.cli.commands import app

    out = tmp_path_factory.mktemp("start")
    arguments = ["init", "--backend", "mlx", "--rank", "4", "--gamma", "4", "--passes", "2", "--out", str(out)]
    small = ["--init-batches", "1", "--batch-size", "8"]
    done = CliRunner(env={"TERM": "dumb"}).invoke(app, [*arguments, *small], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def adapter(folder) -> dict[str, np.ndarray]:
    return {name: np.array(x) for name, x in mx.load(str(folder / "adapters.safetensors")).items()}


def test_script_trains_and_saves_an_adapter_that_opens_again(tmp_path, command, capsys):
    out = tmp_path / "adapter"
    arguments = ["--steps", "4", "--dtype", "float32", "--batch-size", "4", "--mask-prompt", "--out", out]
    command(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), *arguments)
    assert f"adapter: {out}" in capsys.readouterr().out
    report = read_report(out)
    assert report.batches == 8
    assert min(layer.share_of_best for layer in report.layers) > 0.99
    tokens = mx.arange(4, 40)[None]
    base, _ = load_pretrained(demo.MODEL)
    base.set_dtype(mx.float32)
    plain = np.array(base(tokens))
    assert np.abs(np.array(lora_one.load(base, out)(tokens)) - plain).max() > 0.1


def test_script_without_data_starts_in_its_first_steps(tmp_path, command, capsys):
    out = tmp_path / "adapter"
    arguments = ["--deferred", "--steps", "17", "--dtype", "float32", "--batch-size", "4", "--out", out]
    command(lambda: runpy.run_path(str(SCRIPT), run_name="__main__"), *arguments)
    output = capsys.readouterr().out
    assert "28 layers have plain LoRA's start" in output
    assert "28 layers, started from the gradients of the first" in output
    report = read_report(out)
    assert report.done and 6 <= report.steps <= 16
    assert {layer.start for layer in report.layers} == {"spectral"}
    loaded = lora_one.load(load_pretrained(demo.MODEL)[0], out)
    factors = {name: np.array(x) for name, x in tree_flatten(loaded.parameters()) if "lora_b" in name}
    assert len(factors) == 28 and all(np.abs(b).max() > 1e-3 for b in factors.values())


def test_stock_mlx_lm_lora_goes_on_from_our_folder(tmp_path, command, data, start):
    """At learning rate 0 mlx-lm must write back what it resumed from, to the bit; at another it must move it."""

    def resume(rate, out):
        command(
            lora.main,
            *("--train", "--model", demo.MODEL, "--data", data, "-c", start / "adapter_config.json"),
            *("--resume-adapter-file", start / "adapters.safetensors", "--adapter-path", out),
            *("--iters", 2, "--batch-size", 4, "--val-batches", 1, "--learning-rate", rate),
        )
        return adapter(out)

    given, kept, moved = adapter(start), resume(0.0, tmp_path / "kept"), resume(1e-3, tmp_path / "moved")
    assert given.keys() == kept.keys() == moved.keys()
    assert len(given) == 2 * 28
    for name, value in given.items():
        np.testing.assert_array_equal(kept[name], value)
        assert np.abs(moved[name] - value).max() > 1e-4
    # And back: what mlx-lm trained opens here.
    model, _ = load_pretrained(demo.MODEL)
    loaded = dict(tree_flatten(lora_one.load(model, tmp_path / "moved").parameters()))
    for name, value in moved.items():
        np.testing.assert_array_equal(np.array(loaded[name]), value)


def test_stock_mlx_lm_generate_uses_our_folder(command, capsys, start):
    prompt = "sort:krkt="

    def stock(*arguments):
        command(
            sys.modules["mlx_lm.generate"].main,
            *("--model", demo.MODEL, "--prompt", prompt, "--ignore-chat-template", "--max-tokens", 12, "--temp", 0),
            *("--verbose", "False", *arguments),
        )
        return capsys.readouterr().out.strip()

    model, tokenizer = load_pretrained(demo.MODEL)
    expected = generate(lora_one.load(model, start), tokenizer, prompt, max_tokens=12).strip()
    assert stock("--adapter-path", start) == expected
    assert stock() != expected


def test_a_4_bit_folder_of_mlx_lm_goes_through_the_command(tmp_path, data, command, capsys):
    """mlx_lm.convert -q, lora-one finetune on mlx-lm's data layout, mlx_lm.generate."""
    from typer.testing import CliRunner

    from lora_one.cli.commands import app

    command(
        sys.modules["mlx_lm.convert"].main,
        *("--hf-path", demo.MODEL, "--mlx-path", tmp_path / "4bit", "-q", "--q-group-size", 64),
    )
    out = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "4bit"), "--data", str(data), "--out", str(out)]
    small = ["--steps", "2", "--rank", "4", "--gamma", "4", "--passes", "2", "--init-batches", "1", "--batch-size", "4"]
    done = CliRunner(env={"TERM": "dumb"}).invoke(
        app, ["finetune", "--backend", "mlx", *arguments, *small], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert f"mlx_lm.generate --model DIR --adapter-path {out}" in done.output.replace("\n", "")
    model, tokenizer = load_pretrained(tmp_path / "4bit")
    assert "scales" in model.layers[0].self_attn.q_proj
    expected = generate(lora_one.load(model, out), tokenizer, "sort:krkt=", max_tokens=8).strip()
    capsys.readouterr()
    command(
        sys.modules["mlx_lm.generate"].main,
        *("--model", tmp_path / "4bit", "--adapter-path", out, "--prompt", "sort:krkt=", "--ignore-chat-template"),
        *("--max-tokens", 8, "--temp", 0, "--verbose", "False"),
    )
    assert capsys.readouterr().out.strip() == expected
