"""Settings in a configuration file, where text that stands for a number becomes that number.

YAML 1.1 reads 2e-4 as text, since its numbers need a dot, but whoever writes it means a number.
"""

import tomllib
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError


def read_settings(path: Path) -> dict[Any, Any]:
    """Return the settings in a .toml, .yaml or .yml file.

    Raises:
        ConfigError: the file cannot be read, or holds no settings.
    """
    if path.suffix not in (".toml", ".yaml", ".yml"):
        raise ConfigError(f"a configuration file must end in .toml, .yaml or .yml, got {path.name}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    values = _parse_toml(text, path) if path.suffix == ".toml" else _parse_yaml(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings by name, got {type(values).__name__}")
    return values


def parsed(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values, with text replaced by a number where a field of `cls` takes numbers and not any text.

    Args:
        cls: a dataclass.
        values: setting -> value. What stands for no number is returned unchanged, so that `cls` can name it in an
            error.
    """
    hints = typing.get_type_hints(cls)
    return {name: _number(value, alternatives(hints[name])) for name, value in values.items()}


def alternatives(hint: Any) -> set[Any]:
    """Return the types, and the values of a Literal, that a type hint allows."""
    inner = typing.get_args(hint)
    if not inner or typing.get_origin(hint) in (tuple, list, dict, Sequence, Mapping):
        return {hint}
    return set().union(*map(alternatives, inner))


def _number(value: object, allowed: set[object]) -> object:
    if not {int, float} & allowed or str in allowed or not isinstance(value, (str, float)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if float in allowed:
        return number
    return int(number) if number.is_integer() else value  # infinity and NaN are not integers


def _parse_toml(text: str, path: Path) -> object:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not TOML that can be read: {error}") from error


def _parse_yaml(text: str, path: Path) -> object:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an impossible date, or brackets nested too deep
        raise ConfigError(f"{path} is not YAML that can be read: {error}") from error
