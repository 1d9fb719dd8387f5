"""Fine-tune a model in the transformers Trainer with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/transformers/finetune.py                          # the embedded model and task
python adapters/transformers/finetune.py --model DIR --data FILE.jsonl
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lora_one
from lora_one import demo
from lora_one.finetune import encode, read_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", default="runs/transformers")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    rows = [
        {"input_ids": s.tokens, "labels": [-100] * s.prompt_length + s.tokens[s.prompt_length :]} for s in sequences
    ]
    collate = DataCollatorForSeq2Seq(tokenizer)
    batches = [collate([dict(row) for row in rows[i : i + 32]]) for i in range(0, min(len(rows), 256), 32)]

    model, report = lora_one.init(model, batches)  # LoRA-One, instead of peft.get_peft_model
    print(report.summary())
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One: goes to the Trainer

    trainer = Trainer(
        model,
        TrainingArguments(
            options.out,
            max_steps=options.steps,
            per_device_train_batch_size=32,
            warmup_steps=10,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=rows,
        data_collator=collate,
        optimizers=(optimizer, None),
    )
    trainer.train()
    lora_one.save(model, options.out, report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
