"""What the rules are compared on: the embedded Llama's two tasks, and low-rank regression, linear and through a ReLU.

A task is a model that LoRA-One has started, its training batches and its measure. `reset` takes the factors back to the
start, so that one start serves every rule and rate.
"""

from abc import ABC, abstractmethod
from dataclasses import replace

import torch
from peft import PeftModel
from torch import Tensor, nn

import lora_one
from lora_one import demo
from lora_one.backends.torch.optimizer import lora_pairs
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode, encode_prompt
from lora_one.finetune.tuners.torch.opening import open_tuner

LLAMA = {"main": demo.TRAIN.parent, "harder": demo.TRAIN.parent / "harder"}
REGRESSION = ("linear", "relu", "linear, gamma 128")
TASKS = (*LLAMA, *REGRESSION)
# The rank at which all rules are compared: that of the shift in the theory's setting, else the default.
RANK = {"main": 8, "harder": 8, "linear": 4, "relu": 4, "linear, gamma 128": 8}


class Task(ABC):
    """A started model and how to train and measure it."""

    model: PeftModel

    def remember(self) -> None:
        """Take the factors as they are now for the start."""
        self.pairs = lora_pairs(self.model)
        self._start = [parameter.detach().clone() for pair in self.pairs for parameter in pair]

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the start."""
        parameters = [parameter for pair in self.pairs for parameter in pair]
        for parameter, start in zip(parameters, self._start, strict=True):
            parameter.copy_(start)
            parameter.grad = None

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The mean training loss of one step's batch."""

    @abstractmethod
    def scores(self, generate: bool) -> dict[str, float]:
        """`loss` on held-out data, and what else is measured; `generate` asks for what takes long."""


class LlamaTask(Task):
    """The embedded Llama. Each epoch is another seeded order of the 2048 training items."""

    def __init__(self, name: str, rank: int, seed: int, batch_size: int):
        torch.manual_seed(seed)
        self._tuner = open_tuner(demo.MODEL, "float32", None)
        tokenizer = self._tuner.tokenizer
        train, self._test = (read_examples(LLAMA[name] / f"{split}.jsonl") for split in ("train", "test"))
        self._train = [encode(tokenizer, example) for example in train]
        self._held_out = self._tuner.batches([encode(tokenizer, example) for example in self._test], 128)
        batches = self._tuner.batches(self._train[seed * 256 : (seed + 1) * 256], 32)
        config = lora_one.Config(rank=rank, seed=seed, balance=0.5)
        self.model, _ = lora_one.init(self._tuner.model, batches, self._tuner.loss_fn, config)
        self._tuner.model = self.model
        self._seed, self._batch_size = seed, batch_size
        self.remember()

    def loss(self, step: int) -> Tensor:
        per_epoch = len(self._train) // self._batch_size
        order = torch.Generator().manual_seed(1000 * self._seed + step // per_epoch)
        first = step % per_epoch * self._batch_size
        chosen = torch.randperm(len(self._train), generator=order)[first : first + self._batch_size]
        (batch,) = self._tuner.batches([self._train[i] for i in chosen], self._batch_size)
        return self._tuner.loss_fn(self.model, batch)

    def scores(self, generate: bool) -> dict[str, float]:
        found = {"loss": self._tuner.mean_loss(self._held_out)}
        if generate:
            tokenizer = self._tuner.tokenizer
            answers = self._tuner.generate([encode_prompt(tokenizer, example) for example in self._test], 10)
            right = sum(tokenizer.decode(a) == e.completion for a, e in zip(answers, self._test, strict=True))
            found["exact_match"] = right / len(self._test)
        return found


class RegressionTask(Task):
    """y = act((W + D) x), D of rank 4 with singular values 1 ... 0.01: the setting of the theory, ill-conditioned.

    64 inputs and outputs, 512 Gaussian samples without noise, the whole set at each step; measured on 2048 others. The
    start is the theory's, the gradient itself (twice it through a ReLU, which halves the gradient), or LoRA-One's
    default, of spectral norm scaling / 128.
    """

    def __init__(self, name: str, rank: int, seed: int):
        n, generator = 64, torch.Generator().manual_seed(seed)
        activation = nn.ReLU() if name == "relu" else nn.Identity()
        student = nn.Sequential(nn.Linear(n, n, bias=False), activation)
        teacher = nn.Sequential(nn.Linear(n, n, bias=False), activation)
        u, v = (torch.linalg.qr(torch.randn(n, 4, generator=generator))[0] for _ in "uv")
        with torch.no_grad():
            student[0].weight.copy_(torch.randn(n, n, generator=generator) / n**0.5)
            teacher[0].weight.copy_(student[0].weight + (u * torch.logspace(0, -2, 4)) @ v.T)
            x = torch.randn(512 + 2048, n, generator=generator)
            y = teacher(x)
        self._train, self._held_out = (x[:512], y[:512]), (x[512:], y[512:])
        config = lora_one.Config(rank=rank, seed=seed, balance=0.5, targets=r"0")
        if name in ("linear", "relu"):
            eta = (2.0 if name == "relu" else 1.0) * rank**0.5 / config.alpha  # scaling * eta is the step
            config = replace(config, scale="gradient", eta=eta)
        self.model, _ = lora_one.init(student, [self._train], half_squared_error, config)
        self.remember()

    def loss(self, step: int) -> Tensor:
        return half_squared_error(self.model, self._train)

    @torch.no_grad()
    def scores(self, generate: bool) -> dict[str, float]:
        return {"loss": float(half_squared_error(self.model, self._held_out))}


def half_squared_error(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1/2 ||f(x) - y||^2, the mean over the samples."""
    x, y = batch
    return 0.5 * (model(x) - y).square().sum(dim=1).mean()


def make_task(name: str, rank: int, seed: int, batch_size: int) -> Task:
    """The task `name` of TASKS, started."""
    if name in REGRESSION:
        return RegressionTask(name, rank, seed)
    return LlamaTask(name, rank, seed, batch_size)
