"""Which cells are compared, the ones that tell most first; and the ablations."""

from collections.abc import Iterator, Sequence

from lora_one import Config

from .contenders import ABLATIONS, CONTENDERS, RESTARTED
from .protocol import TEST_SEEDS, chosen_rate
from .results import Key, Row, select

RANK = 8
PEERS = ("LoRA", "rsLoRA", "PiSSA", "LoRA-GA", "LoRA+")
PAPER, EVEN = "LoRA-One, balance 0.5", "LoRA-One, balance 0"
OURS = (PAPER, EVEN, "LoRA-One, balance 0.25, gamma 64")
TODAY = f"LoRA-One, balance {Config().balance:g}"  # the default
INTERVENTIONS = tuple(name for name in CONTENDERS if name.startswith(f"{PAPER}, "))
RESTARTS = tuple(name for name in CONTENDERS if name.endswith(RESTARTED))
FASTER_B = tuple(name for name in CONTENDERS if name.startswith("LoRA-One, B at "))
PRECONDITIONED = tuple(name for name in CONTENDERS if name.startswith(f"{EVEN}, P "))
LLAMA, SHORT = ("sort", "desc"), ("sort", "desc", "t5")


def _cells(ranks: Sequence[int], tasks: Sequence[str], names: Sequence[str]) -> list[tuple[str, int, str]]:
    return [(task, rank, name) for rank in ranks for task in tasks for name in names]


CELLS = [
    *_cells([32], SHORT, (*OURS, *PEERS)),
    *_cells([8, 4], SHORT, (PAPER, EVEN, "LoRA")),
    *_cells([32], LLAMA, (*INTERVENTIONS, *RESTARTS)),
    *_cells([8], LLAMA, PRECONDITIONED),
    *_cells([64, 16], SHORT, (PAPER, EVEN, "LoRA")),
    *_cells([8], SHORT, PEERS),
    *_cells([32, 8], ["minilm"], (PAPER, EVEN, "LoRA")),
    *_cells([8], ["minilm-random"], (TODAY, "LoRA")),
    *_cells([4, 64, 16], SHORT, PEERS),
    *_cells([32], SHORT, FASTER_B),
    *_cells([32, 8], ["sort-long"], (PAPER, EVEN, *PEERS)),
    *_cells([8, 4, 64, 16], SHORT, OURS),
    *_cells([32, 8, 4, 64, 16], ["minilm"], (PAPER, EVEN, *PEERS)),
]


def ablate(rows: Sequence[Row], task: str, groups: Sequence[str], seeds: int) -> Iterator[Key]:
    """One factor at a time, at LoRA-One's rate (for `reg` at the preconditioned one's), on the first test seeds."""
    for seed in TEST_SEEDS[:seeds]:
        for group in groups:
            model = PRECONDITIONED[0] if group == "reg" else TODAY
            rate = chosen_rate(select(rows, task=task, group="main", contender=model, rank=RANK))
            if rate is not None:
                yield from (Key(task, group, name, RANK, rate, seed) for name in ABLATIONS[group])
