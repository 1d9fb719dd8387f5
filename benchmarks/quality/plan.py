"""Which cells are compared, the ones that tell most first; and the ablations."""

from collections.abc import Iterator, Sequence

from lora_one import Config

from .contenders import ABLATIONS, CONTENDERS
from .protocol import chosen_rate
from .results import Key, Row, select

RANK = 8
PEERS = ("LoRA", "rsLoRA", "PiSSA", "LoRA-GA", "LoRA+")
OURS = ("LoRA-One, balance 0.5", "LoRA-One, balance 0", "LoRA-One, balance 0.25, gamma 64")
TODAY = f"LoRA-One, balance {Config().balance:g}"  # the default
INTERVENTIONS = tuple(name for name in CONTENDERS if name.startswith("LoRA-One, balance 0.5, "))
RESTARTS = tuple(name for name in CONTENDERS if name.endswith("Adam restarted after 10 steps"))
PRECONDITIONED = tuple(name for name in CONTENDERS if name.startswith("LoRA-One, balance 0, P "))
LLAMA, SHORT = ("sort", "desc"), ("sort", "desc", "t5")


def _cells(ranks: Sequence[int], tasks: Sequence[str], names: Sequence[str]) -> list[tuple[str, int, str]]:
    return [(task, rank, name) for rank in ranks for task in tasks for name in names]


CELLS = [
    *_cells([32], SHORT, (*OURS, *PEERS)),
    *_cells([8, 4], SHORT, (*OURS[:2], "LoRA")),
    *_cells([32], LLAMA, (*INTERVENTIONS, *RESTARTS)),
    *_cells([8], LLAMA, PRECONDITIONED),
    *_cells([64, 16], SHORT, (*OURS[:2], "LoRA")),
    *_cells([8], SHORT, PEERS),
    *_cells([32, 8], ["minilm"], (*OURS[:2], "LoRA")),
    *_cells([4, 64, 16], SHORT, PEERS),
    *_cells([32, 8], ["sort-long"], (*OURS[:2], *PEERS)),
    *_cells([8, 4, 64, 16], SHORT, OURS),
    *_cells([32, 8, 4, 64, 16], ["minilm"], (*OURS[:2], *PEERS)),
]


def ablate(rows: Sequence[Row], task: str, groups: Sequence[str], seeds: int) -> Iterator[Key]:
    """One factor at a time, at the rate of LoRA-One (of the preconditioned one for its reg)."""
    for seed in range(seeds):
        for group in groups:
            model = PRECONDITIONED[0] if group == "reg" else TODAY
            rate = chosen_rate(select(rows, task=task, group="main", contender=model, rank=RANK))
            if rate is not None:
                yield from (Key(task, group, name, RANK, rate, seed) for name in ABLATIONS[group])
