"""Which cells are compared, the ones that tell most first; and the ablations."""

from collections.abc import Iterator, Sequence

from .contenders import ABLATIONS
from .protocol import chosen_rate
from .results import Key, Row, select

RANK = 8
PEERS = ("LoRA", "rsLoRA", "PiSSA", "LoRA-GA", "LoRA+")
OURS = ("LoRA-One, balance 0.5", "LoRA-One, balance 0", "LoRA-One, balance 0.25, gamma 64")
CELLS = [
    (task, rank, name) for rank in (32, 8, 4, 64, 16) for task in ("sort", "desc", "t5") for name in (*OURS, *PEERS)
]


def ablate(rows: Sequence[Row], task: str, groups: Sequence[str], seeds: int) -> Iterator[Key]:
    """One factor at a time, at the rate of LoRA-One (of the preconditioned one for its reg)."""
    for seed in range(seeds):
        for group in groups:
            model = "LoRA-One, preconditioned" if group == "reg" else "LoRA-One"
            rate = chosen_rate(select(rows, task=task, group="main", contender=model, rank=RANK))
            if rate is not None:
                yield from (Key(task, group, name, RANK, rate, seed) for name in ABLATIONS[group])
