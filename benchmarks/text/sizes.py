"""How large everything is: on a GPU, and small enough for one CPU core. The code is the same."""

from dataclasses import dataclass

SPLITS = ("train", "valid", "test")
TASKS = ("cpp", "summaries")
THINNED = 5  # steps of adaptation whose mean loss is kept


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, its corpus, its pretraining and its adaptation.

    Attributes:
        package_bytes, cpp_bytes, summary_bytes: most text of one package that is read for pretraining, for the C++
            items and for summaries.
        vocabulary, hidden, layers, heads: of the model; its feed-forward part is about 8/3 as wide as it is.
        context, batch, steps, rate: of pretraining; `steps` are the most, a limit of time may end it before.
        window: most tokens of an adaptation item.
        items: the most by split.
        adapt_steps, adapt_batch, init_batches, rank: of a run of adaptation.
        strides: of the search for a rate, on the ladder of 1, 1.5, 2, 3, 5, 7 times powers of ten.
        choice_seeds: of the runs that choose a rate.
        test_seeds: of those that are compared.
        jobs: runs at a time, where time is not measured.
    """

    name: str
    package_bytes: int
    cpp_bytes: int
    summary_bytes: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    rate: float
    window: int
    items: dict[str, int]
    adapt_steps: int
    adapt_batch: int
    init_batches: int
    rank: int
    strides: tuple[int, ...]
    choice_seeds: tuple[int, ...] = (0,)
    test_seeds: tuple[int, ...] = tuple(range(10, 20))
    jobs: int = 1


FULL = Size(
    name="full",
    package_bytes=4_000_000,
    cpp_bytes=3_000_000,
    summary_bytes=4_000_000,
    vocabulary=16384,
    hidden=512,
    layers=12,
    heads=8,
    context=512,
    batch=64,
    steps=5000,
    rate=1e-3,
    window=256,
    items={"train": 8192, "valid": 256, "test": 512},
    adapt_steps=100,
    adapt_batch=32,
    init_batches=8,
    rank=8,
    strides=(3, 1),
    jobs=4,
)
SMOKE = Size(
    name="smoke",
    package_bytes=40_000,
    cpp_bytes=100_000,
    summary_bytes=400_000,
    vocabulary=2048,
    hidden=128,
    layers=4,
    heads=4,
    context=128,
    batch=8,
    steps=500,
    rate=4e-3,
    window=64,
    items={"train": 1024, "valid": 64, "test": 128},
    adapt_steps=40,
    adapt_batch=8,
    init_batches=4,
    rank=8,
    strides=(2,),
    test_seeds=(10, 11, 12, 13, 14),
)
SIZES = {size.name: size for size in (FULL, SMOKE)}
