"""One of the processes of test_distributed: a start on this process's share of the batches, written to a file."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

import lora_one
from lora_one.backends.mlx import processes
from lora_one.backends.mlx.passes.batches import default_loss
from lora_one.backends.mlx.passes.distributed import all_agree, least_of_processes
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


FAILING = 1  # the rank


def loss_that_raises(model, batch):
    raise KeyError("no such column")


def batches_that_raise(batches: list):
    yield batches[0]
    raise OSError("the disk is gone")


def errors(rank: int, batches: list) -> dict[str, list[str]]:
    """What happens in each process if the failing one does something else."""

    def start(batches=batches, loss_fn=default_loss, config=CONFIGS["exact"]):
        return lora_one.init(tiny_mixtral(), batches, loss_fn, config)

    cases: dict[str, Callable[[], object]] = {
        "a loss that is not finite": lambda: start(loss_fn=lambda model, batch: mx.array(float("nan"))),
        "an exception of the loss": lambda: start(loss_fn=loss_that_raises),
        "an exception of the batches": lambda: start(batches_that_raise(batches)),
        "no batches": lambda: start([]),
        "an unsuitable model": lambda: start(config=lora_one.Config(targets=["no such layer"])),
    }
    outcomes = {name: outcome(fails if rank == FAILING else start) for name, fails in cases.items()}
    outcomes["after that"] = outcome(start)
    return outcomes


def outcome(call: Callable[[], object]) -> list[str]:
    """The class of the error, and its message."""
    try:
        call()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", ""]


def keep(rank: int, batches: list, folder: Path) -> None:
    """Save one adapter from both processes, and open and merge it in each of them."""
    model, report = lora_one.init(tiny_mixtral(), batches, config=CONFIGS["exact"])
    lora_one.save(model, folder / "adapter", report)
    factors = {key: np.array(x) for key, x in flat_factors(model).items()}
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # both have written
    loaded = lora_one.load(tiny_mixtral(), folder / "adapter")
    for key, x in flat_factors(loaded).items():
        np.testing.assert_array_equal(np.array(x), factors[key])
    tokens = mx.array(batches[0]["input_ids"] if isinstance(batches[0], dict) else batches[0][0])
    expected = np.array(loaded(tokens))
    np.testing.assert_allclose(np.array(lora_one.merge(loaded)(tokens)), expected, atol=1e-4)


def alone(batches: list) -> list[str]:
    """What happens in the first process if the other does not come; it is the last thing that MLX can do."""
    processes.ARRIVAL_SECONDS = 1.0
    return outcome(lambda: lora_one.init(tiny_mixtral(), batches, config=CONFIGS["exact"]))


if __name__ == "__main__":
    group = mx.distributed.init(backend="ring", strict=True)
    assert group.size() == 2
    first = group.rank() == 0
    assert [all_agree(x) for x in (True, first, not first, False)] == [True, False, False, False]
    assert least_of_processes({"a": 3, "b": 2 if first else 5}) == {"a": 3, "b": 2}
    mine = Path(sys.argv[1]) / str(group.rank())
    mine.mkdir()
    # Three batches for one process, one for the other: the mean is over all batches, not over processes.
    batches = token_batches(count=4)
    own = batches[:3] if group.rank() == 0 else batches[3:]
    read(own, mine)
    start(own, mine)
    keep(group.rank(), own, mine.parent)
    outcomes = errors(group.rank(), own)
    done = mine.parent / "0" / "errors.json"
    if first:
        outcomes["one process alone"] = alone(own)
    while not first and not done.exists():
        time.sleep(0.1)
    (mine / "errors.json").write_text(json.dumps(outcomes))
    os._exit(0)  # the first process still has a thread in MLX that waits for the other
