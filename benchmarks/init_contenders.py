"""The ways to start LoRA that `benchmarks.init` measures, each a function that runs in a process of its own."""

import importlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import lora_one
from benchmarks.harness import MIB, PeakMemory
from benchmarks.init_models import CASES, RANK, TARGETS, worst_energies
from lora_one import initialization
from lora_one.backends import load_backend
from lora_one.backends.torch import TorchSession, frozen_linear
from lora_one.backends.torch.tuner import TorchTuner

Numbers = dict[str, float]


def ours(
    case: str, folder: str, gradient: str, backend: str = "torch", onednn: bool = True, **settings: Any
) -> Numbers:
    """`lora_one.init`. "outside" is the share of the time that is not the model's forward and backward (torch)."""
    spec = CASES[case]
    config = lora_one.Config(**{"rank": RANK, "gradient": gradient, "recompute": False, **settings})
    if not onednn:
        frozen_linear._ONEDNN = None
    tuner = _opener(backend)(Path(folder), spec.dtype, "cpu" if backend == "torch" else None)
    if backend == "torch":
        read_weights(tuner.model)
    batches = tuner.batches(spec.tokens, spec.batch_size)
    with _timed(TorchSession, "_run") as inside, _timed(initialization, "exact_spectrum") as decomposing:
        numbers, (model, report) = _measured(
            lambda: lora_one.init(tuner.model, batches, tuner.loss_fn, config), backend
        )
    numbers["passes"] = report.passes
    if backend == "torch":  # where gradients are exact, each is decomposed in the backward pass
        numbers["outside"] = 1.0 - (sum(inside) - sum(decomposing)) / numbers["cpu_seconds"]
    with tempfile.TemporaryDirectory() as adapter:
        lora_one.save(model, adapter, report)
        return numbers | worst_energies(Path(folder), Path(adapter))


def lora_ga(case: str, folder: str) -> Numbers:
    """PEFT's LoRA-GA: all weight gradients at once, then svd_lowrank(q=4r, niter=4)."""
    model, batches = _torch_model(case, folder)
    config = _lora_config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

    def backward() -> None:
        for batch in batches:
            model(**batch).loss.backward()

    def run() -> nn.Module:
        preprocess_loraga(model, config, backward)
        return peft.get_peft_model(model, config)

    return _with_energies(folder, *_measured(run))


def eva(case: str, folder: str) -> Numbers:
    """PEFT's EVA: incremental SVDs of the activations until they stop turning; B = 0, and no gradient."""
    model, batches = _torch_model(case, folder)

    def run() -> nn.Module:
        config = _lora_config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
        attached = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
        peft.initialize_lora_eva_weights(attached, batches, show_progress_bar=False)
        return attached

    return _with_energies(folder, *_measured(run))


def authors(case: str, folder: str) -> Numbers:
    """The recipe of the LoRA-One authors' code: each weight's gradient moved to the host in the backward pass and
    summed there, then svd_lowrank(q=512, niter=16), and the pair from U sqrt(S / S_1) / sqrt(gamma)."""
    model, batches = _torch_model(case, folder)
    targets = {name: m for name, m in model.named_modules() if name.endswith(TARGETS) and isinstance(m, nn.Linear)}

    def run() -> nn.Module:
        gradients: dict[str, torch.Tensor] = {}
        model.requires_grad_(False)
        for name, module in targets.items():

            def offload(weight: torch.Tensor, name: str = name) -> None:
                assert weight.grad is not None
                moved = weight.grad.float().cpu()
                gradients[name] = gradients[name] + moved if name in gradients else moved
                weight.grad = None

            module.weight.requires_grad_(True).register_post_accumulate_grad_hook(offload)
        for batch in batches:
            model(**batch).loss.backward()
        attached = peft.get_peft_model(model, _lora_config())
        for name, module in targets.items():
            u, s, v = torch.svd_lowrank(-gradients[name] / len(batches), q=min(512, *module.weight.shape), niter=16)
            q = (s[:RANK] / s[0]).sqrt() / 128**0.5
            layer: Any = attached.get_submodule(f"base_model.model.{name}")
            layer.lora_A["default"].weight.data = (v[:, :RANK] * q).mT.contiguous()
            layer.lora_B["default"].weight.data = (u[:, :RANK] * q).contiguous()
        return attached

    return _with_energies(folder, *_measured(run))


def training_step(case: str, folder: str, rank: int) -> Numbers:
    """The yardstick: a first step of LoRA training over the same batches. "seconds" is its forward and backward alone,
    the peak that of the whole step, AdamW's moments included."""
    model, batches = _torch_model(case, folder)
    times: dict[str, float] = {}

    def run() -> None:
        attached = peft.get_peft_model(model, _lora_config(r=rank))
        optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad])
        began = time.perf_counter(), time.process_time()
        for batch in batches:
            (attached(**batch).loss / len(batches)).backward()
        times.update(_since(*began))
        optimizer.step()

    numbers, _ = _measured(run)
    return numbers | times


def _measured(run: Callable[[], Any], backend: str = "torch") -> tuple[Numbers, Any]:
    """Wall time and peak memory above what is resident before: RSS, or MLX's own count."""
    with PeakMemory() as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if backend == "mlx":
            import mlx.core as mx

            mx.reset_peak_memory()
            resident = mx.get_active_memory()
        began = time.perf_counter(), time.process_time()
        result = run()
        times = _since(*began)
    peak = mx.get_peak_memory() - resident if backend == "mlx" else memory.peak
    return times | {"peak_mib": peak / MIB}, result


def _since(wall: float, cpu: float) -> Numbers:
    """On one thread the CPU's time is the wall time of a machine that does nothing else."""
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _with_energies(folder: str, numbers: Numbers, attached: Any) -> Numbers:
    with tempfile.TemporaryDirectory() as adapter:
        attached.save_pretrained(adapter, save_embedding_layers=False)
        return numbers | worst_energies(Path(folder), Path(adapter))


def _torch_model(case: str, folder: str) -> tuple[LlamaForCausalLM, list[dict[str, torch.Tensor]]]:
    spec = CASES[case]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.dtype), local_files_only=True)
    read_weights(model)
    ids = torch.from_numpy(np.array([sequence.tokens for sequence in spec.tokens]))
    mask = torch.ones_like(ids)
    parts = zip(ids.split(spec.batch_size), mask.split(spec.batch_size), strict=True)
    return model, [{"input_ids": x, "attention_mask": m, "labels": x} for x, m in parts]


def read_weights(model: nn.Module) -> None:
    """Until they are read, weights are a mapping of their file, and take no memory: they would count as the start's."""
    for weight in model.parameters():
        weight.sum()


def _lora_config(**settings: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": RANK, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM", **settings})


def _opener(backend: str) -> Callable[..., TorchTuner]:
    """The backend's own `open_tuner`."""
    return importlib.import_module(f"{load_backend(backend).__name__}.tuner").open_tuner


@contextmanager
def _timed(owner: Any, name: str) -> Iterator[list[float]]:
    """A list that a function of a class or a module adds the CPU seconds of each of its calls to, for a while."""
    found: list[float] = []
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            found.append(time.process_time() - began)

    setattr(owner, name, timed)
    try:
        yield found
    finally:
        setattr(owner, name, original)
