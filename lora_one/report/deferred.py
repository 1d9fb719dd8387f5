"""The report of a start that the optimizer makes: what will happen, what has happened, and when."""

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from lora_one.checks import check_integer
from lora_one.config import Config
from lora_one.core.deferred import LEAST_STEPS, MOST_STEPS
from lora_one.errors import CheckpointError, ConfigError

from .typed import typed

StartSteps = int | Literal["auto"]


@dataclass
class LayerStart:
    """The deferred start of one layer.

    Attributes:
        name: path of the module in the base model.
        out_features: rows of the weight.
        in_features: columns of the weight.
        rank: r of the LoRA pair.
        start: "waiting" before the layer's first gradient; "spectral" once it has LoRA-One's start; "plain" if no
            gradient reached it until the end, so that it keeps plain LoRA's start.
        singular_values: of the sum of the gradients that were read, over the first of them, descending; none before.
        agreement: cosine of the last gradient with the sum of those before it, within the r directions. Near 1 the
            batches agree; near 0 they are mostly noise.

    >>> LayerStart("up", 24, 12, 2).start
    'waiting'
    """

    name: str
    out_features: int
    in_features: int
    rank: int
    start: str = "waiting"
    singular_values: list[float] = field(default_factory=list)
    agreement: float = 0.0


@dataclass
class DeferredReport:
    """What `lora_one.init` returns without batches: the start that the optimizer will make, or has made.

    It is filled in while training goes on, so print it when you like. Hand it to `lora_one.save` to keep it beside the
    adapter.

    Attributes:
        backend: name of the framework: "torch", "jax" or "mlx".
        config: the settings of the call.
        layers: one `LayerStart` per layer, in the model's order.
        start_steps: what `lora_one.optimizer` was asked for: a number of steps or "auto"; None before it was called.
        steps: training steps whose gradients made the start so far.
        done: whether the start is made, so that the optimizer trains the factors.

    >>> import lora_one, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> model, report = lora_one.init(model, config=lora_one.Config(rank=2, targets=["0"]))
    >>> adamw = lora_one.optimizer(model, start_steps=1)
    >>> model(torch.randn(8, 6)).square().mean().backward()
    >>> adamw.step()
    >>> report.done, report.steps, report.layers[0].start
    (True, 1, 'spectral')
    """

    backend: str
    config: Config
    layers: list[LayerStart]
    start_steps: StartSteps | None = None
    steps: int = 0
    done: bool = False
    # Fills the report in from the optimizer's state, where no code of ours runs at the end of a step.
    refresh: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def record(self, steps: int, done: bool, readings: Iterable[tuple[Iterable[float], float]]) -> None:
        """Fill in what the optimizer has done.

        Args:
            steps: training steps that were used.
            done: whether the start is made.
            readings: singular values and agreement of each layer, in the order of `layers`; zeros if it has none.
        """
        self.steps, self.done = steps, done
        for layer, (s, agreement) in zip(self.layers, readings, strict=True):
            values = [float(value) for value in s]
            if values[0] > 0:
                layer.start, layer.agreement = "spectral", float(agreement)
                layer.singular_values = [value / values[0] for value in values]
            else:
                layer.start = "plain" if done else "waiting"

    @property
    def gamma(self) -> float:
        """The gamma in use."""
        return self.config.first_gamma

    @property
    def plain_layers(self) -> list[str]:
        """The names of the layers that keep plain LoRA's start."""
        return [layer.name for layer in self.layers if layer.start == "plain"]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        self._refresh()
        values = dataclasses.asdict(dataclasses.replace(self, refresh=None))
        del values["refresh"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "DeferredReport":
        """Return the report that `to_dict` made this data from.

        Raises:
            CheckpointError: the data is not such a report.
        """
        try:
            layers = [typed(LayerStart, layer) for layer in values["layers"]]
            return typed(cls, {**values, "config": Config.from_dict(values["config"]), "layers": layers})
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"not a report of lora-one: {error}") from error

    def summary(self) -> str:
        """Return one or two sentences: what will happen and when, or what has happened."""
        self._refresh()
        head = f"LoRA-One ({self.backend}, deferred): {len(self.layers)} layers"
        if self.done:
            agreements = sorted(layer.agreement for layer in self.layers if layer.start == "spectral")
            middle = (
                f"; agreement of the last gradient: median {agreements[len(agreements) // 2]:.2f}" if agreements else ""
            )
            return f"{head}, started from the gradients of the first {_steps(self.steps)} of training{middle}"
        if self.start_steps is None:
            return (
                f"{head} have plain LoRA's start. lora_one.optimizer(model) makes LoRA-One's of the gradients of the "
                f"first {LEAST_STEPS} to {MOST_STEPS} training steps; no other optimizer does"
            )
        asked = f"{LEAST_STEPS} to {MOST_STEPS} steps" if self.start_steps == "auto" else _steps(self.start_steps)
        return f"{head}; their start is made from the gradients of the first {asked} of training, {self.steps} so far"

    def __str__(self) -> str:
        width = max([5, *(len(layer.name) for layer in self.layers)])
        lines = [self.summary(), "", f"{'layer':<{width}}  {'shape':>13}  {'r':>3}  {'s_r/s_1':>7}  agreement"]
        for layer in self.layers:
            row = f"{layer.name:<{width}}  {f'{layer.out_features} x {layer.in_features}':>13}  {layer.rank:>3}  "
            if layer.start == "spectral":
                lines.append(f"{row}{layer.singular_values[-1]:>7.3f}  {layer.agreement:>9.2f}")
            else:
                lines.append(row + ("no gradient yet" if layer.start == "waiting" else "no gradient: plain LoRA start"))
        return "\n".join(lines)

    def _refresh(self) -> None:
        if self.refresh is not None:
            self.refresh()


def check_start_steps(start_steps: object) -> None:
    """Raise ConfigError for a number of steps that is neither an integer >= 0 nor "auto"."""
    if start_steps != "auto":
        check_integer("start_steps", start_steps, least=0, otherwise=' or "auto"')


def check_needs_no_data(config: Config) -> None:
    """Raise ConfigError for settings that only a start from batches can follow."""
    default = Config()
    names = [
        "scale",
        "eta",
        "gradient",
        "passes",
        "oversample",
        "recompute",
        "rank_max",
        *(["gamma"] * (config.gamma == "auto")),
    ]
    needs = [name for name in names if getattr(config, name) != getattr(default, name)]
    if needs:
        asked = ", ".join(f"{name}={getattr(config, name)!r}" for name in needs)
        raise ConfigError(f"without batches there is no gradient at hand for {asked}: pass batches, or leave it out")


def _steps(number: int) -> str:
    return "1 step" if number == 1 else f"{number} steps"
