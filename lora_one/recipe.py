"""The settings of `lora-one finetune`, from the command line or from a YAML or TOML file."""

import dataclasses
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import Config
from .errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to fine-tune, on what, and how.

    Attributes:
        model: folder of a causal language model in Hugging Face's format; None is the embedded one.
        data, test: JSON Lines files; None is the embedded task. Without a test file there is no exact match.
        backend: "torch", ...
        dtype: of the base weights: "float32", "bfloat16" or "float16".
        device: where the framework should put the model, for instance "cuda"; None is its default.
        steps, batch_size, learning_rate, weight_decay: of the training; linear schedule after `warmup` steps.
        precondition, reg, damping: see `lora_one.optimizer`.
        init_batches: batches of the training data that the initialisation reads.
        plain: start LoRA as usual instead, for comparison.
        seed: of the order of the data and of the sketch.
        out: where the adapter goes.
        config: the initialisation.
    """

    model: str | None = None
    data: str | None = None
    test: str | None = None
    backend: str = "torch"
    dtype: str = "float32"
    device: str | None = None
    steps: int = 200
    batch_size: int = 32
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    warmup: int = 10
    precondition: bool = False
    reg: float = 1e-6
    damping: str = "absolute"
    init_batches: int = 8
    plain: bool = False
    seed: int = 0
    out: str = "runs/adapter"
    config: Config = field(default_factory=Config)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "init_batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1, got {value!r}")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate!r}")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype must be float32, bfloat16 or float16, got {self.dtype!r}")
        if (self.model is None) != (self.data is None):
            given, missing = ("model", "data") if self.data is None else ("data", "model")
            raise ConfigError(f"{given} is given without {missing}: give both, or neither for the embedded ones")


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings in a file, flat: names of `Recipe` and of `Config` beside each other.

    Args:
        path: .toml, .yaml or .yml.

    Raises:
        ConfigError: a file that cannot be read, or a setting that does not exist.
    """
    path = Path(path)
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        elif path.suffix in (".yaml", ".yml"):
            import yaml

            try:
                values = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise ConfigError(f"{path} is not YAML: {error}") from error
        else:
            raise ConfigError(f"a configuration file must end in .toml, .yaml or .yml, got {path.name}")
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}")
    known = _names(Recipe) | _names(Config) - {"config"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ConfigError(f"{path}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return values


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A `Recipe` from flat settings; `seed` goes to both the data and the sketch."""
    recipe = {name: value for name, value in values.items() if name in _names(Recipe)}
    config = {name: value for name, value in values.items() if name in _names(Config)}
    try:
        return Recipe(**recipe, config=Config(**config))
    except TypeError as error:
        raise ConfigError(f"a setting has the wrong type: {error}") from error


def _names(cls: type) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} - {"config"}
