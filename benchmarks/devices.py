"""What the processes of a parallel run send each other for LoRA-One: counted collectives, and a large model by formula.

    python -m benchmarks.devices            # two processes on this CPU, a minute
    python -m benchmarks.devices --table    # the tables of the result that is there

Counted is what `init` and an optimizer's step send, and no forward or backward pass of the engine's own. A size is that
of the whole tensor: with a ring each of N processes sends (N - 1) / N of it to gather it, and twice that to reduce it.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig

import lora_one
from benchmarks import harness
from lora_one.core.fold import TEST_COLUMNS

RESULT = harness.RESULTS / "devices.json"
RANK, PROCESSES, ROWS, LENGTH = 4, 2, 2, 16
STARTS = {
    "one pass": lora_one.Config(rank=RANK, recompute=False),
    "two passes": lora_one.Config(rank=RANK, passes=2, recompute=False),
    "exact": lora_one.Config(rank=RANK, gradient="exact", recompute=False),
}
STEPS: dict[str, dict[str, Any]] = {
    "AdamW": {},
    "preconditioned": {"precondition": True},
    (WITHOUT_DATA := "a step of the start without data"): {"start_steps": 4},
}
ROW_WISE = 3, 6  # o_proj and down_proj among the seven layers of a block
ENGINES = "data parallel", "fully_shard", "tensor parallel"


LARGE, CARDS = {"layers": 80, "hidden": 8192, "key": 1024, "inner": 28672}, 64  # a Llama of 70B
LARGE_RANK, LARGE_TOKENS = 16, 8 * 512
KINDS = {
    "allgather": "gathered",
    "all_gather": "gathered",
    "gather": "handed to one",
    "reduce": "summed",
    "broadcast": "broadcast",
}
SENDERS = "distributed.py", "tensor_parallel.py", "spread_directions.py", "sharding.py"  # files of lora_one that send


class Sent(TorchDispatchMode):
    """Counts the bytes of LoRA-One's own collectives, by kind: of whole tensors, or what is handed to one process."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        kinds = [kind for part, kind in KINDS.items() if part in function.overloadpacket.__name__]
        if function.namespace in ("c10d", "_c10d_functional") and kinds and _is_ours():
            of_one = kinds[0] == "handed to one"
            self.bytes[kinds[0]] += _bytes(args[1]) if of_one else max(_bytes(x) for x in (*args[:2], result))
        return result


def _is_ours() -> bool:
    """Return whether LoRA-One sends, and not a pass of the engine's within it."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if "fsdp" in path.parts or "transformers" in path.parts:
            return False
        if "lora_one" in path.parts:
            return path.name in SENDERS
        frame = frame.f_back
    return False


def _bytes(x: Any) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(x) if isinstance(leaf, Tensor))


def config(hidden: int = 32, key: int = 16, inner: int = 48, layers: int = 2) -> LlamaConfig:
    return LlamaConfig(vocab_size=60, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=hidden // 8, num_key_value_heads=key // 8, head_dim=8)  # fmt: skip


def shapes(hidden: int = 32, key: int = 16, inner: int = 48, layers: int = 2) -> list[tuple[int, int]]:
    """(out, in) of the linear layers of a Llama."""
    attention = [(hidden, hidden), (key, hidden), (key, hidden), (hidden, hidden)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)] * layers


def expected(engine: str, what: str, layers: list[tuple[int, int]], rank: int, tokens: int) -> Counter[str]:
    """Bytes by formula, of float32.

    Args:
        layers: (out, in) of each, in the order of `shapes`.
        tokens: that each process reads in the start.
    """
    numbers: Counter[str] = Counter()
    for index, (m, n) in enumerate(layers):
        split = n if index % 7 in ROW_WISE else m  # the axis that tensor parallelism splits
        k = min(rank + lora_one.Config().oversample, m, n)
        state = (m + n) * (k + TEST_COLUMNS) + 2 * k  # see core.fold.FoldState
        if engine == "tensor parallel":
            if what in STARTS:
                numbers["gathered"] += tokens * split * (2 if what == "two passes" else 1)
            elif what == "preconditioned":
                numbers["summed"] += rank**2
            elif what == WITHOUT_DATA:
                numbers["gathered"] += 2 * rank * split
        elif what == "exact":
            numbers["summed"] += m * n
        elif what in STARTS:
            numbers += Counter({"handed to one": state, "broadcast": state})
            numbers["summed"] += (m + n) * k if what == "two passes" else 0
        elif engine == "fully_shard" and what == "preconditioned":
            numbers += Counter({"gathered": 2 * rank * n, "summed": rank**2})
        elif engine == "fully_shard" and what == WITHOUT_DATA:
            numbers["gathered"] += 2 * rank * (m + n)
    return Counter({kind: 4 * count for kind, count in numbers.items() if count})


def sent_by_one(numbers: Mapping[str, float], processes: int) -> float:
    """Bytes that each process sends, by rings."""
    share = (processes - 1) / processes
    factors = {"gathered": share, "summed": 2 * share, "handed to one": share, "broadcast": 1.0}
    return sum(factors[kind] * count for kind, count in numbers.items())


def run(engine: str, rank: int, folder: str) -> Iterator[dict[str, Any]]:
    """What each start and each step of an engine sends."""
    for name, settings in STARTS.items():
        with Sent() as sent:
            _ = lora_one.init(_model(engine, folder), _batches(engine, rank), config=settings)
        yield {"engine": engine, "what": name, **sent.bytes}
    for name, options in STEPS.items():
        model, _ = lora_one.init(_model(engine, folder), config=lora_one.Config(rank=RANK))
        optimizer = lora_one.optimizer(model, **{"start_steps": 0, **options})
        for _ in range(2):  # the first step of a start also looks whether lora_B is zero
            model(**_batches(engine, rank)[0]).loss.backward()
            with Sent() as sent:
                optimizer.step()
        yield {"engine": engine, "what": name, **sent.bytes}


def _model(engine: str, folder: str) -> nn.Module:
    if engine == "tensor parallel":
        split = DistributedConfig(tp_size=PROCESSES)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=split)
    model = LlamaForCausalLM.from_pretrained(folder)
    if engine == "fully_shard":
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    return model


def _batches(engine: str, rank: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0 if engine == "tensor parallel" else rank)
    tokens = torch.randint(0, 60, (ROWS, LENGTH), generator=generator)
    return [{"input_ids": tokens, "labels": tokens}] * 2


def _worker(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES)}  # transformers reads them
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    rows = [row for engine in ENGINES for row in run(engine, rank, folder)]
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def measure() -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(config()).save_pretrained(folder)
        mp.spawn(_worker, args=(folder,), nprocs=PROCESSES)
        rows: list[dict[str, Any]] = json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))
        return rows


def sent(result: dict[str, Any]) -> str:
    """What was counted, in bytes."""
    kinds = list(dict.fromkeys(KINDS.values()))
    counted = [
        (row["engine"], row["what"], *(row.get(kind, 0) for kind in kinds))
        for row in result["counted"]
        if any(kind in row for kind in kinds)
    ]
    return harness.table(["engine", "what", *kinds], counted)


def sent_by_cards() -> str:
    """By the same formulas, what each card of a large job sends, in gigabytes."""
    rows = []
    for engine in ENGINES:
        processes = 8 if engine == "tensor parallel" else CARDS
        for what in (*STARTS, *STEPS):
            numbers = expected(engine, what, shapes(**LARGE), LARGE_RANK, LARGE_TOKENS)
            rows.append((engine, processes, what, f"{sent_by_one(numbers, processes) / 1e9:.2f}"))
    return harness.table(["engine", "processes", "what", "GB sent by each"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the tables of the result, and measure nothing")
    if not parser.parse_args().table:
        harness.save(RESULT, versions=harness.versions("torch", "transformers", "peft"), counted=measure())
    print(sent(json.loads(RESULT.read_text(encoding="utf-8"))), sent_by_cards(), sep="\n\n")


if __name__ == "__main__":
    main()
