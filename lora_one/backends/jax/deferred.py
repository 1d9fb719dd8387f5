"""LoRA-One's start out of the first gradients of a training, as a part of an optax transformation.

The mathematics is `lora_one.core.deferred`. One compiled update holds both the start and Adam, and a condition on the
state chooses: nothing is compiled again when the start is made, and none of its decompositions runs afterwards.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from lora_one.core.deferred import StartState, readable, settled, start_state, start_step
from lora_one.core.factors import Factors
from lora_one.errors import ConfigError, ModelError

from .layout import Layout
from .ops import JaxOps
from .pairs import PairPlaces, Path, StackAxes, entry_of, find_pairs, pair_layouts
from .placement import resharded, whole

_OPS = JaxOps()

# Gets the path of each pair in a tree, and returns what is to be called after each step of the start with the number of
# steps, whether the start is made, and the pairs' states, which are (n, ...) for some pairs after the other.
Telling = Callable[[list[Path]], Callable[[Array, Array, tuple[StartState, ...]], None]]


class Start(NamedTuple):
    """The settings of a start.

    Attributes:
        gamma, balance: of `lora_one.core.deferred.start_step`.
        least: steps that the start takes at least.
        most: steps that it takes at most. In between, `lora_one.core.deferred.settled` ends it.
        folds: path of a pair -> the number that its lora_b is over the spec's B, if that is not 1.
        telling: tells the host what is done; None for nobody.
        mesh: that of the factors, if it is known.
    """

    gamma: float
    balance: float
    least: int
    most: int
    folds: Mapping[Path, float] = MappingProxyType({})
    telling: Telling | None = None
    mesh: Any = None


class DeferredState(NamedTuple):
    """The state of an optimizer that makes the start."""

    steps: Array  # (), int32: steps whose gradients made the start so far
    done: Array  # (), bool: Adam trains the pairs
    starts: tuple[StartState, ...]  # of all pairs of one kind, (n, ...)
    pairs: Any  # Adam's state of the pairs, which begins after the start
    others: Any  # Adam's state of all other parameters
    after: Any  # of what follows Adam, for all parameters


def with_start(
    pairs_adam: optax.GradientTransformation,
    others_adam: optax.GradientTransformation,
    after: optax.GradientTransformation,
    start: Start,
    stack_axes: StackAxes,
) -> optax.GradientTransformationExtraArgs:
    """Return a transformation that makes the pairs' start first, and is `after` of Adam's directions then.

    Args:
        pairs_adam: gets the gradients of the pairs, after the start.
        others_adam: gets all other gradients, from the first step.
        after: gets the directions of both: decay and learning rate.
        start: the settings.
        stack_axes: of `pair_layouts`.
    """
    of_pairs = optax.masked(pairs_adam, _is_factor)
    of_others = optax.masked(others_adam, _is_no_factor)

    def init(params: Any) -> DeferredState:
        kinds = _kinds(params, stack_axes, start.folds)
        # Without params, as in optax.tree_map_params, a leaf stands for all of them.
        starts: Any = tuple(kind.start_state() for kind in kinds) if kinds else 0.0
        return DeferredState(
            jnp.zeros((), jnp.int32),
            jnp.zeros((), bool),
            starts,
            of_pairs.init(params),
            of_others.init(params),
            after.init(params),
        )

    @jax.jit  # outside of a compiled step the condition would be compiled at each call
    def step(updates: Any, state: DeferredState, params: Any) -> tuple[Any, DeferredState]:
        kinds = _kinds(params, stack_axes, start.folds)
        _check_fits(state, kinds)
        places = [place for kind in kinds for pair in kind.pairs for place in pair.places]

        def trained(state: DeferredState) -> tuple[list[Array], DeferredState]:
            new, moments = of_pairs.update(updates, state.pairs, params)
            leaves = jax.tree.leaves(new)
            return [leaves[place] for place in places], state._replace(pairs=moments)

        def started(state: DeferredState) -> tuple[list[Array], DeferredState]:
            return _start_step(start, kinds, jax.tree.leaves(params), jax.tree.leaves(updates), state)

        chosen, new = lax.cond(state.done, trained, started, state)
        directions, others = of_others.update(updates, state.others, params)
        scaled, rest = after.update(_exchanged(directions, places, chosen), state.after, params)
        leaves = jax.tree.leaves(scaled)
        changes = [jnp.where(state.done, leaves[place], x) for place, x in zip(places, chosen, strict=True)]
        return _exchanged(scaled, places, changes), new._replace(others=others, after=rest)

    def update(updates: Any, state: DeferredState, params: Any = None, **extra: Any) -> tuple[Any, DeferredState]:
        if params is None:
            raise ConfigError("the start needs the factors: call update(updates, state, params)")
        changes: tuple[Any, DeferredState] = step(updates, state, params)
        return changes

    return optax.GradientTransformationExtraArgs(init, update)


def _start_step(
    start: Start, kinds: list["_Kind"], params: list[Array], updates: list[Array], state: DeferredState
) -> tuple[list[Array], DeferredState]:
    """Return the change of each factor, two for each pair of each kind, and the state after a step of the start."""
    changes, starts, read = [], [], jnp.zeros((), bool)
    for kind, before in zip(kinds, state.starts, strict=True):
        pairs = kind.stacked(params, 1.0 / kind.fold, start.mesh)
        gradients = kind.stacked(updates, kind.fold, start.mesh)
        # One after the other: batches of decompositions may wait for each other for ever on a CPU (jax 0.10.2).
        new, after = lax.map(partial(_start_of_one, start), (pairs, gradients, before))
        starts.append(after)
        read = read | jnp.any(readable(_OPS, gradients))
        for place, leaf in kind.leaves(new):
            old = _OPS.at_least_float32(params[place])
            # Each is whole first, or else the sharding of one pair would become that of others of its kind.
            changes.append(resharded(whole(leaf, start.mesh), old).astype(old.dtype) - old)
    steps = state.steps + read
    done = steps >= start.most
    if start.least < start.most:
        done = done | ((steps >= start.least) & settled(_OPS, steps, starts))
    if start.telling is not None:
        tell = start.telling([pair.path for kind in kinds for pair in kind.pairs])
        # Each device of several processes tells its own process, and for that must have all of it.
        told = jax.tree.map(lambda x: whole(x, start.mesh), tuple(starts))
        jax.debug.callback(tell, steps, done, told, partitioned=jax.process_count() > 1)
    return changes, state._replace(steps=steps, done=done, starts=tuple(starts))


def _start_of_one(start: Start, inputs: tuple[Factors, Factors, StartState]) -> tuple[Factors, StartState]:
    pair, gradient, state = inputs
    return start_step(_OPS, pair, gradient, state, start.gamma, start.balance)


class _Pair(NamedTuple):
    path: Path
    places: PairPlaces
    layout: Layout


class _Kind(NamedTuple):
    """Pairs of equal shapes, which go through one compiled loop."""

    pairs: list[_Pair]
    rank: int
    dtype: Any
    fold: float

    def start_state(self) -> StartState:
        n = sum(pair.layout.count for pair in self.pairs)
        no_columns = jnp.zeros((n, self.rank, 0), self.dtype)  # the state knows the rank only
        return start_state(_OPS, Factors(no_columns, no_columns))

    def stacked(self, leaves: list[Array], times_b: float, mesh: Any) -> Factors:
        """Return all pairs, (n, r, in) and (n, out, r), whole on each device, the second times a number."""
        a: list[Array] = []
        b: list[Array] = []
        for _, places, layout in self.pairs:
            for stacks, leaf in zip((a, b), layout.matrices(*(whole(leaves[p], mesh) for p in places)), strict=True):
                stacks.append(leaf)
        lora_A, lora_B = (jnp.matrix_transpose(jnp.concatenate(x)) for x in (a, b))
        return Factors(lora_A, lora_B if times_b == 1.0 else lora_B * times_b)

    def leaves(self, stack: Factors) -> list[tuple[int, Array]]:
        """Return the places and leaves of all pairs, a and b in turn, from (n, r, in) and (n, out, r)."""
        a, b = map(jnp.matrix_transpose, stack)  # (n, in, r), (n, r, out)
        b = b if self.fold == 1.0 else b * self.fold
        leaves: list[tuple[int, Array]] = []
        begin = 0
        for _, places, layout in self.pairs:
            end = begin + layout.count
            leaves += zip(places, layout.from_matrices(a[begin:end], b[begin:end]), strict=True)
            begin = end
        return leaves


def _kinds(params: Any, stack_axes: StackAxes, folds: Mapping[Path, float]) -> list[_Kind]:
    leaves = jax.tree.leaves(params)
    kinds: dict[Any, _Kind] = {}
    for path, (places, layout) in zip(find_pairs(params), pair_layouts(params, stack_axes), strict=True):
        a, b, fold = leaves[places.a], leaves[places.b], entry_of(path, folds) or 1.0
        shape = layout.in_features, layout.out_features, layout.rank(a), a.dtype, b.dtype, fold
        kinds.setdefault(shape, _Kind([], layout.rank(a), a.dtype, fold)).pairs.append(_Pair(path, places, layout))
    return list(kinds.values())


def _check_fits(state: Any, kinds: list[_Kind]) -> None:
    """Raise ModelError for params without pairs, and for the state of others."""
    if not kinds:
        raise ModelError("a start needs the factors of LoRA, got none in params")
    if not isinstance(state, DeferredState):
        raise ModelError(f"the state must be of an optimizer that makes the start, got a {type(state).__name__}")
    expected = [kind.start_state().s.shape for kind in kinds]
    got = [pairs.s.shape for pairs in state.starts]
    if got != expected:
        raise ModelError(f"the state is of another model: it has pairs of number and rank {got}, params {expected}")


def _is_factor(tree: Any, wanted: bool = True) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    factors = {place for places in find_pairs(tree).values() for place in places}
    return jax.tree.unflatten(structure, [(place in factors) == wanted for place in range(len(leaves))])


_is_no_factor = partial(_is_factor, wanted=False)


def _exchanged(tree: Any, places: list[int], new: list[Array]) -> Any:
    """Return a tree with other leaves at some places."""
    leaves, structure = jax.tree.flatten(tree)
    for place, leaf in zip(places, new, strict=True):
        leaves[place] = leaf
    return jax.tree.unflatten(structure, leaves)
