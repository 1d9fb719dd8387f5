"""Fine-tune a model in a loop of accelerate with LoRA-One. The lines that LoRA-One adds are marked.

accelerate launch adapters/accelerate/finetune.py                                     # the embedded model and task
accelerate launch adapters/accelerate/finetune.py --model DIR --data FILE.jsonl       # lines of prompt and completion
"""

import argparse
from itertools import islice

import peft
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import lora_one
from lora_one import demo
from lora_one.finetune import encode, read_examples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    parser.add_argument("--accumulation", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", default="runs/accelerate")
    options = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=options.accumulation)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    rows = [{"input_ids": s.tokens, "labels": s.labels} for s in sequences]
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=DataCollatorForSeq2Seq(tokenizer))

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    lora = peft.LoraConfig(r=8, lora_alpha=16, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, lora)
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One: before prepare
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    _, report = lora_one.init(model, list(islice(loader, 4)))  # LoRA-One: in every process, with its own batches
    accelerator.print(report.summary())

    model.train()
    step = 0
    while step < options.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            if step % max(1, options.steps // 10) == 0:
                accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
            if step == options.steps:
                break

    lora_one.save(accelerator.unwrap_model(model), options.out, report)  # LoRA-One: in every process, for PEFT to open
    accelerator.print(f"adapter: {options.out}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
