"""AdamW with LoRA-One's preconditioner and its start out of the first gradients, for many LoRA pairs at a time."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from lora_one.backends.waiting import warn_of_plain_layers
from lora_one.core.precondition import Damping
from lora_one.errors import ConfigError

from .deferred import PairStarts
from .directions import directions
from .linalg.precision import full_precision
from .pairs import LoraPair
from .places import Places
from .start_state import check_start_state, restore_start_state

# Settings of a parameter group that `torch.optim.adamw.adamw` takes under the same name.
_SETTINGS = ("lr", "weight_decay", "eps", "amsgrad", "maximize", "foreach", "capturable", "fused")


class LoraOneAdamW(torch.optim.AdamW):
    """A torch.optim.AdamW that first preconditions the gradients of LoRA pairs.

        gA <- (B^T B + reg I)^-1 gA        gB <- gB (A A^T + reg I)^-1

    Use it directly for parameter groups that `lora_one.optimizer` cannot make. All other parameters follow plain AdamW.
    Inverses are of the current A and B, in float32 or wider. `step` does not change any `.grad`, and never waits for
    the device. With `foreach=True` the whole step compiles as one graph (`torch.compile(optimizer.step,
    fullgraph=True)`).

    Args:
        params: the parameters or parameter groups, as for torch.optim.AdamW.
        pairs: the `LoraPair`s to precondition, each with lora_A (r, in) and lora_B (out, r); both must be in `params`.
        reg: what is added to the diagonal of the r x r matrices, 1e-6 by default.
        damping: "absolute" adds `reg` itself (the default), "relative" adds it times the mean eigenvalue.
        start: pairs whose factors the first steps set to LoRA-One's start, as `lora_one.optimizer` finds them. AdamW
            trains them afterwards, and all other parameters from the first step. None (default) makes no start.
        adamw: the other arguments of torch.optim.AdamW.

    Raises:
        ModelError: a factor that is not in `params`, or that two different pairs share.
        ConfigError: a step that a CUDA graph captures, without capturable=True or while the start is being made.

    Source:
        LoRA-One, arXiv 2502.01235, Algorithm 1.

    >>> import torch
    >>> from lora_one.backends.torch import LoraOneAdamW
    >>> from lora_one.backends.torch.pairs import LoraPair
    >>> pair = LoraPair(torch.nn.Parameter(torch.ones(2, 5)), torch.nn.Parameter(torch.zeros(3, 2)))
    >>> optimizer = LoraOneAdamW(pair, [pair], lr=1e-2)
    >>> (pair.lora_B @ pair.lora_A).sub(1.0).square().sum().backward()
    >>> optimizer.step()
    >>> bool((pair.lora_B > 0.0).all())
    True
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[LoraPair],
        reg: float = 1e-6,
        damping: Damping = "absolute",
        start: PairStarts | None = None,
        **adamw: Any,
    ):
        self._start = start
        super().__init__(params, **adamw)
        self._places = Places(pairs, self.param_groups)
        self.reg = reg
        self.damping: Damping = damping
        self._start_places = Places(() if start is None else start.pairs, self.param_groups)
        if start is not None:
            for group in (self.defaults, *self.param_groups):
                group.update(start_taken=0, start_done=False)

    def __getstate__(self) -> dict[str, Any]:
        ours = ("_places", "reg", "damping", "_start", "_start_places")
        return {**super().__getstate__(), **{name: vars(self)[name] for name in ours}}

    @property
    def pairs(self) -> list[LoraPair]:
        """The pairs whose gradients are preconditioned, as they are in the parameter groups now."""
        return self._places.pairs(self.param_groups)

    @property
    def starting(self) -> bool:
        """Whether the next steps still make the start."""
        return self._start is not None and not self.param_groups[0]["start_done"]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether torch.amp.GradScaler leaves it to `step` to divide the gradients by their scale."""
        return getattr(self, "_unscales", False) and not self.starting

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        self._unscales = value

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. One from the middle of a start continues it, with the factors that were saved with it.

        Raises:
            CheckpointError: the state is of another model, or of an optimizer that makes no start.
        """
        if self._start is None:
            super().load_state_dict(state_dict)
            return
        check_start_state(self, state_dict)
        super().load_state_dict(state_dict)
        restore_start_state(self, state_dict)
        self._start.checked = False
        group = self.param_groups[0]
        if group["start_taken"]:
            self._current_start().record(self.state, group["start_taken"], group["start_done"])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step. `closure` evaluates the loss first, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_capture()
        pairs, start = self.pairs, self._current_start() if self.starting else None  # raises before anything is changed
        group_of = self._places.group_of(pairs)
        waiting: set[int] = set()
        if start is not None:
            group_of |= self._start_places.group_of(start.pairs)
            waiting = {id(parameter) for parameter in (*start.magnitudes, *(pair.lora_A for pair in start.pairs))}
        taken = group_of.keys() | waiting
        for group in self.param_groups:
            others = [p for p in group["params"] if p.grad is not None and id(p) not in taken]
            self._adamw(group, others, [p.grad for p in others])
        if start is not None:
            pairs = [pair for pair in pairs if id(pair.lora_A) not in waiting]
            self._take_step_of(start, group_of)
        if pairs:
            self._preconditioned(pairs, group_of)
        return loss

    def _current_start(self) -> PairStarts:
        """Return the start, with its pairs as they are in the parameter groups now."""
        assert self._start is not None
        self._start.pairs = self._start_places.pairs(self.param_groups)
        return self._start

    def _preconditioned(self, pairs: Sequence[LoraPair], group_of: dict[int, int]) -> None:
        with full_precision(pairs[0].lora_A.device):  # once, instead of at each product
            for batch in directions(pairs, self.reg, self.damping):
                batch_of_group: dict[int, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
                for factor, direction in batch:
                    batch_of_group[group_of[id(factor)]].append((factor, direction))
                for index, group_batch in batch_of_group.items():
                    self._adamw(self.param_groups[index], *map(list, zip(*group_batch, strict=True)))

    def _take_step_of(self, start: PairStarts, group_of: dict[int, int]) -> None:
        for factor in (factor for pair in start.pairs for factor in pair):
            self._state_of(factor, self.param_groups[group_of[id(factor)]])  # the same entries as after the start
        taken = self.param_groups[0]["start_taken"]
        if not start.step(self.state):
            return
        done = start.is_made(self.state, taken + 1)
        for group in self.param_groups:
            group.update(start_taken=taken + 1, start_done=done)
        start.record(self.state, taken + 1, done)
        if done:
            warn_of_plain_layers(start.plan.report)

    def _check_capture(self) -> None:
        cuda = torch.cuda
        if torch.compiler.is_compiling() or not (cuda.is_available() and cuda.is_current_stream_capturing()):
            return
        if self.starting:
            raise ConfigError(
                "a CUDA graph cannot hold the steps that make LoRA-One's start: take these before the capture, until "
                "the report says done, or pass start_steps=0"
            )
        if not all(group["capturable"] for group in self.param_groups):
            raise ConfigError("a step in a CUDA graph needs capturable=True in each param group, got False")

    def _adamw(self, group: dict[str, Any], params: Sequence[Tensor], directions: Sequence[Tensor]) -> None:
        """Take torch.optim.AdamW's step for parameters of a group, with these directions instead of their gradients."""
        if not params:
            return
        states = [self._state_of(p, group) for p in params]
        adamw(
            list(params),
            list(directions),
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states] if group["amsgrad"] else [],
            [state["step"] for state in states],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            grad_scale=getattr(self, "grad_scale", None),  # set by torch.amp.GradScaler
            found_inf=getattr(self, "found_inf", None),
            has_complex=any(map(torch.is_complex, params)),
            **{name: group[name] for name in _SETTINGS},
        )

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the moments of a parameter, in torch.optim.AdamW's own form; zeros at the first step."""
        state = self.state[parameter]
        if not state:
            device = parameter.device if group["capturable"] or group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
