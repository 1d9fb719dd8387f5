"""Fine-tune a model in tunix's PeftTrainer with LoRA-One. The lines that LoRA-One adds are marked.

python adapters/tunix/finetune.py                                  # the embedded model and task
python adapters/tunix/finetune.py --model DIR --data FILE.jsonl    # a Llama, Mistral, Qwen2 or Qwen3 folder
"""

import argparse
from collections.abc import Iterator

import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import lora_one
from lora_one import demo
from lora_one.backends.jax import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.finetune import encode, read_examples


def collate(sequences, width: int) -> dict[str, np.ndarray]:
    """Return a batch, padded on the right. The loss counts only the tokens after the prompt."""
    tokens = np.zeros((len(sequences), width), np.int32)
    labels = np.full_like(tokens, -100)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence.tokens)] = sequence.tokens
        labels[row, : len(sequence.labels)] = sequence.labels
    return {"input_ids": tokens, "labels": labels}


def draw(sequences, size: int, steps: int) -> Iterator[dict[str, np.ndarray]]:
    order = np.random.default_rng(0)
    width = max(len(sequence.tokens) for sequence in sequences)
    for _ in range(steps):
        chosen = order.choice(len(sequences), size, replace=len(sequences) < size)
        yield collate([sequences[i] for i in chosen], width)


def loss_fn(model: nnx.Module, input_ids, labels):
    return causal_lm_loss(model, {"input_ids": input_ids, "labels": labels})  # tunix passes a batch as keywords


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", default="runs/tunix")
    options = parser.parse_args()

    model = load_llama(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    batches = list(draw(sequences, options.batch_size, 4))

    model, report = lora_one.init(model, batches, causal_lm_loss)  # LoRA-One: or a model that has qwix's LoRA
    print(report.summary())
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, 10, options.steps)
    transformation = lora_one.optimizer(model, learning_rate=schedule)  # LoRA-One: an optax.GradientTransformation

    loss = nnx.jit(causal_lm_loss)
    before = float(loss(model, batches[0]))
    trainer = PeftTrainer(
        model,
        optax.chain(optax.clip_by_global_norm(1.0), transformation),
        TrainingConfig(eval_every_n_steps=options.steps, max_steps=options.steps),
    )
    trainer.with_loss_fn(loss_fn).train(draw(sequences, options.batch_size, options.steps))
    print(f"loss of the first batch: {before:.4f} before, {float(loss(model, batches[0])):.4f} after")

    lora_one.save(model, options.out, report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
