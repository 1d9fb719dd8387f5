"""Who is compared: how each starts, and what it is trained with. The peers are PEFT's own."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.tuners.lora.config import EvaConfig, LoraGAConfig
from torch import nn

import lora_one

from .interventions import Remembering, by_rule, clamped, restart, scaled
from .task import Task

ALPHA = 16.0
Start = Callable[[Task, int, int], tuple[nn.Module, lora_one.Report | None]]  # (task, rank, seed) -> model, report


@dataclass(frozen=True)
class Contender:
    """A way to fine-tune.

    Attributes:
        start: the model as training finds it.
        rate: where the search for the best rate begins.
        optimizer: (model, learning rate) -> optimizer.
        after_step: is called after each step of the optimizer, with the model, the step's number, 1 for the first, and
            the optimizer.
        moves_base: the start takes what it adds off the base weight, so that the model still computes the same.
    """

    start: Start
    rate: float = 3e-3
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer] = field(
        default=lambda model, rate: lora_one.optimizer(model, learning_rate=rate)
    )
    after_step: Callable[[nn.Module, int, torch.optim.Optimizer], None] = lambda model, step, optimizer: None
    moves_base: bool = False


def full(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """All weights are trained."""
    return task.model(), None


def _lora_config(task: Task, rank: int, **options: Any) -> peft.LoraConfig:
    """LoRA as PEFT configures it: alpha 16 unless the method wants another."""
    settings: dict[str, Any] = {"lora_alpha": ALPHA, "target_modules": task.targets}
    return peft.LoraConfig(r=rank, modules_to_save=list(task.modules_to_save) or None, **(settings | options))


def lora(use_rslora: bool, use_dora: bool = False) -> Start:
    """A drawn by Kaiming's uniform, B = 0."""

    def start(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
        config = _lora_config(task, rank, use_rslora=use_rslora, use_dora=use_dora)
        return peft.get_peft_model(task.model(), config), None

    return start


def pissa(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """The leading singular triples of W; alpha = r, as in its paper (arXiv 2404.02948)."""
    config = _lora_config(task, rank, lora_alpha=rank, init_lora_weights="pissa")
    return peft.get_peft_model(task.model(), config), None


def lora_ga(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """Singular triples of the gradient, the base weight corrected; rsLoRA and gamma 16, as in arXiv 2407.05000."""
    model = task.model()
    config = _lora_config(
        task, rank, use_rslora=True, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig(stable_gamma=16)
    )

    def read_gradients() -> None:
        for batch in task.start_batches(seed):
            task.loss_fn(model, batch).backward()

    peft.tuners.lora.preprocess_loraga(model, config, read_gradients)
    return peft.get_peft_model(model, config), None


def eva(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """Singular vectors of the layers' inputs, which also spread the ranks, up to twice the mean (arXiv 2410.07170)."""
    config = _lora_config(task, rank, init_lora_weights="eva", eva_config=EvaConfig(rho=2.0))
    model = peft.get_peft_model(task.model(), config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it tells of layers that it needs more batches for, and reads them again
        peft.initialize_lora_eva_weights(model, task.start_batches(seed), show_progress_bar=False)
    return model, None


def adalora(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """Half as many ranks again, pruned while it trains: the schedule of its documentation's example, by the steps."""
    config = peft.AdaLoraConfig(
        target_r=rank,
        init_r=rank * 3 // 2,
        total_step=task.steps,
        tinit=task.steps // 10,
        tfinal=task.steps // 5,
        lora_alpha=ALPHA,
        target_modules=task.targets,
        modules_to_save=list(task.modules_to_save) or None,
    )
    return peft.get_peft_model(task.model(), config), None


def prune(model: Any, step: int, optimizer: torch.optim.Optimizer) -> None:
    """Let AdaLoRA spread its ranks anew. Its regulariser ends with the last step: it is no part of what is measured."""
    config = model.peft_config["default"]
    model.base_model.update_and_allocate(step)
    if step == config.total_step:
        config.orth_reg_weight = 0.0


def lora_one_start(
    batches: int | None = None, targets: str | None = None, rank_times: int | None = None, **options: Any
) -> Start:
    """Ours, by one pass where nothing else is said.

    Args:
        batches: that the start reads, where it is not the task's number.
        targets: of LoRA, where they are not the task's.
        rank_times: the largest rank over the mean; None for one rank everywhere.
        options: settings of `lora_one.Config`.
    """

    def start(task: Task, rank: int, seed: int) -> tuple[nn.Module, lora_one.Report]:
        config = lora_one.Config(
            rank=rank,
            rank_max=rank_times and rank_times * rank,
            alpha=ALPHA,
            targets=targets or task.targets,
            modules_to_save=task.modules_to_save,
            seed=seed,
            **options,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lora_one.errors.InitWarning)
            return lora_one.init(task.model(), task.start_batches(seed, batches), task.loss_fn, config)

    return start


def without_data(task: Task, rank: int, seed: int) -> tuple[nn.Module, None]:
    """The model with plain LoRA, for the optimizer to start of the first steps' gradients."""
    config = lora_one.Config(
        rank=rank, alpha=ALPHA, targets=task.targets, modules_to_save=task.modules_to_save, seed=seed
    )
    return lora_one.init(task.model(), config=config)[0], None


def loraplus(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """PEFT's: B at 16 times A's rate, as in arXiv 2402.12354."""
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=16.0, weight_decay=0.0)


def adamw(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """PyTorch's, of all that is trainable."""
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)


def ours(**options: Any) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """`lora_one.optimizer` with options."""
    return lambda model, rate: lora_one.optimizer(model, learning_rate=rate, **options)


LOWER = 1e-3
RESTARTED = "Adam restarted after 10 steps"

CONTENDERS: dict[str, Contender] = {
    "full fine-tuning": Contender(full, LOWER, adamw),
    "LoRA": Contender(lora(use_rslora=False)),
    "rsLoRA": Contender(lora(use_rslora=True)),
    "PiSSA": Contender(pissa, moves_base=True),
    "LoRA-GA": Contender(lora_ga, moves_base=True),
    "LoRA+": Contender(lora(use_rslora=False), LOWER, loraplus),
    **{f"LoRA-One, balance {balance:g}": Contender(lora_one_start(balance=balance)) for balance in (0.5, 0.25, 0.0)},
    "LoRA-One, balance 0.25, gamma 64": Contender(lora_one_start(balance=0.25, gamma=64.0)),
    **{
        f"LoRA-One, balance 0.5, {what}": Contender(lora_one_start(balance=0.5), optimizer=Remembering, after_step=hook)
        for what, hook in {
            "A kept for 20 steps": scaled(0.0),
            "A at a tenth of the rate for 20 steps": scaled(0.1),
            "rows of A change by a tenth for 20 steps": clamped(0.1),
            RESTARTED: restart,
        }.items()
    },
    **{  # whether a restart is a cure of the paper's start, or helps any
        f"{name}, {RESTARTED}": Contender(start, optimizer=Remembering, after_step=restart)
        for name, start in {"LoRA": lora(use_rslora=False), "LoRA-One, balance 0": lora_one_start(balance=0.0)}.items()
    },
    **{
        f"LoRA-One, balance 0, P {place}, {damping} {reg:g}": Contender(
            lora_one_start(balance=0.0), rate=rate, optimizer=by_rule(place, damping, reg)
        )
        for place, damping, reg, rate in (
            ("before", "absolute", 1e-6, 2e-3),
            ("before", "relative", 1.0, 3e-3),
            ("after", "relative", 1.0, 5e-4),
            ("basis", "relative", 1.0, 2e-3),
        )
    },
    "LoRA-One, B at 4x the rate": Contender(lora_one_start(), optimizer=ours(loraplus_lr_ratio=4.0)),
    "LoRA-One, B at 16x the rate": Contender(lora_one_start(), LOWER, ours(loraplus_lr_ratio=16.0)),
    "LoRA-One, adaptive rank": Contender(lora_one_start(rank_times=4)),
    "EVA": Contender(eva),
    "AdaLoRA": Contender(adalora, optimizer=adamw, after_step=prune),
    "DoRA": Contender(lora(use_rslora=False, use_dora=True)),
    "LoRA-One, DoRA": Contender(lora_one_start(dora=True)),
}

ATTENTION = r".*\.(q_proj|k_proj|v_proj|o_proj)"
# One factor at a time, at LoRA-One's own best rate of the main table.
ABLATIONS: dict[str, dict[str, Contender]] = {
    "gradient": {"one pass": Contender(lora_one_start()), "exact": Contender(lora_one_start(gradient="exact"))},
    "init batches": {str(count): Contender(lora_one_start(count)) for count in (1, 8, 64)},
    "gamma": {f"{gamma:g}": Contender(lora_one_start(gamma=gamma)) for gamma in (4.0, 16.0, 64.0, 128.0, 512.0)},
    "reg": {
        f"{reg:g}": Contender(lora_one_start(), optimizer=ours(precondition=True, reg=reg))
        for reg in (1e-6, 1e-4, 1e-2, 1.0)
    },
    "targets": {
        "all linear layers": Contender(lora_one_start()),
        "attention": Contender(lora_one_start(targets=ATTENTION)),
        "query and value": Contender(lora_one_start(targets=r".*\.(q_proj|v_proj)")),
        "feed-forward": Contender(lora_one_start(targets=r".*\.(gate_proj|up_proj|down_proj)")),
    },
}
