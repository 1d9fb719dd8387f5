"""What of lora-one works on this machine: frameworks, devices and versions, and what each missing piece would give."""

import json
import platform
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_one import __version__
from lora_one.environment import installed_version

from . import probe

TESTED = Path(__file__).with_name("tested.json")  # part -> package -> the version that the tests run with
PATIENCE = 180  # seconds: a first import from a slow disk takes a while

# part -> (its name, what it gives)
PARTS = {
    "core": ("NumPy", "the float64 reference, `lora-one convert`, reports"),
    "torch": ("PyTorch", "fine-tuning transformers and plain torch models, on CUDA, MPS or CPU; PEFT adapters"),
    "jax": ("JAX", "fine-tuning Flax models (NNX, Linen) and any pytree, on TPU, GPU or CPU"),
    "mlx": ("MLX", "fine-tuning mlx-lm models, float or quantised, on Apple silicon, CUDA or CPU"),
    "cli": ("Command", "the `lora-one` command, recipes in YAML, plots"),
    "recipes": ("Recipes", "data sets of the hub or in its layout, benchmarks after the training"),
}
# where a package's module has another name
_MODULES = {"mlx": "mlx.core", "mlx-lm": "mlx_lm", "lm-eval": "lm_eval", "pillow": "PIL", "pyyaml": "yaml"}


@dataclass(frozen=True)
class Package:
    """One package: the version that is installed, None if none is, and the one that the tests run with."""

    name: str
    installed: str | None
    tested: str


@dataclass(frozen=True)
class Part:
    """One part of lora-one.

    Attributes:
        name: the extra that installs it; "core" comes with lora-one itself.
        title, gives: for people.
        state: "ready", "missing" (a package is not installed) or "broken" (one is, but cannot be imported).
        packages: what it needs.
        devices: of the framework, the best first; empty unless it is ready.
        errors: module -> what its import raised.
        install: the command that brings what is missing, or replaces what is broken; None if it is ready.
    """

    name: str
    title: str
    gives: str
    state: str
    packages: list[Package]
    devices: list[str]
    errors: dict[str, str]
    install: str | None


@dataclass(frozen=True)
class Examination:
    """Everything: the machine, and the parts."""

    lora_one: str
    python: str
    platform: str
    parts: list[Part]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> Examination:
    """Look at everything. Nothing is imported into this process, and nothing that is wrong raises."""
    tested: dict[str, dict[str, str]] = json.loads(TESTED.read_text(encoding="utf-8"))
    with ThreadPoolExecutor() as pool:
        parts = list(pool.map(lambda item: _examine(*item), tested.items()))
    return Examination(__version__, platform.python_version(), f"{platform.system()} {platform.machine()}", parts)


def compared(package: Package) -> str:
    """How an installed version stands to the tested one: "as tested", "newer than ...", "older than ..."."""
    if package.installed is None:
        return "not installed"
    one, other = _numbers(package.installed), _numbers(package.tested)
    if one == other:
        return "as tested"
    return f"{'newer' if one > other else 'older'} than {package.tested}, which is tested"


def describe(found: Examination) -> str:
    """The examination for people, in lines of plain text."""
    lines = [f"lora-one {found.lora_one} on Python {found.python}, {found.platform}"]
    for part in found.parts:
        partly = part.state == "missing" and part.packages[0].installed is not None
        where = f", on {', '.join(part.devices)}" if part.devices else ""
        lines += ["", f"{part.title}: {'incomplete' if partly else _STATES[part.state]}{where}"]
        names = [f"{package.name} {package.installed or ''}".strip() for package in part.packages]
        width = max(map(len, names))
        lines += [f"  {name:{width}}  {compared(package)}" for name, package in zip(names, part.packages, strict=True)]
        lines += [f"  {module}: {error}" for module, error in part.errors.items()]
        if part.install:
            lines += [f"  It is for {part.gives}.", f"  {part.install}"]
    ready = [part.title for part in found.parts if part.devices and part.state == "ready"]
    verdict = f"Ready to fine-tune with {', '.join(ready)}." if ready else "No framework to fine-tune with is ready."
    return "\n".join([*lines, "", verdict])


_STATES = {"ready": "ready", "missing": "not installed", "broken": "broken"}


def _examine(name: str, tested: dict[str, str]) -> Part:
    title, gives = PARTS[name]
    packages = [Package(package, installed_version(package), version) for package, version in tested.items()]
    modules = {package.name: _MODULES.get(package.name, package.name) for package in packages}
    absent = [modules[package.name] for package in packages if package.installed is None]
    found = _probe(name, [module for module in modules.values() if module not in absent])
    # What fails for want of a package that is named as missing already is not broken.
    wants = tuple(f"ModuleNotFoundError: No module named '{module.partition('.')[0]}" for module in absent)
    errors = {module: error for module, error in found["errors"].items() if not error.startswith(wants)}
    if packages[0].installed is None:  # the framework itself: what it shares with others is theirs to complain of
        errors = {}
    state = "broken" if errors else "missing" if absent else "ready"
    extra = "lora-one" if name == "core" else f"'lora-one[{name}]'"
    install = {
        "ready": None,
        "missing": f"pip install {extra}",
        "broken": f"pip install --force-reinstall {extra}",
    }[state]
    return Part(name, title, gives, state, packages, found["devices"] if state == "ready" else [], errors, install)


def _probe(part: str, modules: list[str]) -> dict[str, Any]:
    """Ask another process, which may die of it. -P: a file of this folder must not pass for a framework."""
    if not modules:
        return {"errors": {}, "devices": []}
    command = [sys.executable, "-P", probe.__file__, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return _failed(part, f"importing {', '.join(modules)} took more than {PATIENCE} seconds")
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        return _failed(part, f"importing {', '.join(modules)} {_end(done.returncode)}: {last}")
    return answer


def _failed(part: str, error: str) -> dict[str, Any]:
    return {"errors": {part: error}, "devices": []}


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended Python with status {code}"


def _numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))
