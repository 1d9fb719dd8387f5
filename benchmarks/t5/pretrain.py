"""Pretrain a tiny T5: an encoder-decoder of 0.7M parameters that learns the embedded Llama's skills on strings.

    python -m benchmarks.t5.pretrain        writes benchmarks/t5/model; some minutes on one core

It reads the same items, in the same tokens (a character each), as text to text: the prompt goes into the encoder, the
completion comes out of the decoder.
"""

import argparse
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from lora_one import demo
from lora_one.demo.tasks import PRETRAIN, pretraining

MODEL = Path(__file__).parent / "model"
IGNORED = -100  # transformers' label of a token that is not part of the loss


def open_tokenizer() -> Any:
    """The embedded Llama's tokenizer."""
    return AutoTokenizer.from_pretrained(demo.MODEL)


def open_model() -> T5ForConditionalGeneration:
    """The pretrained model, float32."""
    return T5ForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32, local_files_only=True)


def build(tokenizer: Any) -> T5ForConditionalGeneration:
    """The untrained model. No dropout: it never sees an item twice."""
    config = T5Config(
        vocab_size=128,  # the tokenizer's 100, padded to a multiple of 64
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        tie_word_embeddings=False,  # since transformers 5: tied, but the decoder's outputs are not scaled
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5ForConditionalGeneration(config)


def collate(tokenizer: Any, items: list[tuple[str, str]]) -> dict[str, Tensor]:
    """(prompt, completion) pairs as a batch: input_ids, attention_mask and labels, int64 (items, longest)."""
    prompts, completions = zip(*items, strict=True)
    eos = tokenizer.eos_token
    source = tokenizer([p + eos for p in prompts], return_tensors="pt", padding=True, padding_side="right")
    target = tokenizer([c + eos for c in completions], return_tensors="pt", padding=True, padding_side="right")
    labels = target["input_ids"].masked_fill(target["attention_mask"] == 0, IGNORED)
    return {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], "labels": labels}


@torch.no_grad()
def exact_match(model: Any, tokenizer: Any, items: list[tuple[str, str]]) -> float:
    """The share of items whose greedy completion, up to the end of sequence, is exactly the right one."""
    model.eval()
    batch = collate(tokenizer, items)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=batch["labels"].shape[1],
        do_sample=False,
    )[:, 1:]  # without the start token; (items, tokens)
    width = min(output.shape[1], batch["labels"].shape[1])
    wrong = (output[:, :width] != batch["labels"][:, :width]) & (batch["labels"][:, :width] != IGNORED)
    # A completion cut off before its end-of-sequence token is wrong as well.
    missing = (batch["labels"][:, width:] != IGNORED).any(1)
    return float((~(wrong.any(1) | missing)).float().mean())


def stream(tokenizer: Any, size: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Batches of the pretraining mixture, without end."""
    items = pretraining("train", seed)
    while True:
        yield collate(tokenizer, [(item["prompt"], item["completion"]) for item in islice(items, size)])


def train(model: Any, tokenizer: Any, steps: int, seed: int) -> None:
    """Train in place with AdamW: 100 steps of warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step, batch in enumerate(islice(stream(tokenizer, 64, seed), steps)):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}   loss {loss.item():.4f}", flush=True)


def main() -> None:
    """Pretrain, write the model folder, report held-out exact match per skill."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.t5.pretrain", description=main.__doc__)
    parser.add_argument("--out", type=Path, default=MODEL)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    tokenizer = open_tokenizer()
    model = build(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    began = time.perf_counter()
    train(model, tokenizer, arguments.steps, arguments.seed)
    print(f"trained in {time.perf_counter() - began:.0f} s")

    model.to(torch.bfloat16).save_pretrained(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    # What is measured is what is kept: the rounded weights, read back.
    model = T5ForConditionalGeneration.from_pretrained(arguments.out, dtype=torch.float32)
    for task in PRETRAIN:
        items = [(item["prompt"], item["completion"]) for item in task.items("test", 256)]
        print(f"{task.name:6s} {exact_match(model, tokenizer, items):7.1%}")


if __name__ == "__main__":
    main()
