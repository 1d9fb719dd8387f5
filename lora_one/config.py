"""`Config`: the settings of `lora_one.init`."""

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .checks import check_choice, check_flag, check_integer, check_positive, check_range, check_texts, shown
from .core.factors import BALANCE, SYMMETRIC
from .errors import ConfigError

DEFAULT_GAMMA = 128.0


@dataclass(frozen=True, kw_only=True)
class Config:
    """The settings of `lora_one.init`: how LoRA is attached, and how it is started.

    All arguments are keyword arguments with defaults, those of the paper's LLM runs (arXiv 2502.01235) but for
    `balance`, so `lora_one.Config(rank=16)` changes the rank alone. Values are checked on construction, and an instance
    cannot be changed afterwards. In the formulas G = dL/dW, (out, in), is the gradient of a layer's weight and
    U diag(S) V^T the SVD of -G.

    Attributes:
        rank: int >= 1, default 8. The number r of columns of lora_B and rows of lora_A, of every LoRA pair; their mean
            with `rank_max`.
        alpha: float > 0, default 16. The layer computes W x + s B A x with s = alpha / sqrt(rank), or alpha / rank
            without rsLoRA.
        use_rslora: bool, default True. Choose s = alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732). The adapter itself
            states s by the plain rule alpha / rank, with the alpha that this requires, since many readers know no other
            rule.
        rank_max: int >= rank or None (default). None gives every layer the same rank. A number lets the ranks follow
            the gradients: each layer gets 1 to `rank_max`, the more the slower its S_i / S_1 fall, for no more
            parameters than `rank` in every layer takes. s stays that of `rank`. See docs/guide/adaptive-rank.md.
        scale: "normalized" (default) or "gradient". "normalized" starts at B A = U diag(S / S_1) V^T / gamma, a step of
            spectral norm s / gamma whatever the gradient's scale (Algorithm 1 as the paper's LLM experiments run it).
            "gradient" starts at B A = -eta G_r, the form of the paper's theory, where G_r is the best rank-r part of G.
        gamma: float > 0 or "auto", default 128. Divides the step of scale="normalized": the larger, the smaller the
            step. "auto" starts from 128 and raises it as long as the initialised model's loss on the init batches is
            above the base model's.
        balance: float from 0 to 0.5, default 0. How A and B share the start: with p for it, the rows of A are
            r^(1/2 - p) (S_i / S_1)^p / sqrt(gamma) long, and B has the rest, so that B A is the same for every p. At 0
            all rows of A are equally long, and B has the singular values. 0.5 is the paper's form, half to each, which
            learnt less at ranks of 32 and more: its last rows are short. See docs/evidence/quality.md.
        eta: float > 0, default 1. The step size of scale="gradient", in units of a learning rate.
        targets: the layers that get LoRA, default "all-linear": every linear layer except the output layer, and on
            PyTorch and MLX except gates with one output. Or a sequence of module names, or a regular expression that
            must match the whole module path, as in PEFT: these may name embeddings and convolutions too. On PyTorch a
            name may also be the end of a parameter's path that holds the weights of all experts, such as
            "experts.down_proj"; routers stay as they are where they are no linear layers.
        modules_to_save: sequence of names, default (). Modules to train whole beside the LoRA layers and to keep with
            the adapter, such as a new head, as in PEFT. Fit a new head before `init`: docs/guide/new-heads.md.
        gradient: "sketch" (default) or "exact". "sketch" never forms the gradient of a weight: each layer keeps a
            running SVD of it, which the backward pass of every batch renews. "exact" forms G, layer by layer where it
            can.
        passes: int >= 1 or "auto", default 1. Backward passes over the batches for the sketch; each further one reads
            both sides of the gradient again and finds most of what was missing. "auto" makes a second one where, by the
            report's own estimate, some layer's factors hold less than 95 % of the best rank-r energy. The least is 2
            for models in which the backward pass cannot see a layer's inputs: see docs/how-it-works.md.
        oversample: int >= 0, default 16. Directions that the sketch follows beyond the largest rank.
        recompute: bool or "auto" (default). Whether the blocks of a transformers model compute their activations again
            in the backward pass, to save memory at the cost of up to one more forward pass: all blocks (True), none
            (False), or ("auto") those whose activations no longer fit into half of the free memory. PyTorch only; in
            other frameworks the model decides.
        seed: int, default 0. Seed of the sketch's random test matrices.
        dropout: float in [0, 1), default 0. Dropout rate of the LoRA layers while training.
        dora: bool, default False. Train the length of each row of W + s B A by itself, as DoRA does (arXiv 2402.09353).
            The lengths start at those of W + s B A, so the start is that of LoRA: docs/guide/dora.md.

    Raises:
        ConfigError: an invalid value; the message names the setting.

    >>> config = Config(rank=4, targets=["q_proj", "v_proj"])
    >>> config.scaling
    8.0
    >>> Config.from_dict(config.to_dict()) == config
    True
    >>> Config(rank=0)
    Traceback (most recent call last):
    lora_one.errors.ConfigError: rank must be an integer >= 1, got 0
    """

    rank: int = 8
    alpha: float = 16.0
    use_rslora: bool = True
    rank_max: int | None = None
    scale: Literal["normalized", "gradient"] = "normalized"
    gamma: float | Literal["auto"] = DEFAULT_GAMMA
    balance: float = BALANCE
    eta: float = 1.0
    targets: str | Sequence[str] = "all-linear"
    modules_to_save: Sequence[str] = ()
    gradient: Literal["sketch", "exact"] = "sketch"
    passes: int | Literal["auto"] = 1
    oversample: int = 16
    recompute: Literal["auto"] | bool = "auto"
    seed: int = 0
    dropout: float = 0.0
    dora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.targets, str) and hasattr(self.targets, "__iter__"):
            object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "modules_to_save", check_texts("modules_to_save", self.modules_to_save))
        check_integer("rank", self.rank, least=1)
        if self.rank_max is not None:
            check_integer("rank_max", self.rank_max, least=self.rank, otherwise=" (the rank) or None")
        if self.passes != "auto":
            check_integer("passes", self.passes, least=1, otherwise=' or "auto"')
        check_integer("oversample", self.oversample, least=0)
        check_integer("seed", self.seed)
        check_positive("alpha", self.alpha)
        check_positive("eta", self.eta)
        check_choice("scale", self.scale, ("normalized", "gradient"))
        check_choice("gradient", self.gradient, ("sketch", "exact"))
        check_choice("recompute", self.recompute, ("auto", True, False))
        if self.gamma != "auto":
            check_positive("gamma", self.gamma, otherwise=' or "auto"')
        check_range("balance", self.balance, 0.0, 0.5, closed=True)
        check_range("dropout", self.dropout, 0.0, 1.0)
        check_flag("use_rslora", self.use_rslora)
        check_flag("dora", self.dora)
        self._check_targets()

    def _check_targets(self) -> None:
        are_names = isinstance(self.targets, (str, tuple)) and all(isinstance(x, str) and x for x in self.targets)
        if not self.targets or not are_names:
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
        """The numbers of passes after which the sketch may end, ascending."""
        return (1, 2) if self.passes == "auto" else (self.passes,)

    @property
    def first_gamma(self) -> float:
        """The gamma to start from, which gamma="auto" may raise."""
        return DEFAULT_GAMMA if self.gamma == "auto" else float(self.gamma)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, as `lora_one.json` holds them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Return the settings that `to_dict` made this data from.

        Raises:
            ConfigError: an unknown name, or an invalid value.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(names))
        if unknown:
            raise ConfigError(f"unknown settings {', '.join(unknown)}; known are {', '.join(names)}")
        return cls(**{"balance": SYMMETRIC, **values})  # what does not tell its balance is older than the setting
