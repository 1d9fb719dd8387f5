"""Each recipe's whole path, from its file: stand-in checkpoints and data of the same form, everything else real."""

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM, AutoTokenizer
from typer.testing import CliRunner

from benchmarks.tables.code import RECIPES
from lora_one.checkpoint.metadata import read_report
from lora_one.cli import commands as cli
from lora_one.finetune.recipe import make_recipe, read_recipe

FILES = sorted(RECIPES.glob("*.yaml"))
METRICS = {  # what each benchmark must come out with
    "gsm8k": {"exact_match,strict-match", "exact_match,flexible-extract"},
    "hendrycks_math": {"exact_match"},
    "humaneval": {"pass@1,create_test"},
    "mmlu": {"acc"},
    "boolq": {"acc"},
    "social_iqa": {"acc"},
    "winogrande": {"acc"},
    **{name: {"acc", "acc_norm"} for name in ("piqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa")},
    "pope": {"accuracy", "f1"},
    "mme": {"perception", "cognition"},
    "gqa": {"exact_match"},
    "scienceqa_img": {"exact_match"},
    "mmmu_val": set(),
}
# Settings that are no choice of the paper's.
NEUTRAL = {"out", "notes"}


def run(*arguments: str):
    return CliRunner(env={"TERM": "dumb"}).invoke(cli.app, list(arguments), catch_exceptions=False)


def base_model(recipe):
    loader = AutoModelForCausalLM
    if recipe.visual:
        loader = AutoModelForImageTextToText
    elif recipe.model.endswith("t5-base"):
        loader = AutoModelForSeq2SeqLM
    return loader.from_pretrained(recipe.model, dtype=torch.float32)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_runs_from_its_file(file, in_hub, tmp_path):
    recipe = make_recipe(read_recipe(file))
    small = ["--steps", "2", "--limit", "2", "--out", str(tmp_path)]
    result = run("finetune", "--config", str(file), *small, "--allow-code-execution")
    assert result.exit_code == 0, result.output
    losses = [float(line.split()[-1]) for line in result.output.splitlines() if line.strip().startswith("step")]
    assert len(losses) == 2
    assert read_report(tmp_path).config == recipe.config

    wanted = {name if isinstance(name, str) else name["task"] for name in (*recipe.tasks, *recipe.visual)}
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(scores) == wanted | ({"test"} if recipe.test else set())
    for name, values in scores.items():
        assert set(values) == (set(recipe.metrics) if name == "test" else METRICS[name])
        assert all(-1 <= value <= 2000 if name == "mme" else -1 <= value <= 1 for value in values.values())

    base = base_model(recipe)
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    model = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    adapted = {f"{layer.name}.weight" for layer in read_report(tmp_path).layers}
    assert changed == adapted
    assert not any("vision" in name or "projector" in name for name in changed)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_setting_has_a_source_and_every_result_says_who_measured_it(file):
    values = yaml.safe_load(file.read_text())
    notes = values["notes"]
    assert set(notes) == {"about", "sources", "remarks", "reported"}
    covered = [name for source in notes["sources"] for name in source["settings"]]
    assert sorted(covered) == sorted(set(values) - NEUTRAL)
    assert all(set(source) == {"source", "settings"} and len(source["source"]) > 10 for source in notes["sources"])
    assert {
        "model",
        "data",
        "learning_rate",
        "batch_size",
        "rank",
        "alpha",
        "gamma",
        "balance",
        "targets",
        "seed",
    } <= set(values)
    for result in notes["reported"]:
        assert set(result) == {"benchmark", "metric", "value", "source", "ours"}
        assert result["ours"] == "not run here"
        assert (result["value"] is None) == (result["source"] == "not known to us")
        assert result["value"] is None or result["source"].startswith("as listed for the method; whose run it is")


def test_the_reported_values_are_those_that_are_known():
    reported = [result for file in FILES for result in yaml.safe_load(file.read_text())["notes"]["reported"]]
    known = {result["benchmark"]: result["value"] for result in reported if result["value"] is not None}
    assert known == {
        "GSM8K": 65.5,
        "MATH": 11.3,
        "BoolQ": 72.8,
        "MNLI validation": 85.49,
        "MNLI test": 85.03,
        "POPE": 87.2,
        "MME": 1380,
        "GQA": 60.1,
        "MMMU": 35.9,
        "ScienceQA image": 69.6,
    }


def test_the_harness_is_given_the_trained_model(in_hub, tmp_path):
    """The accuracy that it reports is that of the saved adapter, by log-likelihoods computed here."""
    file = RECIPES / "llama2-commonsense.yaml"
    small = ["--steps", "2", "--out", str(tmp_path), "--dtype", "float32", "--lr", "0.01"]
    assert run("finetune", "--config", str(file), *small).exit_code == 0
    recipe = make_recipe(read_recipe(file))
    model = peft.PeftModel.from_pretrained(base_model(recipe), tmp_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.model)

    def likelihood(question: str, answer: str) -> float:
        start, whole = tokenizer.encode(question), tokenizer.encode(question + answer)
        with torch.no_grad():
            logits = model(torch.tensor([whole])).logits[0, len(start) - 1 : -1]
        return float(-torch.nn.functional.cross_entropy(logits, torch.tensor(whole[len(start) :]), reduction="sum"))

    right = []
    for index in range(4):
        question = f"It is {index}.\nQuestion: is it?\nAnswer:"
        right.append((likelihood(question, " yes") > likelihood(question, " no")) == (index % 2 == 1))
    scores = json.loads((tmp_path / "evaluation.json").read_text())
    assert scores["boolq"]["acc"] == pytest.approx(sum(right) / 4)
    goal = "Question: Open it\nAnswer:"
    assert scores["piqa"]["acc"] == float(likelihood(goal, " Pull.") > likelihood(goal, " Sing."))


def test_the_log_of_visual_answers_is_what_lmms_eval_reads(in_hub, tmp_path):
    """The fields that its model `from_log` takes: args, model_configs.task, and an answer a doc_id."""
    small = ["--steps", "1", "--limit", "2", "--out", str(tmp_path)]
    assert run("finetune", "--config", str(RECIPES / "llava-instruct.yaml"), *small).exit_code == 0
    logs = sorted(tmp_path.glob("lmms_eval/*.json"))
    assert [log.stem for log in logs] == ["gqa", "mme", "mmmu_val", "pope", "scienceqa_img"]
    for log in logs:
        content = json.loads(log.read_text())
        assert content["args"] == {
            "model": "lora-one",
            "model_args": "pretrained=llava-hf/llava-1.5-7b-hf",
            "limit": 2,
        }
        assert content["model_configs"]["task"] == log.stem
        assert [entry["doc_id"] for entry in content["logs"]] == [0, 1]
        assert all(isinstance(entry["resps"][0][0], str) for entry in content["logs"])


def test_running_the_models_code_must_be_allowed(in_hub, tmp_path):
    from lora_one.errors import ConfigError

    with pytest.raises(ConfigError, match="task 'humaneval' runs the code that the model writes: allow_code_execution"):
        run("finetune", "--config", str(RECIPES / "llama2-codefeedback.yaml"), "--out", str(tmp_path))
    small = ["--steps", "1", "--no-evaluate", "--out", str(tmp_path)]
    assert run("finetune", "--config", str(RECIPES / "llama2-codefeedback.yaml"), *small).exit_code == 0
    assert not Path(tmp_path / "evaluation.json").exists()


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ("tasks: [nonesuch]", "tasks must be names that lm_eval .* knows, got 'nonesuch'"),
        ("tasks: [{task: mmlu, num_fewshot: 1}]", "settings can be given for single tasks only, got 'mmlu'"),
        ("visual: [vqav2]", "visual must be of pope, mme, gqa, scienceqa_img, mmmu_val, got 'vqav2'"),
    ],
)
def test_benchmarks_that_cannot_be_are_found_before_the_training(setting, match, in_hub, tmp_path):
    from lora_one.errors import ConfigError

    (tmp_path / "r.yaml").write_text(setting)
    with pytest.raises(ConfigError, match=match):
        run("finetune", "--config", str(tmp_path / "r.yaml"))


def test_a_task_is_asked_in_the_recipes_own_words(in_hub):
    from lora_one.finetune.evaluation.lm_eval import open_tasks

    loaded = open_tasks(make_recipe(read_recipe(RECIPES / "llama2-metamath.yaml")))
    task = loaded["tasks"]["gsm8k"]
    assert task.doc_to_text({"question": "1 + 1?"}) == "Q: 1 + 1?\nA: "
    assert task.get_config("num_fewshot") == 0
    assert task.get_config("generation_kwargs")["until"] == ["Q:", "</s>"]
    assert loaded["tasks"]["hendrycks_math_algebra"].get_config("num_fewshot") == 4
