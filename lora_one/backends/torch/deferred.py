"""LoRA-One's start out of the first gradients of a training, for the LoRA pairs of a torch.optim.Optimizer.

What the start has read so far is in the optimizer's own state, so that it is saved and loaded with it: `start_s` of
each lora_A, `start_agreement` of each lora_B, and `start_taken` and `start_done` of the parameter groups.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lora_one.backends.waiting import DeferredStart, deferred_start, report_of
from lora_one.checks import shown_names
from lora_one.core.deferred import StartState, readable, settled, start_state, start_step
from lora_one.core.factors import Factors
from lora_one.core.stacking import stack_of, unstacked
from lora_one.errors import ModelError
from lora_one.report.deferred import StartSteps

from .attachment.adapters import opened
from .attachment.attach import Site, find_sites
from .attachment.dora import is_whole
from .attachment.kinds import as_kept
from .attachment.optimizable import check_no_experts
from .attachment.sharding import gathered, write
from .linalg.precision import full_precision
from .ops import TorchOps
from .pairs import STACK_BYTES, LoraPair, as_matrix, gradient_of, stacks

_OPS = TorchOps()
_ONE_BY_ONE = ("cpu",)  # types of devices that gain nothing by stacks of pairs
States = Mapping[Tensor, dict[str, Any]]


class PairStarts:
    """The start of an optimizer's LoRA pairs.

    The magnitudes of DoRA follow the pairs: each step of the start sets them to the norms of the new W + s B A. AdamW
    trains them, as it does the pairs, once the start is made.

    Attributes:
        pairs: one for each layer of the report, in its order.
        plan: how many steps it takes, and the report to fill in.
        magnitudes: DoRA's, of the layers that have it.
    """

    def __init__(self, sites: Sequence[Site], plan: DeferredStart):
        self.pairs = [site.parameters for site in sites]
        self.plan = plan
        self._dora = [site for site in sites if site.magnitude is not None]
        self.magnitudes = [site.magnitude for site in self._dora]
        self.checked = False  # whether the factors are known to be those that the state belongs to

    @torch.compiler.disable(reason="LoRA-One's start is not compiled: compile the optimizer's step once it is made")
    def step(self, states: States) -> bool:
        """Set the factors by their gradients. Return whether the step counts: some pair has a gradient.

        Args:
            states: the optimizer's, with an entry for each factor.
        """
        for a, b in self.pairs:
            if "start_s" not in states[a]:
                states[a]["start_s"], states[b]["start_agreement"] = start_state(
                    _OPS, Factors(as_matrix(a), as_matrix(b))
                )
        counts = False
        with full_precision(self.pairs[0].lora_A.device):  # once, instead of at each product
            for batch in _batches(self.pairs):
                gradient = stack_of(_OPS, [_whole(gradient_of(pair)) for pair in batch])  # (n, r, in), (n, out, r)
                if bool(readable(_OPS, gradient).any()):
                    self._check_factors(states)
                    _step_together(batch, gradient, states, self.plan.gamma, self.plan.balance)
                    counts = True
            if counts:
                for site in self._dora:
                    site.renew_magnitude()
        return counts

    @torch.compiler.disable
    def is_made(self, states: States, taken: int) -> bool:
        """Return whether so many steps are enough."""
        if not self.plan.least <= taken < self.plan.most:
            return taken >= self.plan.most
        s, agreement = zip(*(_state_of(states, pair) for pair in self.pairs), strict=True)
        first = torch.stack([x[:1].double().cpu() for x in s])  # (pairs, 1), all that `settled` looks at
        together = StartState(first, torch.stack([x.double().cpu() for x in agreement]))
        return bool(settled(_OPS, torch.tensor(float(taken), dtype=torch.float64), [together]))

    @torch.compiler.disable
    def record(self, states: States, taken: int, done: bool) -> None:
        """Fill in the report."""
        readings = (_state_of(states, pair) for pair in self.pairs)
        self.plan.report.record(taken, done, [(s.tolist(), float(agreement)) for s, agreement in readings])

    def _check_factors(self, states: States) -> None:
        """Check that the factors are those that the state belongs to: once, as only another program can change that."""
        if self.checked:
            return
        layers = self.plan.report.layers
        for site in self._dora:
            if not is_whole(site.module):  # any more, since the optimizer was made
                raise ModelError(
                    f"layer {site.layer.name!r}: a start with DoRA needs whole weights, got some that are spread over "
                    "processes: take the first steps before sharding"
                )
        for layer, (a, b) in zip(layers, self.pairs, strict=True):
            expected = (layer.rank, layer.in_features), (layer.out_features, layer.rank)
            if tuple(tuple(as_matrix(x).shape) for x in (a, b)) != expected:
                raise ModelError(
                    f"layer {layer.name!r}: a start needs whole factors of shapes {expected[0]} and {expected[1]}, got "
                    f"{tuple(a.shape)} and {tuple(b.shape)}: take the first steps before sharding"
                )
        started = [bool(states[a]["start_s"][0] > 0) for a, _ in self.pairs]
        nonzero = [bool(gathered(b).any()) for _, b in self.pairs]
        changed = [layer.name for layer, s, b in zip(layers, started, nonzero, strict=True) if b and not s]
        if changed:
            raise ModelError(
                f"lora_B must be zero until this optimizer's first step, got others in {shown_names(changed)}: another "
                "optimizer has made the start, or weights were loaded without this optimizer's state"
            )
        lost = [layer.name for layer, s, b in zip(layers, started, nonzero, strict=True) if s and not b]
        if lost:
            raise ModelError(
                f"the optimizer's state is in the middle of a start, but lora_B is zero in {shown_names(lost)}: load "
                "the model's weights that were saved with it"
            )
        self.checked = True


def plan_starts(model: nn.Module, start_steps: StartSteps | None) -> PairStarts | None:
    """Return the start that an optimizer of a model is to make; None if there is none to make.

    Raises:
        ConfigError, ModelError: see `deferred_start` and `find_sites`; and factors that are frozen.
    """
    model = _adapted_part(model)

    @cache
    def sites() -> list[Site]:
        with opened(model, "a start from the first steps") as adapted:
            sites = find_sites(adapted)
        check_no_experts(sites)
        frozen = [site.layer.name for site in sites if not all(factor.requires_grad for factor in site.parameters)]
        if frozen:
            raise ModelError(
                f"a start from the first steps needs both factors trainable, got frozen ones in {shown_names(frozen)}; "
                "unfreeze them, or pass start_steps=0"
            )
        return sites

    plan = deferred_start(
        model,
        start_steps,
        _OPS.name,
        lambda: [site.layer for site in sites()],
        lambda: [site.layer.name for site in sites() if bool(site.parameters.lora_B.any())],
    )
    if plan is None:
        return None
    names, expected = ([layer.name for layer in layers] for layers in ((s.layer for s in sites()), plan.report.layers))
    if names != expected:
        raise ModelError(
            f"the layers of the active adapter must be those that init has reported, {shown_names(expected)}; got "
            f"{shown_names(names)}: call init again, or activate that adapter"
        )
    return PairStarts(sites(), plan)


def _adapted_part(model: nn.Module) -> nn.Module:
    """Return the part of a model with the adapter; the model itself if it has a report, or no adapter at all."""
    if report_of(model) is not None:
        return model
    parts = [part for part in model.modules() if isinstance(part, peft.PeftModel) or "peft_config" in vars(part)]
    reports = [(part, report_of(part)) for part in parts]  # PEFT's model is two parts with one report
    waiting = list({id(report): part for part, report in reports if report is not None and not report.done}.values())
    if len(waiting) > 1:
        raise ModelError(f"one start is made at a time, got {len(waiting)} models in one: make an optimizer of each")
    return [*waiting, *parts, model][0]


def _whole(pair: LoraPair | Factors) -> Factors:
    """Return a pair, or its gradient, as matrices. What is spread over processes is gathered: a start reads it all."""
    return Factors(*(as_matrix(gathered(x)) for x in pair))


def _state_of(states: States, pair: LoraPair) -> StartState:
    return StartState(states[pair.lora_A]["start_s"], states[pair.lora_B]["start_agreement"])


def _batches(pairs: Sequence[LoraPair]) -> Iterator[list[LoraPair]]:
    """Yield the pairs that go through together: on a GPU those of equal shapes, in stacks."""
    kinds: dict[Any, list[LoraPair]] = defaultdict(list)
    for index, pair in enumerate(pairs):
        a, b = pair
        alone = a.device.type in _ONE_BY_ONE
        kinds[index if alone else (a.device, a.dtype, b.dtype, a.shape, b.shape)].append(pair)
    for kind in kinds.values():
        yield from stacks(kind, STACK_BYTES)


def _step_together(pairs: list[LoraPair], gradient: Factors, states: States, gamma: float, balance: float) -> None:
    """Take the start's step for pairs of equal shapes."""
    stack = stack_of(_OPS, [_whole(pair) for pair in pairs])  # (n, r, in), (n, out, r)
    before = stack_of(_OPS, [_state_of(states, pair) for pair in pairs])  # (n, r), (n,)
    factors, state = start_step(_OPS, stack, gradient, before, gamma, balance)
    for pair, new in zip(pairs, unstacked(factors, len(pairs)), strict=True):
        for parameter, values in zip(pair, new, strict=True):
            write(parameter, as_kept(values, parameter))
    for pair, (s, agreement) in zip(pairs, unstacked(state, len(pairs)), strict=True):
        states[pair.lora_A]["start_s"] = s.clone()  # not a part of the stack, which would be saved whole
        states[pair.lora_B]["start_agreement"] = agreement.clone()
