"""The parts of lora-one that work on this machine, their devices and versions, and the use of each missing part."""

import json
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_one import __version__
from lora_one.environment import installed_version

from . import probe

TESTED = Path(__file__).with_name("tested.json")  # part -> package -> the version that the tests run with
PATIENCE = 180  # seconds; a first import from a slow disk is slow

# part -> (its name, its use)
PARTS = {
    "core": ("NumPy", "the float64 reference, `lora-one convert`, reports"),
    "torch": ("PyTorch", "fine-tuning transformers and plain torch models, on CUDA, MPS or CPU; PEFT adapters"),
    "jax": ("JAX", "fine-tuning Flax models (NNX, Linen) and any pytree, on TPU, GPU or CPU"),
    "mlx": ("MLX", "fine-tuning mlx-lm models, float or quantised, on Apple silicon, CUDA or CPU"),
    "cli": ("Command", "the `lora-one` command, recipes in YAML, plots"),
    "gguf": ("GGUF", "`lora-one convert --to gguf`: adapters for llama.cpp"),
    "recipes": ("Recipes", "data sets of the hub or in its layout, benchmarks after the training"),
}
# package -> module, where the names differ
MODULES = {"mlx": "mlx.core", "mlx-lm": "mlx_lm", "lm-eval": "lm_eval", "pillow": "PIL", "pyyaml": "yaml"}
STATES = {"ready": "ready", "missing": "not installed", "broken": "broken"}


@dataclass(frozen=True)
class Package:
    """A package that a part needs.

    Attributes:
        installed: the installed version; None if it is not installed.
        tested: the version that the tests run with.
    """

    name: str
    installed: str | None
    tested: str


@dataclass(frozen=True)
class Part:
    """A part of lora-one.

    Attributes:
        name: the extra that installs it; "core" comes with lora-one itself.
        title, gives: its name and its use, as printed.
        state: "ready", "missing" (a package is not installed) or "broken" (an installed one cannot be imported).
        packages: the packages that it needs.
        devices: of the framework, the best one first; empty unless the part is ready.
        errors: module -> the error that its import raised.
        install: the command that installs the missing packages, or replaces the broken ones; None if it is ready.
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
    """The result of `examine`: the machine, and all parts."""

    lora_one: str
    python: str
    platform: str
    parts: list[Part]

    def to_dict(self) -> dict[str, Any]:
        """Return the examination as plain data."""
        return asdict(self)


def examine(progress: Callable[[int, int], None] = lambda done, total: None) -> Examination:
    """Examine all parts. Nothing is imported into this process, and a broken part raises nothing.

    Args:
        progress: told after each part how many are done, and how many there are.
    """
    tested: dict[str, dict[str, str]] = json.loads(TESTED.read_text(encoding="utf-8"))
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(_examine, *item) for item in tested.items()]
        for done, _ in enumerate(as_completed(jobs), start=1):
            progress(done, len(jobs))
        parts = [job.result() for job in jobs]
    return Examination(__version__, platform.python_version(), f"{platform.system()} {platform.machine()}", parts)


def compared(package: Package) -> str:
    """Compare the installed version with the tested one: "as tested", "newer than ...", "older than ..."."""
    if package.installed is None:
        return "not installed"
    installed, tested = _numbers(package.installed), _numbers(package.tested)
    if installed == tested:
        return "as tested"
    return f"{'newer' if installed > tested else 'older'} than {package.tested}, which is tested"


def describe(examination: Examination) -> str:
    """Return the examination as lines of plain text."""
    lines = [f"lora-one {examination.lora_one} on Python {examination.python}, {examination.platform}"]
    for part in examination.parts:
        incomplete = part.state == "missing" and part.packages[0].installed is not None
        devices = f", on {', '.join(part.devices)}" if part.devices else ""
        lines += ["", f"{part.title}: {'incomplete' if incomplete else STATES[part.state]}{devices}"]
        names = [f"{package.name} {package.installed or ''}".strip() for package in part.packages]
        width = max(map(len, names))
        lines += [f"  {name:{width}}  {compared(package)}" for name, package in zip(names, part.packages, strict=True)]
        lines += [f"  {module}: {error}" for module, error in part.errors.items()]
        if part.install:
            lines += [f"  It is for {part.gives}.", f"  {part.install}"]
    ready = [part.title for part in examination.parts if part.devices and part.state == "ready"]
    verdict = f"Ready to fine-tune with {', '.join(ready)}." if ready else "No framework to fine-tune with is ready."
    return "\n".join([*lines, "", verdict])


def _examine(name: str, tested: dict[str, str]) -> Part:
    title, gives = PARTS[name]
    packages = [Package(package, installed_version(package), version) for package, version in tested.items()]
    modules = {package.name: MODULES.get(package.name, package.name) for package in packages}
    absent = [modules[package.name] for package in packages if package.installed is None]
    answer = _probe(name, [module for module in modules.values() if module not in absent])
    # An import that fails because of an absent package is not broken: the package is reported as missing already.
    missing = tuple(f"ModuleNotFoundError: No module named '{module.partition('.')[0]}" for module in absent)
    errors = {module: error for module, error in answer.errors.items() if not error.startswith(missing)}
    if packages[0].installed is None:  # without the framework, errors in packages it shares belong to the other parts
        errors = {}
    state = "broken" if errors else "missing" if absent else "ready"
    extra = "lora-one" if name == "core" else f"'lora-one[{name}]'"
    install = {
        "ready": None,
        "missing": f"pip install {extra}",
        "broken": f"pip install --force-reinstall {extra}",
    }[state]
    return Part(name, title, gives, state, packages, answer.devices if state == "ready" else [], errors, install)


def _probe(part: str, modules: list[str]) -> probe.Answer:
    """Import the modules in another process, which may crash.

    Python's -P keeps files of this folder from hiding the frameworks.
    """
    if not modules:
        return probe.Answer({}, [])
    command = [sys.executable, "-P", probe.__file__, *modules]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return probe.Answer({part: f"importing {', '.join(modules)} took more than {PATIENCE} seconds"}, [])
    try:
        return probe.Answer(**json.loads(done.stdout))
    except ValueError:
        last = (done.stderr.strip().splitlines() or ["no word of why"])[-1]
        return probe.Answer({part: f"importing {', '.join(modules)} {_end(done.returncode)}: {last}"}, [])


def _end(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended Python with status {code}"


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers of a version: 2.13.0+cpu -> (2, 13, 0)."""
    return tuple(int(part) for part in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))
