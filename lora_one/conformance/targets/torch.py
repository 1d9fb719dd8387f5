"""The PyTorch target: eager, torch.compile, and LoraOneAdamW."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_one.backends.torch.linalg.precision import no_reduced_matmul
from lora_one.backends.torch.lora_adamw import LoraOneAdamW
from lora_one.backends.torch.ops import TorchOps
from lora_one.backends.torch.pairs import LoraPair
from lora_one.conformance.computations import Problem
from lora_one.conformance.target import Arrays, Target
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError

_OPS = TorchOps()


def open_target(dtype: str, device: str | None = None) -> Target | None:
    """Return PyTorch on a device (default: CUDA if there is one). Apple's GPU (mps) has no float64: None."""
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if place.startswith("mps") and dtype == "float64":
        return None
    try:
        like = torch.zeros((), dtype=getattr(torch, dtype), device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"torch has no device {place!r} here: {str(error).splitlines()[0]}") from error
    # Without a C++ compiler torch can trace a program, but not generate code for it.
    backend = "inductor" if place != "cpu" or shutil.which("c++") or shutil.which("g++") else "aot_eager"
    note = "" if backend == "inductor" else "torch.compile traced only: no C++ compiler here"
    return Target("torch", dtype, _OPS, like, _compiler(backend), _train, device=place, note=note)


def _compiler(backend: str) -> Callable[[Callable[[Arrays], Arrays]], Callable[[Arrays], Arrays]]:
    def compile_(function: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
        torch.compiler.reset()  # else a new program counts as a recompilation, and torch limits those
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=False)

        def call(arrays: Arrays) -> Arrays:
            with no_reduced_matmul():  # a compiled program takes the precision settings of its caller
                result: Arrays = compiled(arrays)
            return result

        return call

    return compile_


def _train(problems: Sequence[Problem], params: Mapping[str, Any]) -> list[Tensor]:
    pairs = [LoraPair(*(torch.nn.Parameter(factor.clone()) for factor in problem.pair)) for problem in problems]
    parameters = [factor for pair in pairs for factor in pair]
    settings = {"lr": params["rate"], "weight_decay": params["weight_decay"]}
    optimizer: torch.optim.Optimizer
    if params["reg"] is None:
        optimizer = torch.optim.AdamW(parameters, **settings)
    else:
        optimizer = LoraOneAdamW(parameters, pairs, params["reg"], params["damping"], **settings)
    for _ in range(params["steps"]):
        with torch.no_grad():
            for pair, problem in zip(pairs, problems, strict=True):
                pair.lora_A.grad, pair.lora_B.grad = problem.gradient(_OPS, Factors(*pair), params["loss"])
        optimizer.step()
    return [parameter.detach() for parameter in parameters]
