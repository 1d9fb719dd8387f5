"""Fine-tune a model in mlx-lm's training loop with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/mlx_lm/finetune.py                          # the embedded model and task
python adapters/mlx_lm/finetune.py --deferred               # without data at hand: the first training steps start it
python adapters/mlx_lm/finetune.py --model DIR --data DIR   # DIR/train.jsonl and DIR/valid.jsonl, as in mlx_lm.lora
"""

import argparse
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
from mlx_lm.tuner.datasets import CacheDataset, load_local_dataset
from mlx_lm.tuner.trainer import TrainingArgs, iterate_batches, train

import lora_one
from lora_one import demo
from lora_one.backends.mlx import load_pretrained


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN.parent)
    parser.add_argument("--dtype", help="dtype of the weights; default: the checkpoint's; float32 is fastest on a CPU")
    parser.add_argument("--mask-prompt", action="store_true", help="count only the completion's tokens in the loss")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--deferred", action="store_true", help="let the optimizer make the start, in its first steps")
    parser.add_argument("--grad-checkpoint", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/mlx_lm"))
    options = parser.parse_args()

    model, tokenizer = load_pretrained(options.model)  # mlx_lm.load, and it reads the rotary base of transformers 5
    if options.dtype:
        model.set_dtype(getattr(mx, options.dtype))
    settings = SimpleNamespace(mask_prompt=options.mask_prompt)
    train_set, valid_set, _ = load_local_dataset(Path(options.data), tokenizer, settings)
    data, valid = CacheDataset(train_set), CacheDataset(valid_set)

    if options.deferred:
        model, report = lora_one.init(model)  # LoRA-One, the short form: no batches, the optimizer makes the start
    else:
        batches = list(islice(iterate_batches(data, options.batch_size, max_seq_length=2048), 8))
        model, report = lora_one.init(model, batches)  # LoRA-One, instead of freeze and linear_to_lora_layers
    print(report.summary())
    optimizer = lora_one.optimizer(model, learning_rate=options.learning_rate)  # LoRA-One: goes to train

    options.out.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArgs(
        batch_size=options.batch_size,
        iters=options.steps,
        steps_per_report=max(1, options.steps // 10),
        steps_per_save=options.steps + 1,
        grad_checkpoint=options.grad_checkpoint,
        adapter_file=str(options.out / "adapters.safetensors"),
    )
    train(model, optimizer, data, valid if len(valid) >= options.batch_size else None, arguments)
    lora_one.save(model, options.out, report)  # LoRA-One: a folder that mlx-lm and PEFT open
    if options.deferred:
        print(report.summary())  # now it says what happened
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
