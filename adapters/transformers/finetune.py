"""Fine-tune a model in the transformers Trainer with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/transformers/finetune.py                          # the embedded model and task
python adapters/transformers/finetune.py --model DIR --data FILE.jsonl
"""

import argparse

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

import lora_one
from lora_one import demo
from lora_one.finetune import encode, read_examples
from lora_one.integrations.transformers import LoraOneCallback


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
    rows = [{"input_ids": s.tokens, "labels": s.labels} for s in sequences]

    lora = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
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
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )
    callback = LoraOneCallback(trainer, samples=256)  # LoRA-One
    trainer.add_callback(callback)  # LoRA-One: starts the model when training begins
    trainer.train()
    print(callback.report.summary())
    lora_one.save(trainer.model, options.out, callback.report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
