"""Settings as a configuration file gives them: text that stands for a number is that number.

YAML 1.1 takes 2e-4 for text, since its numbers need a dot; whoever writes it means the number.
"""

import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError


def read_settings(path: Path) -> dict[Any, Any]:
    """What a .toml, .yaml or .yml file holds.

    Raises:
        ConfigError: it cannot be read, or holds no settings.
    """
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"a configuration file must end in .toml, .yaml or .yml, got {path.name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    values = _toml(text, path) if path.suffix == ".toml" else _yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}")
    return values


def parsed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with numbers where a field of `cls` takes a number, and no text but "auto".

    What is not a number stays as it came, for the checks of `cls` to name.
    """
    hints = typing.get_type_hints(cls)
    return {name: _number(value, _kinds(hints[name])) for name, value in values.items()}


def _kinds(hint: Any) -> set[Any]:
    inner = typing.get_args(hint)
    return {hint} if not inner or typing.get_origin(hint) in (tuple, list, dict) else set().union(*map(_kinds, inner))


def _number(value: Any, kinds: set[Any]) -> Any:
    if not {int, float} & kinds or str in kinds or not isinstance(value, (str, float)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if float in kinds:
        return number
    return int(number) if number.is_integer() else value  # neither inf nor nan is whole


def _toml(text: str, path: Path) -> Any:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML that can be read: {error}") from error


def _yaml(text: str, path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date that is none, or brackets without end
        raise ConfigError(f"{path} is not YAML that can be read: {error}") from error
