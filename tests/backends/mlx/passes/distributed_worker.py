"""One of the processes of test_distributed: a start on this process's share of the batches, written to a file."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np

import lora_one
from lora_one.backends.mlx.passes.distributed import all_agree
from tests.backends.mlx.models import flat_factors, tiny_mixtral, token_batches
from tests.backends.mlx.passes.reading import fold_pass, sides_pass

CONFIGS = {
    "sketch": lora_one.Config(rank=4, oversample=60),  # of full width: merging cuts nothing off
    "exact": lora_one.Config(rank=4, gradient="exact"),
    "auto": lora_one.Config(rank=4, oversample=60, passes=2, gamma="auto"),
}


def read(batches: list, out: Path) -> None:
    """The states and the products of a fold pass and of a sides pass over these batches."""
    for name, run in (("fold", fold_pass), ("sides", sides_pass)):
        result, _, of_layers = run(tiny_mixtral(experts=8), batches)
        arrays = {f"{layer}.{field}": x for layer, of in of_layers.items() if of for field, x in of._asdict().items()}
        np.savez(out / f"{name}.npz", loss=result.loss, batches=result.batches, **arrays)


def start(batches: list, out: Path) -> None:
    """All starts on these batches, as factors and report lines."""
    for name, config in CONFIGS.items():
        model, report = lora_one.init(tiny_mixtral(), batches, config=config)
        factors = {key: np.array(x) for key, x in flat_factors(model).items()}
        np.savez(out / f"{name}.npz", loss=report.base_loss, batches=report.batches, gamma=report.gamma, **factors)


if __name__ == "__main__":
    group = mx.distributed.init(backend="ring", strict=True)
    assert group.size() == 2
    first = group.rank() == 0
    assert [all_agree(x) for x in (True, first, not first, False)] == [True, False, False, False]
    mine = Path(sys.argv[1]) / str(group.rank())
    mine.mkdir()
    # Three batches for one process, one for the other: the mean is over all batches, not over processes.
    batches = token_batches(count=4)
    own = batches[:3] if group.rank() == 0 else batches[3:]
    read(own, mine)
    start(own, mine)
