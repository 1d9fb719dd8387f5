"""Functions that run in several processes, with gloo between them."""

import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp


def in_processes(function: Callable[[int], Any], count: int = 2) -> list[Any]:
    """Return what a function of the rank, at the top of a module, returns in each process."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(function, count, free_port(), folder), nprocs=count)
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(count)]


def _worker(rank: int, function: Callable[[int], Any], count: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    # The function's DistributedDataParallel dies before the group: the other way round PyTorch may wait for itself.
    torch.save(function(rank), Path(folder, str(rank)))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
