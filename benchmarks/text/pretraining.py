"""The decoder, and its pretraining."""

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from .sizes import Size

SAID_EVERY = 100  # steps
WARM_UP = 100  # steps at most; of a short run a twentieth
VALIDATION_WINDOWS = 64


def build(size: Size) -> LlamaForCausalLM:
    """A Llama with random weights, its output layer tied to its embedding."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=64 * round(size.hidden * 8 / 3 / 64),
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=True,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def pretrain(
    model: LlamaForCausalLM, tokens: np.ndarray, size: Size, device: str, seconds: float = math.inf, seed: int = 0
) -> dict[str, Any]:
    """Train in place by AdamW on random windows: a warm-up, then a cosine to zero.

    Args:
        tokens: all texts in a row.
        seconds: the cosine ends when they have passed, if `size.steps` have not been made by then.

    Returns:
        What there was: steps, tokens, seconds, and the mean loss of every `SAID_EVERY` steps.
    """
    row = torch.from_numpy(tokens.astype(np.int32)).to(device)
    options = {"fused": True} if device == "cuda" else {}
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.rate, betas=(0.9, 0.95), weight_decay=0.1, **options)
    generator = torch.Generator().manual_seed(seed)
    began, step, lately, means = time.perf_counter(), 0, [], []
    model.train()
    while (progress := max(step / size.steps, (time.perf_counter() - began) / seconds)) < 1:
        warm = min((step + 1) / min(0.05 * size.steps, WARM_UP), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = size.rate * warm * (0.5 + 0.5 * math.cos(math.pi * progress))
        starts = torch.randint(len(tokens) - size.context, (size.batch,), generator=generator)
        loss = window_loss(model, row, starts.to(device), size.context)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lately.append(loss.detach())
        step += 1
        if step % SAID_EVERY == 0:  # the only wait for a GPU, which else would run far behind the clock above
            means.append(round(float(torch.stack(lately).mean()), 4))
            lately.clear()
            print(f"pretraining: step {step}, loss {means[-1]}, {time.perf_counter() - began:.0f} s", flush=True)
    if device == "cuda":
        torch.cuda.synchronize()
    passed = time.perf_counter() - began
    return {"steps": step, "tokens": step * size.batch * size.context, "seconds": round(passed, 1), "losses": means}


def window_loss(model: LlamaForCausalLM, row: Tensor, starts: Tensor, context: int) -> Tensor:
    """The mean loss of the windows that begin there; on a GPU in bfloat16."""
    ids = row[starts[:, None] + torch.arange(context, device=row.device)].long()  # (batch, context)
    with torch.autocast("cuda", torch.bfloat16, enabled=row.is_cuda):
        return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, size: Size, device: str) -> float:
    """The loss of text that pretraining has not seen: of windows that are evenly spread."""
    model.eval()
    row = torch.from_numpy(tokens.astype(np.int32)).to(device)
    starts = torch.linspace(0, len(tokens) - size.context - 1, VALIDATION_WINDOWS).long().to(device)
    losses = [float(window_loss(model, row, part, size.context)) for part in starts.split(size.batch)]
    return round(sum(losses) / len(losses), 4)


def save(model: LlamaForCausalLM, record: dict[str, Any], path: Path) -> None:
    """The weights, and how they were made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"weights": {k: v.cpu() for k, v in model.state_dict().items()}, "record": record}, path)


def load(size: Size, path: Path) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """A saved model, on the CPU, and its record."""
    saved = torch.load(path, weights_only=True)
    model = build(size)
    model.load_state_dict(saved["weights"])
    return model, saved["record"]
