"""A folder that stands in for the hub: data sets under their real names, configurations, splits and columns.

`datasets`, `transformers` and `evaluate` take a folder of a name in the working directory before the hub, so a recipe
runs here from its file as it is. The rows are invented; what is real is their form, and all that is done with them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import yaml
from PIL import Image as Picture

from tests.finetune.recipes.standins import make_llama, make_llava, make_t5

Rows = Sequence[dict[str, Any]]

CODE_EVAL = '''
import datasets
import evaluate

class CodeEval(evaluate.Metric):
    """The interface of the metric that the hub has, and its scores: the share of tests that a candidate passes."""

    def _info(self):
        sequences = datasets.Sequence(datasets.Value("string"))
        features = datasets.Features({"predictions": sequences, "references": datasets.Value("string")})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references, k=(1,)):
        import os
        assert os.environ.get("HF_ALLOW_CODE_EVAL") == "1"
        passed = []
        for candidates, test in zip(predictions, references):
            try:
                exec(candidates[0] + "\\n" + test, {})
                passed.append(1.0)
            except Exception:
                passed.append(0.0)
        return {"pass@1": sum(passed) / len(passed)}, {}
'''


def write(
    root: Path, name: str, configs: dict[str, dict[str, Rows]], features: Any = None, kind: str = "parquet"
) -> None:
    """Configurations of a data set in the hub's layout: a file a split, and a README that lists them."""
    folder = root / name
    readme = folder / "README.md"
    listed = yaml.safe_load(readme.read_text().strip("-\n"))["configs"] if readme.is_file() else []
    for config, splits in configs.items():
        files = []
        for split, rows in splits.items():
            file = f"{'data' if config == 'default' else config}/{split}-00000-of-00001.{kind}"
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "parquet":
                datasets.Dataset.from_list(list(rows), features=features).to_parquet(path)
            elif kind == "csv":
                datasets.Dataset.from_list(list(rows)).to_csv(path)
            elif kind == "json":  # one array
                path.write_text(json.dumps(list(rows)))
            else:
                path.write_text("\n".join(map(json.dumps, rows)))
            files.append({"split": split, "path": file})
        listed.append({"config_name": config, "data_files": files})
    readme.write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n")


def picture(shade: int) -> Picture.Image:
    return Picture.new("RGB", (40, 30), (shade, 255 - shade, 60))


def make_hub(root: Path) -> None:
    make_t5(root / "google-t5/t5-base")
    make_llama(root / "meta-llama/Llama-2-7b-hf")
    make_llava(root / "llava-hf/llava-1.5-7b-hf")
    _training_sets(root)
    _glue(root)
    _language_benchmarks(root)
    _visual_sets(root)
    (root / "code_eval").mkdir()
    (root / "code_eval/code_eval.py").write_text(CODE_EVAL)


def _glue(root: Path) -> None:
    tasks = {
        "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"], "validation_matched"),
        "sst2": (["sentence"], ["negative", "positive"], "validation"),
        "cola": (["sentence"], ["unacceptable", "acceptable"], "validation"),
        "qnli": (["question", "sentence"], ["entailment", "not_entailment"], "validation"),
        "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"], "validation"),
    }
    for task, (columns, labels, valid) in tasks.items():
        kinds: dict[str, Any] = {column: datasets.Value("string") for column in columns}
        kinds |= {"label": datasets.ClassLabel(names=labels), "idx": datasets.Value("int32")}
        rows = [
            {**{column: f"{task} {column} {i}" for column in columns}, "label": i % len(labels), "idx": i}
            for i in range(12)
        ]
        write(root, "nyu-mll/glue", {task: {"train": rows, valid: rows[:4]}}, datasets.Features(kinds))


def _training_sets(root: Path) -> None:
    kinds = ["GSM_Rephrased", "MATH_AnsAug", "GSM_AnsAug"]
    math = [
        {"type": kinds[i % 3], "query": f"{i} and {i}?", "original_question": "", "response":
         f"{i} + {i} = {2 * i}.\n#### {2 * i}\nThe answer is: {2 * i}"} for i in range(12)
    ]  # fmt: skip
    write(root, "meta-math/MetaMathQA", {"default": {"train": math}}, kind="json")
    code = [
        {"query": f"Return {i}.", "answer": f"Here:\n```python\nreturn {i}\n```\nAnd ```more```." if i % 2 else "No.",
         "resource": "r", "lang": "python"} for i in range(8)
    ]  # fmt: skip
    write(root, "m-a-p/CodeFeedback-Filtered-Instruction", {"default": {"train": code}}, kind="jsonl")
    wizard = [{"instruction": f"Say {i}.", "output": f"{i}" if i % 2 else "Sorry, no."} for i in range(8)]
    write(root, "silk-road/Wizard-LM-Chinese-instruct-evol", {"default": {"train": wizard}}, kind="jsonl")
    alpaca = [
        {"instruction": f"Say {i}.", "input": "" if i % 2 else f"loudly {i}", "output": f"{i}!", "text": ""}
        for i in range(10)
    ]
    write(root, "tatsu-lab/alpaca", {"default": {"train": alpaca}})
    common = [
        {"instruction": f"Is {i} even? Answer format: true/false", "input": "", "answer": str(i % 2 == 0).lower(),
         "output": f"the correct answer is {str(i % 2 == 0).lower()}"} for i in range(8)
    ]  # fmt: skip
    write(root, "zwhe99/commonsense_170k", {"default": {"train": common}})


def _language_benchmarks(root: Path) -> None:
    sums = [{"question": f"What is {i} plus 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(3)]
    write(root, "openai/gsm8k", {"main": {"train": sums, "test": sums}})
    subjects = ["algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory"]
    subjects += ["prealgebra", "precalculus"]
    problems = [
        {"problem": f"Find ${i}$.", "level": "Level 1", "type": "t", "solution": f"It is $\\boxed{{{i}}}$."}
        for i in range(5)
    ]
    write(root, "EleutherAI/hendrycks_math", {s: {"train": problems, "test": problems[:2]} for s in subjects})
    program = {
        "task_id": "HumanEval/0",
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1\n",
        "entry_point": "one",
    }
    write(root, "openai/openai_humaneval", {"default": {"test": [program] * 2}})
    choices = ["red", "blue", "green", "grey"]
    facts = [{"question": f"Colour {i}?", "subject": "s", "choices": choices, "answer": i % 4} for i in range(6)]
    write(root, "cais/mmlu", {name: {"dev": facts[:5], "test": facts} for name in MMLU})
    passage = [{"question": "is it", "passage": f"It is {i}.", "idx": i, "label": i % 2} for i in range(4)]
    write(root, "aps/super_glue", {"boolq": {"train": passage, "validation": passage}})
    goals = [{"goal": "Open it", "sol1": "Pull.", "sol2": "Sing.", "label": 0}] * 4
    write(root, "baber/piqa", {"default": {"train": goals, "validation": goals}}, kind="csv")
    social = [{"context": "C.", "question": "Q?", "answerA": "a", "answerB": "b", "answerC": "c", "label": "2"}] * 4
    write(root, "lighteval/siqa", {"default": {"train": social, "validation": social}}, kind="jsonl")
    ending = {"activity_label": "A", "ctx_a": "One", "ctx_b": "two", "endings": ["a", "b", "c", "d"], "label": "1"}
    write(root, "Rowan/hellaswag", {"default": {"train": [ending] * 4, "validation": [ending] * 4}})
    gap = [{"sentence": "The _ is big.", "option1": "cat", "option2": "dog", "answer": "2"}] * 4
    write(root, "allenai/winogrande", {"winogrande_xl": {"train": gap, "validation": gap}})
    science = [{"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}] * 4
    splits = {"train": science, "validation": science, "test": science}
    write(root, "allenai/ai2_arc", {"ARC-Easy": splits, "ARC-Challenge": splits})
    book = [{"question_stem": "Q", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "A"}] * 4
    write(root, "allenai/openbookqa", {"main": {"train": book, "validation": book, "test": book}})


MMLU = ["abstract_algebra", "business_ethics", "econometrics", "philosophy"]  # a subject of each of its four groups


def _visual_sets(root: Path) -> None:
    def text(kind: str, text: str | None) -> dict[str, Any]:
        return {"index": None if text else 0, "text": text, "type": kind}

    talk = [
        {
            "messages": [
                {"role": "user", "content": [text("text", f"What is {i}?\n"), text("image", None)]},
                {"role": "assistant", "content": [text("text", f"A {i}.")]},
                {"role": "user", "content": [text("text", "And now?")]},
                {"role": "assistant", "content": [text("text", "The same.")]},
            ],
            "images": [picture(20 * i)],
        }
        for i in range(6)
    ]
    string, image, number = datasets.Value("string"), datasets.Image(), datasets.Value("int64")
    part = {"index": number, "text": string, "type": string}
    features = datasets.Features({"messages": [{"content": [part], "role": string}], "images": [image]})
    write(root, "HuggingFaceH4/llava-instruct-mix-vsft", {"default": {"train": talk}}, features)

    asked = [
        {"question_id": f"{i // 2}", "question": "Is it red?", "answer": ["yes", "no"][i % 2], "category": "color",
         "image": picture(i)} for i in range(4)
    ]  # fmt: skip
    columns = {"question_id": string, "question": string, "answer": string, "category": string, "image": image}
    for name in ("lmms-lab/POPE", "lmms-lab/MME"):
        write(root, name, {"default": {"test": asked}}, datasets.Features(columns))

    questions = [{"id": f"q{i}", "imageId": f"n{1 - i}", "question": "What?", "answer": "cup"} for i in range(2)]
    pictures = [{"id": f"n{i}", "image": picture(90 * i)} for i in range(2)]
    write(root, "lmms-lab/GQA", {"testdev_balanced_instructions": {"testdev": questions}})
    with_pictures = datasets.Features({"id": string, "image": image})
    write(root, "lmms-lab/GQA", {"testdev_balanced_images": {"testdev": pictures}}, with_pictures)

    quiz = [
        {"image": picture(i), "question": "Which?", "choices": ["up", "down"], "answer": i, "hint": ""} for i in (0, 1)
    ]
    kinds = {"image": image, "question": string, "choices": [string], "answer": number, "hint": string}
    write(root, "lmms-lab/ScienceQA", {"ScienceQA-IMG": {"test": quiz}}, datasets.Features(kinds))

    exam = [
        {
            "id": f"validation_Art_{i}",
            "question": "<image 1> or <image 2>?",
            "options": "['left', 'right']",
            "answer": "A",
            "question_type": kind,
            "image_1": picture(1),
            "image_2": picture(2),
        }
        for i, kind in enumerate(("multiple-choice", "open"))
    ]
    texts = dict.fromkeys(("id", "question", "options", "answer", "question_type"), string)
    shown = {f"image_{n}": image for n in (1, 2)}
    write(root, "lmms-lab/MMMU", {"default": {"validation": exam}}, datasets.Features({**texts, **shown}))
