"""Data parallel runs: every process computes the start of all batches together."""

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

import lora_one
from lora_one.backends.torch import TorchSession
from lora_one.backends.torch.attachment.attach import find_sites
from tests.backends.torch.models import Case, causal_batches, llama
from tests.backends.torch.test_init import gradients

RANK, PROCESSES = 4, 3  # not a power of two: one of them is left over where they merge in pairs
CONFIGS = {
    "exact": lora_one.Config(rank=RANK, gradient="exact"),
    "one pass": lora_one.Config(rank=RANK),
    "two passes": lora_one.Config(rank=RANK, passes=2),
    "adaptive rank": lora_one.Config(rank=RANK, rank_max=3 * RANK, gradient="exact"),
    "float16": lora_one.Config(rank=RANK, gradient="exact"),  # where each process scales its losses by itself
}
DTYPES = {"float16": (torch.float16, 1e-2)}  # and the tolerance


def products(model) -> dict[str, np.ndarray]:
    return {
        site.layer.name: (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().numpy()
        for site in find_sites(model)
    }


def case_of(name: str) -> Case:
    return llama(DTYPES.get(name, (torch.float32,))[0])._replace(batches=causal_batches(PROCESSES))


def worker(rank: int, port: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    for name, config in CONFIGS.items():
        case = case_of(name)
        model, report = lora_one.init(case.model, case.batches[rank::PROCESSES], config=config)
        session = TorchSession(case.model, case.batches, None, config)
        assert [session.all_agree(x) for x in (True, rank == 0, rank == 1, False)] == [True, False, False, False]
        if config.rank_max is not None:
            with TorchSession(case_of(name).model, case.batches, None, config) as adaptive:
                adaptive.set_ranks({layer.name: 2 + rank + i % 2 for i, layer in enumerate(adaptive.layers)})
                assert [layer.rank for layer in adaptive.layers] == [2 + i % 2 for i in range(len(adaptive.layers))]
        np.savez(f"{folder}/{name}-{rank}.npz", batches=report.batches, base_loss=report.base_loss, **products(model))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def starts(tmp_path_factory) -> dict[str, list[dict[str, np.ndarray]]]:
    """Name of the settings -> what each process has saved."""
    folder = tmp_path_factory.mktemp("starts")
    mp.spawn(worker, args=(free_port(), str(folder)), nprocs=PROCESSES)
    return {name: [dict(np.load(folder / f"{name}-{rank}.npz")) for rank in range(PROCESSES)] for name in CONFIGS}


@pytest.mark.feature("Several processes, whole model in each")
@pytest.mark.parametrize("name", CONFIGS)
def test_every_process_has_the_same_start_from_the_batches_of_all(starts, name):
    first, *others = starts[name]
    for other in others:
        for key, value in first.items():
            np.testing.assert_array_equal(value, other[key])
    case = case_of(name)
    model, report = lora_one.init(case.model, case.batches, config=CONFIGS[name])
    assert first["batches"] == report.batches == PROCESSES
    tolerance = DTYPES.get(name, (torch.float32, 1e-5))[1]
    assert first["base_loss"] == pytest.approx(report.base_loss, rel=tolerance / 10)
    if CONFIGS[name].gradient == "exact":
        for layer, product in products(model).items():
            np.testing.assert_allclose(first[layer], product, atol=tolerance * np.abs(product).max())


@pytest.mark.parametrize(("name", "loss"), [("one pass", 0.02), ("two passes", 0.002)])
def test_merged_states_hold_little_less_than_one_process_does(starts, name, loss):
    """Four processes with a batch each, against one with all four: in each layer at most two points of energy less."""
    case = case_of(name)
    expected = gradients(case)
    model, _ = lora_one.init(case.model, case.batches, config=CONFIGS[name])
    for layer, product in products(model).items():
        alone, merged = (share_of_best(expected[layer], p) for p in (product, starts[name][0][layer]))
        assert merged > alone - loss, layer


def share_of_best(g: np.ndarray, product: np.ndarray) -> float:
    """The energy of G in the row and column space of B A, over that of its best part of rank RANK."""
    u, _, vt = np.linalg.svd(product)
    best = np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)
    return float(np.sum((u[:, :RANK].T @ g @ vt[:RANK].T) ** 2) / best)


def free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
