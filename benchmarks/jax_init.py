"""Time per pass of `init` on JAX, and of its compilation, beside torch on the same model.

python -m benchmarks.jax_init            # writes benchmarks/results/jax_init.json
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers

import lora_one
from lora_one.backends.jax import load_llama
from lora_one.backends.jax.llama.model import causal_lm_loss

RESULT = Path(__file__).parent / "results" / "jax_init.json"


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
    settings = lora_one.Config(rank=8, passes=4)
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
        "versions": {"jax": jax.__version__, "torch": torch.__version__},
        "device": str(jax.devices()[0].platform),
        "init": init_passes(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
