"""Fine-tune a model in TRL's SFTTrainer with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/trl/finetune.py                                  # the embedded model and task
python adapters/trl/finetune.py --model DIR --data FILE.jsonl    # lines of {"prompt": ..., "completion": ...}
"""

import argparse

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import lora_one
from lora_one import demo
from lora_one.finetune import read_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", default="runs/trl")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = [{"prompt": x.prompt, "completion": x.completion} for x in read_examples(options.data)]

    model, report = lora_one.init(model)  # LoRA-One, instead of peft_config=
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One: makes the start, then AdamW

    trainer = SFTTrainer(
        model,
        SFTConfig(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            warmup_steps=10,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        optimizers=(optimizer, None),  # LoRA-One
    )
    trainer.train()
    print(report.summary())
    lora_one.save(model, options.out, report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
