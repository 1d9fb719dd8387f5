"""The comparison by PEFT's settings runs on the embedded model, and PEFT reads the experiment's folder."""

import json
import random
import sys
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_one import demo

FOLDER = Path(__file__).parents[2] / "adapters" / "peft_benchmark"


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("run", "lora_one_start"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import run

    yield run
    for name in ("run", "lora_one_start"):
        sys.modules.pop(name, None)


def test_all_three_are_trained_on_the_same_batches_and_one_is_started(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps", "3", "--test-items", "4", "--out", str(out)])
    run.main()
    results = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert all(f"\n{method:9}" in f"\n{printed}" for method in ("LoRA", "rsLoRA", "LoRA-One"))
    first = {method: results[method]["losses"][0] for method in run.METHODS}
    texts = [json.loads(line) for line in demo.TRAIN.read_text().splitlines()]
    random.Random(0).shuffle(texts)
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype="float32")
    total, count = 0.0, 0
    for row in texts[:16]:  # one at a time, without padding: each token and the end of the sequence count
        tokens = torch.tensor([*tokenizer.encode(row["prompt"] + row["completion"]), tokenizer.eos_token_id])
        with torch.no_grad():
            every = model(tokens[None]).logits[0].double().log_softmax(-1)
        total -= every[:-1].gather(1, tokens[1:, None]).sum().item()
        count += len(tokens) - 1
    assert first["LoRA"] == pytest.approx(total / count, rel=1e-5)
    assert first["rsLoRA"] == pytest.approx(total / count, rel=1e-5)
    assert first["LoRA-One"] < 0.97 * total / count
    assert all(len(results[method]["losses"]) == 3 for method in run.METHODS)
    assert results["LoRA"]["seconds of start"] == 0 < results["LoRA-One"]["seconds of start"]


def test_peft_reads_the_experiment():
    """PEFT wants experiments/METHOD/NAME, with a config of its own and, over its defaults, the training's settings."""
    (folder,) = (path.parent for path in FOLDER.rglob("adapter_config.json"))
    assert (
        folder.relative_to(FOLDER).parts[:2] == ("experiments", "lora") and len(folder.relative_to(FOLDER).parts) == 3
    )
    config = peft.PeftConfig.from_pretrained(folder)
    assert isinstance(config, peft.LoraConfig)
    assert (config.r, config.lora_alpha, config.use_rslora) == (32, 32, True)
    assert json.loads((folder / "training_params.json").read_text()) == {"lora_one": {"samples": 256}}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7. The answer is: 7", "7"),
        ("He has 1,000 eggs.\n#### 1,000", "1000"),
        ("The answer is: 5%.\n\nQuestion: another. #", "5"),
        (" eikoqsyz", "eikoqsyz"),
    ],
)
def test_the_answer_in_a_text(run, text, answer):
    assert run.answer_of(text) == answer
