"""Compare LoRA, rsLoRA and LoRA-One from the same seed, by the settings of PEFT's method comparison (MetaMathQA).

python adapters/peft_benchmark/run.py             # the embedded model and task, on a CPU
python adapters/peft_benchmark/run.py --llama     # meta-llama/Llama-3.2-3B, MetaMathQA and GSM8K, on a GPU
"""

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from lora_one_start import batch, start
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup, set_seed

from lora_one import demo
from lora_one.finetune import read_examples

EXPERIMENT = Path(__file__).parent / "experiments" / "lora" / "llama-3.2-3B-rank32-lora-one"
METHODS = ["LoRA", "rsLoRA", "LoRA-One"]


@dataclasses.dataclass
class Setting:
    """The numbers of a comparison. Weight decay 0.1, clipping at norm 1 and the cosine are PEFT's in both."""

    model: str = str(demo.MODEL)
    dtype: str = "float32"
    rank: int = 8
    steps: int = 200
    batch_size: int = 16
    learning_rate: float = 3e-3
    max_length: int = 64
    new_tokens: int = 16


LLAMA = Setting("meta-llama/Llama-3.2-3B", "bfloat16", 32, 5000, 4, 1e-4, 768, 300)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-items", type=int, help="of the test data; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/peft_benchmark.json"))
    options = parser.parse_args()
    setting = LLAMA if options.llama else Setting()
    if options.steps:
        setting = dataclasses.replace(setting, steps=options.steps)
    train, test = metamath() if options.llama else embedded()
    random.Random(options.seed).shuffle(train)
    results = {m: run(m, setting, train, test[: options.test_items], options.seed) for m in METHODS}
    for method, result in results.items():
        numbers = {key: value for key, value in result.items() if key != "losses"}
        print(f"{method:9}", json.dumps(numbers))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"setting": dataclasses.asdict(setting), "seed": options.seed} | results))


def run(method: str, setting: Setting, train: list[str], test: list[tuple[str, str]], seed: int) -> dict:
    set_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(setting.model, padding_side="right")
    tokenizer.model_max_length = setting.max_length
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(setting.model, dtype=setting.dtype).to(device)
    config = peft.PeftConfig.from_pretrained(EXPERIMENT)
    config.r, config.use_rslora = setting.rank, method != "LoRA"
    config.lora_alpha = setting.rank if config.use_rslora else 2 * setting.rank  # as PEFT's own experiments have it
    model = peft.get_peft_model(base, config)

    began = time.perf_counter()
    if method == "LoRA-One":
        settings = json.loads((EXPERIMENT / "training_params.json").read_text())["lora_one"]
        print(start(model, tokenizer, train, setting.batch_size, **settings).summary())
    started = time.perf_counter()
    losses = list(training(model, tokenizer, setting, train))
    trained = time.perf_counter()
    return {
        "accuracy": accuracy(model, tokenizer, setting, test),
        "last loss": sum(losses[-20:]) / len(losses[-20:]),
        "seconds of start": round(started - began, 1),
        "seconds of training": round(trained - started, 1),
        "losses": losses,
    }


def training(model, tokenizer, setting: Setting, texts: list[str]) -> Iterator[float]:
    adamw = torch.optim.AdamW(model.parameters(), lr=setting.learning_rate, weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(adamw, int(0.1 * setting.steps), setting.steps)
    model.train()
    for step in range(setting.steps):
        chosen = [texts[(step * setting.batch_size + i) % len(texts)] for i in range(setting.batch_size)]
        loss = model(**batch(model, tokenizer, chosen)).loss
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def accuracy(model, tokenizer, setting: Setting, test: list[tuple[str, str]]) -> float:
    """Return the share of answers that are right, generated greedily."""
    model.eval()
    right = 0
    for i in range(0, len(test), 64):
        queries, answers = zip(*test[i : i + 64], strict=True)
        inputs = tokenizer(list(queries), padding=True, padding_side="left", return_tensors="pt").to(model.device)
        inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        tokens = model.generate(
            **inputs, max_new_tokens=setting.new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        texts = tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(answer_of(text) == answer for text, answer in zip(texts, answers, strict=True))
    return right / len(test)


def answer_of(text: str) -> str:
    """Return what follows the last mark of an answer, in its line; without a mark the whole text."""
    for mark in ("The answer is: ", "The answer is ", "#### "):
        if mark in text:
            text = text.rpartition(mark)[2].strip().split("\n")[0]
            return text.strip(" .!?$%").replace(",", "")
    return text.strip()


def embedded() -> tuple[list[str], list[tuple[str, str]]]:
    train = [f"{x.prompt}{x.completion}" for x in read_examples(demo.TRAIN)]
    return train, [(x.prompt, x.completion) for x in read_examples(demo.TEST)]


def metamath() -> tuple[list[str], list[tuple[str, str]]]:
    """Return texts of MetaMathQA of at most 1300 characters, as PEFT's, in an order of the seed 0, and GSM8K's test."""
    from datasets import load_dataset

    question = "Question: {} Think step by step.\nAnswer:"
    rows = load_dataset("meta-math/MetaMathQA", split="train").shuffle(seed=0).select(range(40_000))
    train = [question.format(x["query"]) + x["response"] for x in rows if len(x["query"] + x["response"]) < 1300]
    test = load_dataset("openai/gsm8k", "main", split="test")
    return train, [(question.format(x["question"]), answer_of(x["answer"])) for x in test]


if __name__ == "__main__":
    main()
