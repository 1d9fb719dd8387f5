"""Prefer some answers to others in TRL's DPOTrainer with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/trl/dpo.py                                  # the embedded model and task
python adapters/trl/dpo.py --reference start                # base + start as the reference policy, not the base model
python adapters/trl/dpo.py --model DIR --data FILE.jsonl    # lines of {"prompt": ..., "chosen": ..., "rejected": ...}
"""

import argparse
import json

import peft
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq
from trl import DPOConfig, DPOTrainer

import lora_one
from lora_one import demo
from lora_one.finetune import read_examples
from lora_one.integrations.transformers import LoraOneCallback


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data")
    parser.add_argument("--reference", choices=["base", "start"], default="base")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", default="runs/trl-dpo")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = preferences(options.data)

    lora = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    if options.reference == "start":
        batches = [batch_of_chosen(tokenizer, rows[i : i + 16]) for i in range(0, min(64, len(rows)), 16)]
        # LoRA-One: DPOTrainer copies an adapter that is there already, and its reference policy is the copy.
        model, report = lora_one.init(peft.get_peft_model(model, lora), batches)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            options.out,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            per_device_train_batch_size=32,
            logging_steps=max(1, options.steps // 10),
            logging_first_step=True,
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora if options.reference == "base" else None,
    )
    if options.reference == "base":
        callback = LoraOneCallback(trainer)  # LoRA-One
        trainer.add_callback(callback)  # LoRA-One: starts the policy by the loss of DPO when training begins
    trainer.train()
    report = callback.report if options.reference == "base" else report
    print(report.summary())
    lora_one.save(trainer.model, options.out, report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


def preferences(path: str | None) -> list[dict[str, str]]:
    """Return the rows of a file; without one, those of the embedded task, with the letters in reverse as rejected."""
    if path is not None:
        with open(path, encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]
    rows = [
        {"prompt": x.prompt, "chosen": x.completion, "rejected": x.completion[::-1]} for x in read_examples(demo.TRAIN)
    ]
    return [row for row in rows if row["chosen"] != row["rejected"]]


def batch_of_chosen(tokenizer, rows: list[dict[str, str]]) -> dict:
    """Return a batch whose loss is that of the chosen answers."""
    pairs = [
        (
            tokenizer.encode(row["prompt"]),
            tokenizer.encode(row["chosen"] + tokenizer.eos_token, add_special_tokens=False),
        )
        for row in rows
    ]
    encoded = [{"input_ids": x + y, "labels": [-100] * len(x) + y} for x, y in pairs]
    return DataCollatorForSeq2Seq(tokenizer)(encoded)


if __name__ == "__main__":
    main()
