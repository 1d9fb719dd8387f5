"""The command, run in this process on the embedded model with few steps."""

import dataclasses
import json
import re
import sys

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import lora_one
from lora_one import demo
from lora_one.checkpoint.inspection import inspect_adapter, product_spectrum
from lora_one.checkpoint.metadata import read_report
from lora_one.cli import commands as cli
from lora_one.cli.options import OPTIONS, recipe_from
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError
from lora_one.finetune.recipe import Recipe

runner = CliRunner(env={"TERM": "dumb"})  # 80 columns, as where there is no terminal
SMALL = ["--init-batches", "1", "--batch-size", "8", "--passes", "2"]


def run(*arguments: str) -> str:
    result = runner.invoke(cli.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_finetune_on_the_embedded_task_tells_the_whole_story(tmp_path):
    out = tmp_path / "adapter"
    text = run("finetune", "--steps", "10", "--out", str(out), "--rank", "4", *SMALL)
    assert "Exact match before training: 0.0% of 256 held-out items" in text
    assert "Exact match after training:" in text
    assert "q_proj" in text
    assert "of best" in text
    losses = [float(line.split()[-1]) for line in text.splitlines() if line.strip().startswith("step")]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1
    assert f"Adapter: {out}" in text
    assert "lora-one inspect" in text
    report = read_report(out)
    assert (report.config.rank, report.batches, report.passes) == (4, 1, 2)
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=torch.float32)
    tokens = torch.arange(4, 30)[None]
    before = base(tokens).logits
    assert not torch.equal(peft.PeftModel.from_pretrained(base, out)(tokens).logits, before)


def test_finetune_from_a_file_with_an_option_over_it_on_ones_own_data(tmp_path):
    (tmp_path / "data.jsonl").write_text(
        "\n".join(
            json.dumps(
                {"messages": [{"role": "user", "content": f"rev:{w}="}, {"role": "assistant", "content": w[::-1]}]}
            )
            for w in ("abc", "bcd", "xyz", "hello")
        )
    )
    (tmp_path / "recipe.toml").write_text(
        f'model = "{demo.MODEL}"\ndata = "{tmp_path / "data.jsonl"}"\nsteps = 3\nbatch_size = 2\nrank = 2\n'
        f'gamma = "auto"\ntargets = ["q_proj", "v_proj"]\nout = "{tmp_path / "out"}"\n'
    )
    text = run("finetune", "--config", str(tmp_path / "recipe.toml"), "--rank", "3", "--gradient", "exact")
    assert "Exact match" not in text
    config = read_report(tmp_path / "out").config
    assert config == lora_one.Config(rank=3, gamma="auto", targets=["q_proj", "v_proj"], gradient="exact")


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_plain_start_is_loras_own(tmp_path):
    text = run("finetune", "--steps", "1", "--plain", "--lr", "1e-9", "--out", str(tmp_path), *SMALL)
    assert "LoRA-One start" not in text
    inspection = inspect_adapter(tmp_path)
    assert max(layer.norm for layer in inspection.layers) < 1e-5  # B = 0, except for one step at a rate of 1e-9


def test_a_job_is_resumed_and_one_that_is_done_trains_nothing_again(tmp_path, monkeypatch, capsys):
    rows = demo.TRAIN.read_text().splitlines()[:8]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    data = ["--model", str(demo.MODEL), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    job = ["finetune", *data, "--steps", "3", "--save-every", "2", "--resume", "--plain", *SMALL]
    assert "nothing to resume" in run(*job)
    adapter = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    monkeypatch.setattr(torch.optim.AdamW, "step", None)  # any training step now fails
    text = run(*job)
    assert "nothing to resume" not in text
    assert "Resumed after step 3" in text
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == adapter
    monkeypatch.setattr(sys, "argv", ["lora-one", *job, "--lr", "0.5"])
    with pytest.raises(SystemExit):
        cli.main()
    assert "learning_rate was 0.002, is 0.5: give them as they were" in capsys.readouterr().err


def test_init_saves_the_start_and_inspect_shows_it(tmp_path):
    text = run("init", "--out", str(tmp_path), "--rank", "4", "--gamma", "64", "--targets", "q_proj,up_proj", *SMALL)
    assert "Adapter:" in text
    text = run("inspect", str(tmp_path))
    assert "self_attn.q_proj" in text
    assert (tmp_path / "spectra.png").read_bytes()[:4] == b"\x89PNG"
    inspection = inspect_adapter(tmp_path)
    assert len(inspection.layers) == 8
    for layer in inspection.layers:
        # The start: the gradient's own spectrum, at spectral norm scaling / gamma.
        start = layer.start.singular_values
        expected = [8.0 / 64 * s / start[0] for s in start]
        assert layer.singular_values == pytest.approx(expected, rel=1e-4)
        assert layer.growth == pytest.approx(1.0, rel=1e-4)


def test_inspect_opens_what_peft_alone_wrote(tmp_path):
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL)  # bfloat16, as stored
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=["q_proj"],
        rank_pattern={"layers.1.self_attn.q_proj": 2},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    run("inspect", str(tmp_path), "--plot", str(tmp_path / "x.png"))
    layers = {layer.name: layer for layer in inspect_adapter(tmp_path).layers}
    module = model.base_model.model.model.layers[1].self_attn.q_proj
    product = module.lora_B.default.weight.float() @ module.lora_A.default.weight.float() * (12 / 2)
    layer = layers["model.layers.1.self_attn.q_proj"]
    assert layer.rank == 2
    assert layer.singular_values == pytest.approx(torch.linalg.svdvals(product)[:2].tolist(), rel=1e-3)
    assert layer.start is None


def test_product_spectrum_is_that_of_the_product():
    a, b = torch.randn(3, 10).double(), torch.randn(8, 3).double()
    expected = torch.linalg.svdvals(2.0 * b @ a)[:3].numpy()
    assert product_spectrum(Factors(a.numpy(), b.numpy()), 2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("arguments", "status", "match"),
    [
        (["finetune", "--model", "nowhere", "--data", "nofile.jsonl"], 1, "nofile.jsonl cannot be read"),
        (["finetune", "--rank", "1000"], 1, "rank must be <= min(out, in) = 128, got 1000"),
        (["finetune", "--backend", "numpy"], 1, "backend 'numpy' has no models to fine-tune, only arrays"),
        (["finetune", "--model", "nowhere"], 2, "model is given without data"),
        (["init", "--targets", "zzz"], 1, "targets must match"),
        (["init", "--device", "nonsense"], 2, "device must be one that PyTorch can use here, got 'nonsense'"),
        (["inspect", "nowhere"], 1, "not an adapter folder"),
        (["inspect", "a", "b", "--plot", "x.png"], 2, "--plot is for one folder"),
        (["finetune", "--config", "x.ini"], 2, "must end in .toml, .yaml or .yml"),
        (["finetune", "--nonsense"], 2, "No such option"),
        (["init", "--batch-size", "many"], 2, "Invalid value for '--batch-size'"),
        (["convert", "a"], 2, "Missing argument"),
        (["merge", "a", "b", "c", "--rename", "x"], 2, "--rename must be OLD=NEW"),
    ],
)
def test_mistakes_are_messages_and_not_tracebacks(arguments, status, match, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora-one", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, text = capsys.readouterr()
    assert caught.value.code == status
    assert "error" not in out.lower()
    assert "error:" in text.lower()
    assert match in text
    assert "Traceback" not in text


def test_a_folder_that_holds_no_model(monkeypatch, capsys, tmp_path):
    (tmp_path / "d.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    monkeypatch.setattr(
        sys, "argv", ["lora-one", "finetune", "--model", str(tmp_path), "--data", str(tmp_path / "d.jsonl")]
    )
    with pytest.raises(SystemExit):
        cli.main()
    assert "must hold a causal language model and its tokenizer" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("option", [["--gamma", "big"], ["--passes", "2.5"]])
def test_what_must_be_a_number_or_auto(option):
    with pytest.raises(ConfigError, match=rf'{option[0][2:]} must be .* or "auto", got \'{option[1]}\''):
        run("finetune", *option)


def test_every_setting_has_an_option():
    names = {field.name for cls in (Recipe, lora_one.Config) for field in dataclasses.fields(cls)} - {"config"}
    assert set(OPTIONS) == names | {"config", "verbose", "as_json"}


def test_options_become_settings_of_their_types(tmp_path):
    (tmp_path / "recipe.yaml").write_text("epochs: 3\nwarmup_ratio: 0.1\nlearning_rate: 1.0\n")
    given = {
        **{"steps": 7, "warmup": 2, "weight_decay": 0.1, "schedule": "cosine", "accumulation": 4, "dropout": 0.1},
        **{"max_length": 99, "eval_every": 5, "save_every": 6, "early_stopping": 3, "keep_best": True, "packing": True},
        **{"report_to": "wandb,tensorboard", "gamma": "64", "targets": "q_proj, v_proj", "recompute": "true"},
        **{"use_rslora": False, "metrics": "matthews", "valid_share": 0.2, "loss_on": "everything"},
    }
    recipe = recipe_from(tmp_path / "recipe.yaml", {"seed": None, **given})
    lists = {"report_to": ("wandb", "tensorboard"), "targets": ("q_proj", "v_proj"), "metrics": ("matthews",)}
    expected = {**given, **lists, "gamma": 64.0, "recompute": True, "epochs": None, "warmup_ratio": None}
    found = {name: getattr(recipe, name, getattr(recipe.config, name, None)) for name in expected}
    assert found == expected
    assert (recipe.learning_rate, recipe.seed) == (1.0, 0)
    assert recipe_from(None, {"targets": "q_proj"}).config.targets == ("q_proj",)
    assert recipe_from(None, {"targets": "all-linear"}).config.targets == "all-linear"
    assert recipe_from(None, {"targets": r".*\.(q|v)_proj"}).config.targets == r".*\.(q|v)_proj"
    assert recipe_from(None, {"targets": "a{1,2}"}).config.targets == "a{1,2}"


def test_a_run_with_its_held_out_loss_and_the_short_names_of_options(tmp_path):
    rows = demo.TRAIN.read_text().splitlines()[:20]
    (tmp_path / "data.jsonl").write_text("\n".join(rows))
    data = ["--model", str(demo.MODEL), "--data", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "out")]
    options = [
        "--eval-steps",
        "2",
        "--save-steps",
        "2",
        "--warmup",
        "0",
        "--valid-share",
        "0.2",
        "--keep-best",
        "-r",
        "2",
    ]
    text = run("finetune", *data, "--steps", "3", "--plain", *options, *SMALL)
    losses = {int(step): float(loss) for step, loss in re.findall(r"step +(\d+) +held-out loss (\d+\.\d+)", text)}
    assert list(losses) == [2, 3]
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    measured = {line["step"]: round(line["eval_loss"], 4) for line in lines if "eval_loss" in line}
    assert losses == {step: measured[step] for step in losses}
    assert f"Validation loss after training: {min(losses.values()):.4f}" in text
    assert (tmp_path / "out" / "checkpoints" / "step-3").is_dir()


def test_automatic_passes_over_a_files_number(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("passes: 2\n")
    assert recipe_from(file, {"passes": None}).config.passes == 2
    assert recipe_from(file, {"passes": "auto"}).config.passes == "auto"
    assert recipe_from(file, {"passes": "3"}).config.passes == 3


def test_warnings_of_the_start_reach_the_terminal(tmp_path):
    """A huge step can only harm a task that the model knows already: gamma="auto" says that no step helps."""
    rows = [{"prompt": f"rev:{word}=", "completion": word[::-1]} for word in ("abcd", "hello", "xyz", "qwert")]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    data = ["--model", str(demo.MODEL), "--data", str(tmp_path / "data.jsonl")]
    text = " ".join(run("init", *data, "--out", str(tmp_path), "--alpha", "1e12", "--gamma", "auto", *SMALL).split())
    assert 'warning: gamma="auto": the loss on the init batches stays above the base' in text


def test_conformance_prints_tables_or_json():
    text = run("conformance", "--backend", "numpy")
    assert "All 60 checks agree with the spec: numpy on cpu." in text
    assert "float64: error / allowed" in text
    result = json.loads(run("conformance", "--backend", "numpy", "--json"))
    assert result["passed"] and len(result["results"]) == 60
    assert {row["dtype"] for row in result["results"]} == {"float32", "float64"}


def test_conformance_fails_where_the_numbers_are_off(monkeypatch):
    from lora_one.backends.numpy import NumpyOps

    monkeypatch.setattr(NumpyOps, "sqrt", lambda self, x: x)
    result = runner.invoke(cli.app, ["conformance", "--backend", "numpy", "--dtype", "float32"])
    assert result.exit_code == 1
    assert "OFF" in result.output and "sqrt on numpy in float32, tall: 0: relative error" in result.output
    assert "checks are off: numpy on cpu." in result.output
