"""What `lora-one finetune` does with every backend: one table of frameworks, the same numbers."""

import contextlib
import json
import shutil

import pytest

from lora_one import demo
from lora_one.errors import ModelError
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode
from lora_one.finetune.job import finetune
from lora_one.finetune.recipe import make_recipe
from lora_one.finetune.tuners.loading import load_tuner

BACKENDS = ["torch", "jax", "mlx"]


class Diary:
    """A `lora_one.finetune.Progress` that remembers."""

    def __init__(self):
        self.losses, self.validations, self.scores, self.warnings, self.benchmarks = [], {}, {}, [], {}
        self.parts = []

    def say(self, text):
        self.parts.append([text])

    def part(self, done, total):
        self.parts[-1].append((done, total))

    def report(self, report):
        self.start = report

    def warn(self, text):
        self.warnings.append(text)

    def training(self, steps):
        self.steps = steps

    def step(self, step, loss):
        self.losses.append(loss)

    def validation(self, when, loss):
        self.validations[when] = loss

    def score(self, when, exact_match, count):
        self.scores[when] = exact_match

    def benchmark(self, task, metric, value):
        self.benchmarks[task, metric] = value


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_folder_with_valid_jsonl_is_validated_before_and_after(backend, tmp_path):
    """mlx-lm's data layout, on every framework."""
    rows = [json.loads(line) for line in demo.TRAIN.read_text().splitlines()[:80]]
    for name, part in (("train", rows[:64]), ("valid", rows[64:])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    settings = {"rank": 4, "steps": 8, "batch_size": 16, "init_batches": 1, "passes": 2, "warmup": 1}
    paths = {"model": str(demo.MODEL), "data": str(tmp_path), "out": str(tmp_path / "out")}
    diary = Diary()
    finetune(make_recipe({"backend": backend, **settings, **paths}), diary)
    reference = load_tuner("torch").open_tuner(demo.MODEL, "float32", "cpu")
    sequences = [encode(reference.tokenizer, example) for example in read_examples(tmp_path / "valid.jsonl")]
    assert diary.validations["before"] == pytest.approx(reference.mean_loss(reference.batches(sequences, 16)), rel=1e-5)
    assert diary.validations["after"] < diary.validations["before"] - 1.0
    assert len(diary.losses) == 8
    assert diary.scores == {}
    counted = {name: steps for name, *steps in diary.parts}
    assert counted["Encoding the examples"] == [(done, 64) for done in range(1, 65)]
    assert counted["LoRA-One: reading the gradient"][0] == (0, 1)  # one batch, which is done when the part ends
    assert "LoRA-One: reading the gradient, pass 2" in counted
    assert counted["Measuring the loss on held-out data"][0] == (0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tokenizers_own_code_is_not_run(backend, tmp_path, monkeypatch):
    """A folder from a stranger may name code of its own; nothing asks whether to run it, and nothing runs it."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(demo.MODEL, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(ran)!r}).touch()\nfrom transformers import PreTrainedTokenizerFast as Own\n"
    )
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run the folder's code"))
    with contextlib.suppress(ModelError):
        load_tuner(backend).open_tuner(folder, "float32", None)
    assert not ran.exists()
