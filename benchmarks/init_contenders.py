"""The ways to start LoRA that `benchmarks.init` measures, each a function that runs in a process of its own.

On a GPU each runs three times, on a model that is made anew: the first, which loads kernels, does not count. The
slowest peers run once.
"""

import gc
import statistics
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
from benchmarks.harness import MIB, peak_memory, synchronize
from benchmarks.init_models import RANK, TARGETS, cases, random_llama, worst_energies
from lora_one import passes as spectra
from lora_one.backends.torch.passes import folds
from lora_one.backends.torch.passes.over_batches import Passes
from lora_one.finetune.tuners import load_tuner
from lora_one.finetune.tuners.torch.causal import TorchTuner

Numbers = dict[str, float]
CLOCK = {"cpu": "cpu_seconds", "cuda": "seconds"}  # what ratios are of


def ours(case: str, folder: str, backend: str = "torch", device: str = "cpu", **settings: Any) -> Numbers:
    """`lora_one.init`. "outside" is the share of the time that is not the model's forward and backward (torch)."""
    spec = cases(device)[case]
    config = lora_one.Config(**{"rank": RANK, "recompute": False, **settings})
    if device == "cpu":
        tuner = _opener(backend)(Path(folder), spec.dtype, "cpu" if backend == "torch" else None)
        batches, loss_fn = tuner.batches(spec.tokens, spec.batch_size), tuner.loss_fn
    else:
        loss_fn = None

    def once() -> tuple[Numbers, Any]:
        if device == "cpu":
            model, its = tuner.model, batches
            if backend == "torch":
                read_weights(model)
        else:
            model, its = _torch_model(case, folder, device)
        with (
            _timed(Passes, "_run", device) as inside,
            _timed(spectra, "exact_spectra", device) as decomposing,
            _timed(folds, "fold", device) as folding,
        ):
            numbers, (attached, report) = _measured(lambda: lora_one.init(model, its, loss_fn, config), backend, device)
        numbers["passes"] = report.passes
        if backend == "torch":  # gradients are folded, and exact ones decomposed, in the backward pass and after it
            others = decomposing + folding
            model_only = sum(
                end - begin - sum(e - b for b, e in others if begin <= b and e <= end) for begin, end in inside
            )
            numbers["outside"] = 1.0 - model_only / numbers[CLOCK[device]]
        return numbers, (attached, report)

    return _repeated(once, folder, device, lambda its, adapter: lora_one.save(its[0], adapter, its[1]))


def lora_ga(case: str, folder: str, device: str = "cpu") -> Numbers:
    """PEFT's LoRA-GA: all weight gradients at once, then svd_lowrank(q=4r, niter=4)."""

    def once() -> tuple[Numbers, nn.Module]:
        model, batches = _torch_model(case, folder, device)
        config = _lora_config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())

        def backward() -> None:
            for batch in batches:
                model(**batch).loss.backward()

        def run() -> nn.Module:
            preprocess_loraga(model, config, backward)
            return peft.get_peft_model(model, config)

        return _measured(run, device=device)

    return _repeated(once, folder, device)


def eva(case: str, folder: str, device: str = "cpu") -> Numbers:
    """PEFT's EVA: incremental SVDs of the activations until they stop turning; B = 0, and no gradient."""

    def once() -> tuple[Numbers, nn.Module]:
        model, batches = _torch_model(case, folder, device)

        def run() -> nn.Module:
            config = _lora_config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
            attached = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
            peft.initialize_lora_eva_weights(attached, batches, show_progress_bar=False)
            return attached

        return _measured(run, device=device)

    return _repeated(once, folder, device, times=0)


def authors(case: str, folder: str, device: str = "cpu") -> Numbers:
    """The recipe of the LoRA-One authors' code: each weight's gradient moved to the host in the backward pass and
    summed there, then svd_lowrank(q=512, niter=16), and the pair from U sqrt(S / S_1) / sqrt(gamma)."""

    def once() -> tuple[Numbers, nn.Module]:
        model, batches = _torch_model(case, folder, device)
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
                g = -gradients[name].to(device) / len(batches)
                u, s, v = torch.svd_lowrank(g, q=min(512, *module.weight.shape), niter=16)
                q = (s[:RANK] / s[0]).sqrt() / 128**0.5
                layer: Any = attached.get_submodule(f"base_model.model.{name}")
                layer.lora_A["default"].weight.data = (v[:, :RANK] * q).mT.contiguous()
                layer.lora_B["default"].weight.data = (u[:, :RANK] * q).contiguous()
            return attached

        return _measured(run, device=device)

    return _repeated(once, folder, device, times=0)


def training_step(case: str, folder: str, rank: int, device: str = "cpu") -> Numbers:
    """The yardstick: a first step of LoRA training over the same batches. "seconds" is its forward and backward alone,
    the peak that of the whole step, AdamW's moments included."""

    def once() -> tuple[Numbers, None]:
        model, batches = _torch_model(case, folder, device)
        times: dict[str, float] = {}

        def run() -> None:
            attached = peft.get_peft_model(model, _lora_config(r=rank))
            optimizer = torch.optim.AdamW([p for p in attached.parameters() if p.requires_grad])
            if device != "cpu":  # what has just been attached runs for a first time, too
                model(**batches[0]).loss.backward()
                attached.zero_grad(set_to_none=True)
            synchronize(device)
            began = time.perf_counter(), time.process_time()
            for batch in batches:
                (attached(**batch).loss / len(batches)).backward()
            synchronize(device)
            times.update(_since(*began))
            optimizer.step()

        numbers, _ = _measured(run, device=device)
        return numbers | times, None

    return _repeated(once, folder, device)


def _repeated(
    once: Callable[[], tuple[Numbers, Any]],
    folder: str,
    device: str,
    save: Callable[[Any, str], Any] = lambda attached, adapter: attached.save_pretrained(
        adapter, save_embedding_layers=False
    ),
    times: int = 2,
) -> Numbers:
    """The numbers of what runs once; on a GPU medians over `times` times after that, if there are any. And how good the
    start is that it leaves, if it leaves one."""
    first, made = once()
    rounds = []
    for _ in range(times if device != "cpu" else 0):
        del made
        gc.collect()
        torch.cuda.empty_cache()
        numbers, made = once()
        rounds.append(numbers)
    found = {key: statistics.median(numbers[key] for numbers in rounds or [first]) for key in first}
    if rounds:
        found["first_seconds"] = first["seconds"]
    if made is None or not any(Path(folder).iterdir()):
        return found
    with tempfile.TemporaryDirectory() as adapter:
        save(made, adapter)
        return found | worst_energies(Path(folder), Path(adapter), device)


def _measured(run: Callable[[], Any], backend: str = "torch", device: str = "cpu") -> tuple[Numbers, Any]:
    """Wall time and peak memory above what is there before: RSS, MLX's own count, or that of PyTorch's allocator."""
    with peak_memory(device) as memory, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if backend == "mlx":
            import mlx.core as mx

            mx.reset_peak_memory()
            resident = mx.get_active_memory()
        synchronize(device)
        began = time.perf_counter(), time.process_time()
        result = run()
        synchronize(device)
        times = _since(*began)
    peak = mx.get_peak_memory() - resident if backend == "mlx" else memory.peak
    return times | {"peak_mib": peak / MIB}, result


def _since(wall: float, cpu: float) -> Numbers:
    """On one thread the CPU's time is the wall time of a machine that does nothing else."""
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _torch_model(case: str, folder: str, device: str = "cpu") -> tuple[LlamaForCausalLM, list[dict[str, torch.Tensor]]]:
    spec = cases(device)[case]
    if device == "cpu":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.dtype), local_files_only=True)
        read_weights(model)
    else:
        model = random_llama(spec, device)
    ids = torch.from_numpy(np.array([sequence.tokens for sequence in spec.tokens])).to(device)
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
    return load_tuner(backend).open_tuner


@contextmanager
def _timed(owner: Any, name: str, device: str) -> Iterator[list[tuple[float, float]]]:
    """A list that a function of a class or a module adds the beginning and the end of each of its calls to, for a
    while: seconds of the CPU's time, or with a GPU on the wall."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    found: list[tuple[float, float]] = []
    original = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        synchronize(device)
        began = clock()
        try:
            return original(*args, **kwargs)
        finally:
            synchronize(device)
            found.append((began, clock()))

    setattr(owner, name, timed)
    try:
        yield found
    finally:
        setattr(owner, name, original)
