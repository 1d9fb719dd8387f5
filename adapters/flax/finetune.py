"""Fine-tune a model with Flax NNX, optax and LoRA-One. The lines that LoRA-One adds are marked.

python adapters/flax/finetune.py                                  # the embedded model and task
python adapters/flax/finetune.py --deferred                       # no batches for init: the first steps start it
python adapters/flax/finetune.py --model DIR --data FILE.jsonl    # a Llama, Mistral, Qwen2 or Qwen3 folder
"""

import argparse

import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer

import lora_one
from lora_one import demo
from lora_one.backends.jax import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import TokenSequence, encode


def collate(sequences: list[TokenSequence], width: int) -> dict[str, np.ndarray]:
    """Return a batch, padded on the right. The loss counts only the tokens after the prompt."""
    tokens = np.zeros((len(sequences), width), np.int32)
    labels = np.full_like(tokens, -100)
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        tokens[row, :length] = sequence.tokens
        labels[row, :length] = sequence.labels
    return {"input_ids": tokens, "labels": labels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=demo.MODEL)
    parser.add_argument("--data", default=demo.TRAIN)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--deferred", action="store_true", help="let the optimizer make the start, in its first steps")
    parser.add_argument("--out", default="runs/flax")
    options = parser.parse_args()

    model = load_llama(options.model)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    sequences = [encode(tokenizer, example) for example in read_examples(options.data)]
    width = max(len(sequence.tokens) for sequence in sequences)
    size = options.batch_size

    if options.deferred:
        model, report = lora_one.init(model)  # LoRA-One, the short form: no batches, the optimizer makes the start
    else:
        starts = range(0, min(len(sequences) - size, 8 * size) + 1, size)
        batches = [collate(sequences[i : i + size], width) for i in starts]
        model, report = lora_one.init(model, batches, causal_lm_loss)  # LoRA-One: attach LoRA and start it
    print(report.summary())
    schedule = optax.warmup_cosine_decay_schedule(0.0, options.learning_rate, 10, options.steps)
    tx = lora_one.optimizer(model, learning_rate=schedule)  # LoRA-One: an optax.GradientTransformation
    optimizer = nnx.Optimizer(model, optax.chain(optax.clip_by_global_norm(1.0), tx), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer, batch):
        lora = nnx.DiffState(0, nnx.LoRAParam)  # only the factors get gradients
        loss, gradients = nnx.value_and_grad(causal_lm_loss, argnums=lora)(model, batch)
        optimizer.update(model, gradients)
        return loss

    order = np.random.default_rng(0)
    for number in range(options.steps):
        chosen = order.choice(len(sequences), size, replace=len(sequences) < size)
        loss = step(model, optimizer, collate([sequences[i] for i in chosen], width))
        if number % max(1, options.steps // 10) == 0:
            print(f"step {number}: loss {float(loss):.4f}")
    if options.deferred:
        print(report.summary())
    lora_one.save(model, options.out, report)  # LoRA-One: a folder that PEFT opens
    print(f"adapter: {options.out}")


if __name__ == "__main__":
    main()
