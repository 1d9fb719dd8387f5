"""Kill saves over an older adapter, in a separate process: frameworks with threads must not be forked.

    python -m tests.files.killed_worker BACKEND FOLDER          killed before each change of the disk
    python -m tests.files.killed_worker BACKEND FOLDER COUNT    killed COUNT times at random moments

Prints how many kills there were and in how many the folder held the old adapter and the new one, whole.
"""

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_one
from lora_one.backends import load_backend
from lora_one.checkpoint.folder import MLX_WEIGHTS
from lora_one.checkpoint.metadata import read_report
from lora_one.checkpoint.mlx_lm import read_mlx_lm
from lora_one.checkpoint.peft import check_folder, read_adapter, read_folder
from lora_one.report import Report
from tests.files.kills import killed_before_each_change

OLD, NEW = 2, 3  # ranks


def model_of(backend: str, rank: int) -> Any:
    config = lora_one.Config(rank=rank, alpha=8.0 * rank)
    if backend == "torch":
        from tests.backends.torch.models import mlp

        return load_backend(backend).attach_plain(mlp().model, config)
    if backend == "jax":
        from flax import nnx

        return load_backend(backend).attach_plain(nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0))), config)
    from tests.backends.mlx.models import tiny_llama

    return load_backend(backend).attach_plain(tiny_llama(), config)


def rank_in(path: Path) -> int:
    """Return the rank of the adapter in a folder, all of whose files must be from the same save."""
    folder = read_folder(path)
    adapter = read_adapter(folder)
    ranks = {layer.rank for layer in adapter.layers.values()} | {folder.config["r"], read_report(path).config.rank}
    shapes = {
        name: (layer.pairs[0].lora_B.shape[0], layer.pairs[0].lora_A.shape[1]) for name, layer in adapter.layers.items()
    }
    assert len(ranks) == 1 and check_folder(folder, shapes) == [] and set(folder.lora_A) == set(shapes)
    if (path / MLX_WEIGHTS).exists():
        ranks |= {layer.rank for layer in read_mlx_lm(path).layers.values()}
    [rank] = ranks
    return rank


def report(rank: int) -> Report:
    return Report("none", lora_one.Config(rank=rank), 1, 1, 0.0, None, [], 0.0, None, [])


def killed_at_random(action: Callable[[], object], prepare: Callable[[], object], count: int) -> Iterator[int]:
    chance = random.Random(0)
    longest = 0.05
    for number in range(1, count + 1):
        ready, tell = os.pipe()
        child = os.fork()
        if child == 0:
            prepare()
            began = time.perf_counter()
            action()
            os.write(tell, f"{time.perf_counter() - began:.6f} ".encode())
            while True:
                action()
        os.close(tell)
        longest = max(longest, 3 * float(os.read(ready, 20)))
        os.close(ready)
        time.sleep(chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        yield number


def in_a_child(job: Callable[[], object]) -> None:
    child = os.fork()
    if child == 0:
        job()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def main(backend: str, path: Path, count: int | None) -> None:
    models: dict[int, Any] = {}

    def save(rank: int) -> None:
        lora_one.save(models[rank], path, report(rank))

    def prepare() -> None:
        """Make the models, in the child: JAX and MLX compute in threads, which a fork does not have."""
        models.update({rank: model_of(backend, rank) for rank in (OLD, NEW) if rank not in models})

    def prepare_and_save_old() -> None:
        prepare()
        save(OLD)

    def save_both() -> None:
        save(NEW)
        save(OLD)

    load_backend(backend)
    if backend == "torch":
        prepare()
    in_a_child(prepare_and_save_old)
    (path / "README.md").write_text("mine")
    shutil.copytree(path, old := path.parent.with_name("old"))
    # On JAX a child compiles for a second, and its files are written as `convert` writes them.
    if count is None:
        os.fsync = lambda descriptor: None  # saves time, and a kill does not lose what was written
        kills = killed_before_each_change(lambda: save(NEW), prepare, step=12 if backend == "jax" else 1)
    else:
        kills = killed_at_random(save_both, prepare, count)
    seen = []
    for _ in kills:
        seen.append(rank_in(path))
        assert (path / "README.md").read_text() == "mine"
        if count is None:
            shutil.rmtree(path)
            shutil.copytree(old, path)
    in_a_child(prepare_and_save_old)
    assert rank_in(path) == OLD and [f.name for f in path.parent.iterdir()] == [path.name]  # nothing is left over
    print(f"{len(seen)} kills: {seen.count(OLD)} old, {seen.count(NEW)} new")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)
