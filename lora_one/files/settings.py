"""Read the settings in a configuration file, TOML or YAML.

Text that looks like a number becomes a number where a setting needs one: YAML 1.1 reads 2e-4 as text, since its numbers
need a dot.
"""

import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_one.errors import ConfigError


def read_settings(path: Path) -> dict[Any, Any]:
    """Read a .toml, .yaml or .yml file.

    Raises:
        ConfigError: the file cannot be read, or holds no settings.
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
    """Return the values with text turned into numbers, for fields of `cls` that accept a number and no text but "auto".

    A value that is not a number stays as it is, so that the checks of `cls` name it.
    """
    hints = typing.get_type_hints(cls)
    return {name: _number(value, _plain_types(hints[name])) for name, value in values.items()}


def _plain_types(hint: Any) -> set[Any]:
    """Return the members of a union, or the choices of a Literal; a container counts as one type."""
    members = typing.get_args(hint)
    if not members or typing.get_origin(hint) in (tuple, list, dict):
        return {hint}
    return set().union(*map(_plain_types, members))


def _number(value: Any, types: set[Any]) -> Any:
    if not {int, float} & types or str in types or not isinstance(value, (str, float)):
        return value
    try:
        number = float(value)
    except ValueError:
        return value
    if float in types:
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
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # an invalid date, or brackets nested too deeply
        raise ConfigError(f"{path} is not YAML that can be read: {error}") from error
