"""What an initialisation is asked to do."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_choice, check_flag, check_integer, check_positive, check_range, check_texts, shown
from .errors import ConfigError

DEFAULT_GAMMA = 128.0
AUTO_PASSES = tuple(range(4, 13))  # four are the least from which the report can tell what is still missing


@dataclass(frozen=True, kw_only=True)
class Config:
    """How `lora_one.init` attaches LoRA and starts it. Validated on construction; defaults are the paper's LLM runs'.

    Attributes:
        rank: r of each pair.
        alpha: the product B A is scaled by alpha / sqrt(rank), or alpha / rank without rsLoRA.
        use_rslora: see `alpha` (arXiv 2312.03732). The adapter itself says the scale by the plain rule alpha / rank,
            with the alpha that this takes, since many readers know no other.
        scale: "normalized" starts at one gradient step of spectral norm scaling / gamma, whatever the gradient's scale;
            "gradient" at B A = -eta G_r, the form of the paper's theory.
        gamma: the larger, the smaller the step of the normalized scale. "auto" starts from 128 and raises it while the
            initialised model's loss on the init batches is above the base model's.
        eta: the step size of scale="gradient".
        targets: "all-linear" (every linear layer but the output layer; on PyTorch and MLX no gate of one output
            either), a sequence of module names, or a regular expression that the whole module path must match: PEFT's
            meaning, but that a mixture's routers and stacked experts, where they are no linear layers, stay as they
            are.
        modules_to_save: names of modules, a new head for instance, that are trained whole beside the LoRA layers and
            kept with the adapter: PEFT's meaning. PyTorch only. Fit a new head before `init`: docs/heads.md.
        gradient: "sketch" never forms a gradient of a weight; "exact" does, layer by layer where it can.
        passes: backward passes over the batches for the sketch, >= 2. "auto" makes 4, and one more at a time, up to 12,
            while some layer's factors hold less than 99 % of the best rank-r energy, by the report's own estimate.
        oversample: columns that the sketch probes beyond `rank`.
        recompute: whether the blocks of a transformers model compute their activations again in the backward pass: all
            of them (True), none (False), or with "auto" those whose activations no longer fit in half of the memory
            that is free. It costs up to a forward pass more. PyTorch only: elsewhere it is up to the model.
        seed: of the sketch's test matrices.
        dropout: of the LoRA layers, while training.
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = True
    scale: Literal["normalized", "gradient"] = "normalized"
    gamma: float | Literal["auto"] = DEFAULT_GAMMA
    eta: float = 1.0
    targets: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] = ()
    gradient: Literal["sketch", "exact"] = "sketch"
    passes: int | Literal["auto"] = "auto"
    oversample: int = 16
    recompute: Literal["auto"] | bool = "auto"
    seed: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str) and hasattr(self.targets, "__iter__"):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "modules_to_save", check_texts("modules_to_save", self.modules_to_save))
        check_integer("rank", self.rank, least=1)
        if self.passes != "auto":
            check_integer("passes", self.passes, least=2, otherwise=' or "auto"')
        check_integer("oversample", self.oversample, least=0)
        check_integer("seed", self.seed)
        check_positive("alpha", self.alpha)
        check_positive("eta", self.eta)
        check_choice("scale", self.scale, ("normalized", "gradient"))
        check_choice("gradient", self.gradient, ("sketch", "exact"))
        check_choice("recompute", self.recompute, ("auto", True, False))
        if self.gamma != "auto":
            check_positive("gamma", self.gamma, otherwise=' or "auto"')
        check_range("dropout", self.dropout, 0.0, 1.0)
        check_flag("use_rslora", self.use_rslora)
        named = isinstance(self.targets, (str, tuple)) and all(isinstance(name, str) and name for name in self.targets)
        if not self.targets or not named:
            raise ConfigError(
                f'targets must be "all-linear", a regular expression or module names, got {shown(self.targets)}'
            )
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except (re.error, OverflowError, RecursionError) as error:
                raise ConfigError(f"targets must be a regular expression, got {self.targets!r}: {error}") from error

    @property
    def scaling(self) -> float:
        """The factor s in W x + s B A x."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def pass_counts(self) -> tuple[int, ...]:
        """After how many passes the sketch may end, ascending."""
        return AUTO_PASSES if self.passes == "auto" else (self.passes,)

    @property
    def first_gamma(self) -> float:
        """The gamma to start from."""
        return DEFAULT_GAMMA if self.gamma == "auto" else float(self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as written to `lora_one.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """The inverse of `to_dict`. Unknown keys are an error."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            known = ", ".join(field.name for field in dataclasses.fields(cls))
            raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {known}")
        return cls(**values)
