"""transformers and PEFT."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.core.factors import Factors

from .job import Batch
from .record import Step


class Doubled(TorchFunctionMode):
    """float64 wherever float32 is asked for by name, as transformers does in norms, rotations and the loss."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func = Tensor.double if func is Tensor.float else func
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in (kwargs or {}).items()}
        return func(*args, **kwargs)


class Runner:
    """See `benchmarks.agreement.record.Framework`."""

    name = "torch"
    loss_fn = None

    def __init__(self, dtype: str):
        self._dtype = getattr(torch, dtype)

    def precision(self) -> Any:
        return Doubled() if self._dtype == torch.float64 else nullcontext()

    def open(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype, local_files_only=True).eval()

    def batch(self, batch: Batch) -> dict[str, Tensor]:
        return {name: torch.tensor(value, dtype=torch.long) for name, value in batch.items()}

    def weights(self, model: Any) -> dict[str, np.ndarray]:
        return {name: _numpy(weight) for name, weight in model.named_parameters()}

    def evaluate(self, model: Any, batch: dict[str, Tensor]) -> tuple[np.ndarray, float, dict[str, np.ndarray]]:
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        gradients = {name: _numpy(weight.grad) for name, weight in model.named_parameters()}
        return _numpy(output.logits), output.loss.item(), gradients

    def factors(self, model: Any) -> dict[str, Factors]:
        return {
            site.layer.name: Factors(_numpy(site.lora_A.weight), _numpy(site.lora_B.weight))
            for site in find_sites(model)
        }

    def train(self, model: Any, optimizer: torch.optim.Optimizer, batches: list[dict[str, Tensor]]) -> Iterator[Step]:
        sites = find_sites(model)
        for batch in batches:
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            gradients = {
                site.layer.name: Factors(_numpy(site.lora_A.weight.grad), _numpy(site.lora_B.weight.grad))
                for site in sites
            }
            optimizer.step()
            yield Step(loss.item(), gradients, self.factors(model))


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().numpy().copy()
