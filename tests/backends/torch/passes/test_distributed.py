"""Data parallel runs: every process computes the start of all batches together."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import lora_one
from lora_one.backends.torch import TorchSession
from lora_one.backends.torch.attachment.attach import find_sites
from tests.backends.torch.models import llama

CONFIGS = {"exact": lora_one.Config(rank=4, gradient="exact"), "sketch": lora_one.Config(rank=4)}
CONFIGS["float16"] = CONFIGS["exact"]  # where each process scales its losses by itself
DTYPES = {"float16": (torch.float16, 1e-2)}  # and the tolerance


def products(model) -> dict[str, np.ndarray]:
    return {
        site.layer.name: (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().numpy()
        for site in find_sites(model)
    }


def worker(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, config in CONFIGS.items():
        case = llama(DTYPES.get(name, (torch.float32,))[0])
        model, report = lora_one.init(case.model, case.batches[rank::2], config=config)
        session = TorchSession(case.model, case.batches, None, config)
        assert [session.all_agree(x) for x in (True, rank == 0, rank == 1, False)] == [True, False, False, False]
        np.savez(f"{folder}/{name}-{rank}.npz", batches=report.batches, base_loss=report.base_loss, **products(model))
    torch.distributed.destroy_process_group()


def test_two_processes_start_as_one_does(tmp_path):
    mp.spawn(worker, args=(free_port(), str(tmp_path)), nprocs=2)
    for name, config in CONFIGS.items():
        dtype, tolerance = DTYPES.get(name, (torch.float32, 1e-5))
        case = llama(dtype)
        model, report = lora_one.init(case.model, case.batches, config=config)
        for rank in range(2):
            start = np.load(tmp_path / f"{name}-{rank}.npz")
            assert start["batches"] == report.batches == 2
            assert start["base_loss"] == pytest.approx(report.base_loss, rel=tolerance / 10)
            for layer, product in products(model).items():
                np.testing.assert_allclose(start[layer], product, atol=tolerance * np.abs(product).max())


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
