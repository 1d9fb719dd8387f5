"""Time per init pass and per optimizer step on JAX, beside optax.adamw, and beside torch on the same shapes.

python -m benchmarks.jax_step            # writes benchmarks/results/jax_step.json
"""

import copy
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers

import lora_one
from lora_one.backends.jax import load_llama, lora_adamw
from lora_one.backends.jax.llama import causal_lm_loss
from lora_one.backends.torch import LoraOneAdamW
from lora_one.backends.torch.optimizer import LoraPair

RESULT = Path(__file__).parent / "results" / "jax_step.json"
SHAPES = [(512, 512), (512, 512), (1376, 512), (512, 1376)]  # (out, in) of a block's targets
BLOCKS = 8
RANKS = (8, 16)


def least_ms(run: Callable[[], Any], repeats: int = 30) -> float:
    """Of one call, after three that warm up: the least, since what else the machine does only adds to it."""
    times = []
    for number in range(repeats + 3):
        began = time.perf_counter()
        run()
        if number >= 3:
            times.append(time.perf_counter() - began)
    return round(1e3 * min(times), 3)


def optimizer_steps(rank: int) -> dict[str, float]:
    """Milliseconds of one step over all pairs, each framework on the same arrays."""
    rng = np.random.default_rng(0)
    pairs = [
        {"lora_a": rng.standard_normal((i, rank), "f"), "lora_b": rng.standard_normal((rank, o), "f")}
        for _ in range(BLOCKS)
        for o, i in SHAPES
    ]
    params = {f"layer{n}": jax.tree.map(jnp.asarray, pair) for n, pair in enumerate(pairs)}
    found = {}
    for name, tx in {
        "optax.adamw": optax.adamw(1e-4),
        "lora_adamw": lora_adamw(1e-4, reg=1e-6),
    }.items():
        state = tx.init(params)
        step = jax.jit(lambda params, state, tx=tx: _step(tx, params, state))
        found[f"jax {name}"] = least_ms(lambda step=step, state=state: jax.block_until_ready(step(params, state)))
    for name in ("AdamW", "LoraOneAdamW"):
        parameters = [torch.nn.Parameter(torch.tensor(x.T.copy())) for pair in pairs for x in pair.values()]
        for parameter in parameters:
            parameter.grad = parameter.detach().clone()
        in_pairs = [LoraPair(a, b) for a, b in zip(parameters[::2], parameters[1::2], strict=True)]
        if name == "AdamW":
            optimizer: torch.optim.Optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        else:
            optimizer = LoraOneAdamW(parameters, in_pairs, lr=1e-4, fused=True)
        found[f"torch {name}"] = least_ms(optimizer.step)
    return found


def _step(tx: Any, params: Any, state: Any) -> Any:
    updates, state = tx.update(params, state, params)
    return optax.apply_updates(params, updates), state


def init_passes() -> dict[str, Any]:
    """Seconds of one init on a random Llama, 4 passes over 4 batches of 2 x 128 tokens, and of its compilation."""
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = np.random.default_rng(0).integers(3, 512, (8, 128)).astype(np.int32)
    batches = [{"input_ids": tokens[i : i + 2], "labels": tokens[i : i + 2]} for i in range(0, 8, 2)]
    settings = lora_one.Config(rank=8)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        compiled: list[float] = []
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, seconds, **_: compiled.append(seconds) if "backend_compile" in event else None
        )
        warm = []
        for number in range(3):
            compiled.clear()
            _, report = lora_one.init(load_llama(folder), batches, causal_lm_loss, settings)
            if number == 0:
                found["jax init, first in the process: seconds"] = round(report.seconds, 2)
                found["jax init, first in the process: of it compiling"] = round(sum(compiled), 2)
            else:
                warm.append(report.seconds - sum(compiled))
    in_torch = [{key: torch.tensor(value, dtype=torch.long) for key, value in batch.items()} for batch in batches]
    in_turn = [lora_one.init(copy.deepcopy(model), in_torch, config=settings)[1].seconds for _ in range(2)]
    found["jax: seconds per pass without compilation"] = round(min(warm) / 4, 3)
    found["torch: seconds per pass"] = round(min(in_turn) / 4, 3)
    return found


def main() -> None:
    """Measure all and write the result."""
    result = {
        "versions": {"jax": jax.__version__, "optax": optax.__version__, "torch": torch.__version__},
        "device": str(jax.devices()[0].platform),
        "pairs": BLOCKS * len(SHAPES),
        "step, ms": {f"rank {rank}": optimizer_steps(rank) for rank in RANKS},
        "init": init_passes(),
    }
    for times in result["step, ms"].values():
        times["jax ratio"] = round(times["jax lora_adamw"] / times["jax optax.adamw"], 2)
        times["torch ratio"] = round(times["torch LoraOneAdamW"] / times["torch AdamW"], 2)
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
