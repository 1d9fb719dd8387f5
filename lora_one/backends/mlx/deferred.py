"""LoRA-One's start, made by the optimizer of a training's first gradients, also inside of a compiled step.

mx.compile traces a step for the shapes of its inputs, and runs all operations of the trace at every call. With MLX 0.32
it traces anew whenever an array of the captured state has got another shape, and when the state has an array more or
less. So the steps that the start may still take are counted by the shape of an array, "clock", and each of them has a
trace of its own. After the last one the array is gone, and the trace has nothing of the start in it.

With t steps behind it, a step

    t < least           makes start_step,
    least <= t < most   makes start_step, or AdamW's if the start is done: it computes both, and chooses by a flag,
    t = most            makes AdamW's.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map, tree_unflatten

from lora_one.checks import shown_names
from lora_one.core.deferred import StartState, settled, start_state, start_step
from lora_one.core.factors import Factors
from lora_one.core.stacking import one_of, stack_of
from lora_one.errors import ModelError

from .attach import Site
from .dora import is_dora, magnitude_of
from .layout import as_arrays, as_factors
from .lora_adamw import LearningRate, LoraOneAdamW, child
from .ops import MlxOps
from .tree import flat

KEY = "lora_one"  # beside "step", "learning_rate" and the model's names in the optimizer's state
LORA = ("lora_a", "lora_b")
Arrays = dict[str, mx.array]  # by dotted name
_OPS = MlxOps()


class Group(NamedTuple):
    """LoRA layers of equal shapes. They go through the start together, since few operations are traced sooner."""

    paths: tuple[str, ...]
    layers: tuple[str, ...]  # names of their pairs: an expert is a layer of its own
    dora: bool = False  # whether they have magnitudes, which follow the factors until the start is made

    @property
    def factors(self) -> list[str]:
        """The names of the factors in the model."""
        return [f"{path}.{name}" for path in self.paths for name in LORA]

    @property
    def parameters(self) -> list[str]:
        """The names of the factors, and of the magnitudes."""
        return self.factors + [f"{path}.m" for path in self.paths if self.dora]


class Start(NamedTuple):
    """The start that an optimizer makes: of which pairs, and in how many steps. With most = 0 it makes none."""

    groups: tuple[Group, ...]
    gamma: float
    balance: float
    least: int
    most: int


def groups_of(sites: Sequence[Site]) -> tuple[Group, ...]:
    """Put LoRA layers of equal shapes together."""
    alike: dict[Any, list[Site]] = {}
    for site in sites:
        a, b = site.module.lora_a, site.module.lora_b
        alike.setdefault((a.shape, b.shape, a.dtype, b.dtype, is_dora(site.module)), []).append(site)
    return tuple(
        Group(
            tuple(site.path for site in group),
            tuple(layer.name for site in group for layer in site.layers),
            is_dora(group[0].module),
        )
        for group in alike.values()
    )


def fresh_progress(start: Start, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a start before its first step.

    clock: (steps that the start may still take,). Gone after the last one.
    done: (), whether the start is made. Only where data decide that, and only as long as there is a clock.
    steps: (), steps that the start was made of, so far or in all.
    s, agreement: those of `StartState` for each group, (layers, r) and (layers,), with experts (layers, experts, ...).
    """
    states = [
        start_state(_OPS, _stacked(group, {name: child(parameters, name) for name in group.factors}))
        for group in start.groups
    ]
    return {
        **({"clock": mx.zeros(start.most)} if start.most else {}),
        **({"done": mx.array(False)} if start.least < start.most else {}),
        "steps": mx.array(0, mx.uint64),
        "s": [state.s for state in states],
        "agreement": [state.agreement for state in states],
    }


def readings(groups: Sequence[Group], progress: Mapping[str, Any]) -> dict[str, tuple[list[float], float]]:
    """Return the singular values and the agreement of each layer."""
    of_layers = {}
    for group, s, agreement in zip(groups, progress["s"], progress["agreement"], strict=True):
        rows, cosines = np.array(s).reshape(len(group.layers), -1), np.array(agreement).reshape(-1)
        of_layers.update({name: (rows[i].tolist(), float(cosines[i])) for i, name in enumerate(group.layers)})
    return of_layers


def is_done(progress: Mapping[str, Any]) -> bool:
    """Return whether the start is made."""
    return "clock" not in progress or ("done" in progress and bool(progress["done"].item()))


class DeferredAdamW(LoraOneAdamW):
    """`LoraOneAdamW` that sets the LoRA pairs to LoRA-One's start in its first steps, and then trains them.

    Other parameters are trained from the first step. A step without any gradient of the pairs counts as a step of the
    start too, because shapes count the steps. The state has one entry more, `progress`, which is the same dict for as
    long as the optimizer lives.
    """

    def __init__(self, learning_rate: LearningRate, start: Start, parameters: Mapping[str, Any], **options: Any):
        super().__init__(learning_rate, **options)
        self.start = start
        self._fresh = fresh_progress(start, parameters)
        self.progress = dict(self._fresh)
        if start.most:
            self.state[KEY] = self.progress

    @property
    def state(self) -> dict[str, Any]:
        """The tree of arrays to save. Setting it checks that its start is that of these pairs."""
        state: dict[str, Any] = self._state
        return state

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        if self.start.most or KEY in state:
            self._check_fits(state.get(KEY))
            loaded = dict(state[KEY])
            self.progress.clear()
            self.progress.update(loaded)
            state = {**state, KEY: self.progress}
        self._initialized = False
        self._state = state

    def apply_gradients(self, gradients: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
        if KEY not in self.state:
            return super().apply_gradients(gradients, parameters)
        if not self._initialized:
            self.init(gradients)
        others = flat(gradients)
        names = [name for group in self.start.groups for name in group.parameters if name in others]
        of_pairs = {name: others.pop(name) for name in names}
        updated = flat(super().apply_gradients(_tree(others), parameters))
        return _tree({**updated, **self._next_pairs(of_pairs, parameters)})

    def _next_pairs(self, gradients: Arrays, parameters: dict[str, Any]) -> Arrays:
        """Return the factors after a step of the start or of AdamW, and put what the step tells into the state."""
        progress, least, most = self.progress, self.start.least, self.start.most
        if "clock" not in progress:
            return self._trained(gradients, parameters)
        taken = most - progress["clock"].size
        factors = (self._started if taken < least else self._started_or_trained)(gradients, parameters)
        if taken + 1 == most:
            del progress["clock"]
            progress.pop("done", None)
            return factors
        progress["clock"] = mx.zeros(most - taken - 1)
        if taken + 1 >= least:
            states = [StartState(*state) for state in zip(progress["s"], progress["agreement"], strict=True)]
            with mx.stream(mx.cpu):
                enough = settled(_OPS, progress["steps"].astype(mx.float32), states)
            progress["done"] = progress["done"] | enough
        return factors

    def _started(self, gradients: Arrays, parameters: dict[str, Any]) -> Arrays:
        """Return the factors after a step of the start."""
        progress, factors, states = self.progress, {}, []
        with mx.stream(mx.cpu):  # as in `init`: decompositions exist only there, and products are not TF32
            for group, *state in zip(self.start.groups, progress["s"], progress["agreement"], strict=True):
                old = {name: child(parameters, name) for name in group.factors}
                given = {name: gradients.get(name, mx.zeros_like(factor)) for name, factor in old.items()}
                pairs, given_pairs = _stacked(group, old), _stacked(group, given)
                new, state_after = start_step(
                    _OPS, pairs, given_pairs, StartState(*state), self.start.gamma, self.start.balance
                )
                states.append(state_after)
                for index, path in enumerate(group.paths):
                    arrays = as_arrays(one_of(new, index, len(group.paths)))
                    factors.update({f"{path}.{name}": array for name, array in zip(LORA, arrays, strict=True)})
                    if group.dora:
                        factors[f"{path}.m"] = _magnitude(parameters, path, as_factors(*arrays))
        progress["s"], progress["agreement"] = [state.s for state in states], [state.agreement for state in states]
        progress["steps"] = progress["steps"] + 1  # not +=, which changes the array itself
        return {name: factors[name] for name in gradients}

    def _trained(self, gradients: Arrays, parameters: dict[str, Any]) -> Arrays:
        """Return the factors after a step of AdamW, whose count of steps begins after the start."""
        if self.pairs:
            gradients = flat(self._preconditioned(_tree(gradients), parameters))
        steps = self.step - self.progress["steps"]
        dtypes = {_OPS.at_least_float32(child(parameters, name)).dtype for name in gradients}
        self._corrections = {dtype: self._bias_corrections(steps.astype(dtype)) for dtype in dtypes}
        return {
            name: self._apply_named(name, gradient, child(parameters, name), child(self.state, name))
            for name, gradient in gradients.items()
        }

    def _started_or_trained(self, gradients: Arrays, parameters: dict[str, Any]) -> Arrays:
        """Return the factors after a step of AdamW if the flag says that the start is made, else of the start."""
        done, old = self.progress["done"], dict(self.progress)
        moments = {name: dict(child(self.state, name)) for name in gradients}
        trained = self._trained(gradients, parameters)
        started = self._started(gradients, parameters)
        for name, arrays in moments.items():
            after = child(self.state, name)
            after.update({key: mx.where(done, after[key], array) for key, array in arrays.items()})
        for key in ("s", "agreement", "steps"):
            self.progress[key] = tree_map(lambda x, y: mx.where(done, x, y), old[key], self.progress[key])
        return {name: mx.where(done, trained[name], started[name]) for name in gradients}

    def _check_fits(self, progress: Mapping[str, Any] | None) -> None:
        """Raise ModelError for the state of a start that is not this optimizer's."""
        remedy = "make model and optimizer as for the training that saved it, and only then load factors and state"
        if progress is None:
            raise ModelError(f"the state has no start, but this optimizer is to make one: {remedy}")
        own, given = ({name: x.shape for name, x in flat(tree).items()} for tree in (self._fresh, progress))
        (own_left,), (left,) = own.pop("clock", (0,)), given.pop("clock", (0,))
        if not left:
            own.pop("done", None)
        if own != given or left > own_left:
            names = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise ModelError(
                f"the state is of another start: it has {left} steps to go, of {own_left} here, and other shapes in "
                f"{len(names)} arrays ({shown_names(names, 4)}): {remedy}"
            )


def _stacked(group: Group, arrays: Arrays) -> Factors:
    """Return the pairs of a group, from arrays by name, as (layers, ...)."""
    return stack_of(_OPS, [as_factors(*(arrays[f"{path}.{name}"] for name in LORA)) for path in group.paths])


def _magnitude(parameters: Mapping[str, Any], path: str, pair: Factors) -> mx.array:
    layer = child(parameters, path)
    if not is_dora(layer):
        raise ModelError(
            f"{path}: the start of DoRA needs the base weights too: call optimizer.update(model, gradients), or "
            "apply_gradients with the model in place of its trainable parameters"
        )
    return magnitude_of(layer, pair).astype(layer.m.dtype)


def _tree(arrays: Arrays) -> dict[str, Any]:
    tree: dict[str, Any] = tree_unflatten(list(arrays.items())) if arrays else {}
    return tree
