"""Fine-tune a model in Lightning with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/lightning/finetune.py                            # the embedded model and task
python adapters/lightning/finetune.py --precision bf16-mixed
python adapters/lightning/finetune.py --model DIR --data FILE.jsonl
"""

import argparse
from itertools import islice

import lightning
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

import lora_one
from lora_one import demo
from lora_one.finetune import encode, read_examples


class Tuning(lightning.LightningModule):
    """A language model with LoRA, whose loss is its own."""

    def __init__(self, model, learning_rate):
        super().__init__()
        self.model = model.train()  # Lightning leaves the mode as it is
        self.learning_rate = learning_rate

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        if self.global_step % max(1, self.trainer.max_steps // 10) == 0:
            self.print(f"step {self.global_step}: loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self):
        return lora_one.optimizer(self.model, learning_rate=self.learning_rate)  # LoRA-One


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--precision", default="32-true", help="as in lightning.Trainer, such as bf16-mixed")
    parser.add_argument("--out", default="runs/lightning")
    options = parser.parse_args()

    lightning.seed_everything(0, verbose=False)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    rows = [{"input_ids": s.tokens, "labels": s.labels} for s in sequences]
    collate = DataCollatorForSeq2Seq(tokenizer)
    loader = DataLoader(rows, options.batch_size, shuffle=True, collate_fn=collate)

    if torch.cuda.is_available():
        model.cuda()
    model, report = lora_one.init(model, list(islice(loader, 8)))  # LoRA-One: before fit
    print(report.summary())
    trainer = lightning.Trainer(
        max_steps=options.steps,
        precision=options.precision,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tuning(model, options.learning_rate), loader)
    lora_one.save(model, options.out, report)  # LoRA-One: the adapter alone, a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
