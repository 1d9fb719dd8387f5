"""`lora-one doctor` on machines where packages are missing or broken. Each is a real, separate environment."""

import importlib.metadata
import json
import os
import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest

import lora_one
from lora_one.doctor import examination as doctor
from lora_one.doctor.examination import Package, compared
from lora_one.doctor.probe import probe

ROOT = Path(lora_one.__file__).parents[1]
BASE = ("numpy", "safetensors", "typer", "rich", "pyyaml", "matplotlib")


def links(package: str, seen: set[str]) -> None:
    """Add to `seen` the name of a distribution and, recursively, of all that it requires."""
    name = re.sub(r"[-_.]+", "-", package).lower()
    if name in seen:
        return
    try:
        required = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return
    seen.add(name)
    for line in required:
        if "extra ==" not in line:
            links(re.match(r"[\w.-]+", line)[0], seen)


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> tuple[Path, Path]:
    """Return a Python and a folder on its path that has what the command needs, and no framework."""
    folder, site = tmp_path_factory.mktemp("bare"), tmp_path_factory.mktemp("site")
    venv.create(folder, with_pip=False)
    needed: set[str] = set()
    for package in BASE:
        links(package, needed)
    for package in needed:
        distribution = importlib.metadata.distribution(package)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(distribution.locate_file(top))
    (site / "lora_one").symlink_to(ROOT / "lora_one")
    return folder / "bin" / "python", site


def examine(python: Path, *paths: Path, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "TERM": "dumb"}
    command = [str(python), "-P", "-m", "lora_one", "doctor", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def install(folder: Path, package: str, version: str, code: str) -> None:
    """Make a package as pip would install it, with the given code in it."""
    module = folder / package
    module.mkdir(parents=True)
    (module / "__init__.py").write_text(code)
    info = folder / f"{package}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_without_any_framework_each_says_what_it_would_give_and_how_to_get_it(bare):
    code, text = examine(*bare)
    assert code == 0
    assert re.search(rf"lora-one {re.escape(lora_one.__version__)} on Python 3\.\d+", text)
    for title, extra, gives in (("PyTorch", "torch", "PEFT"), ("JAX", "jax", "Flax"), ("MLX", "mlx", "mlx-lm")):
        section = text.partition(f"{title}: not installed\n")[2].partition("\n\n")[0]
        assert f"pip install 'lora-one[{extra}]'" in section
        assert gives in section
    assert "NumPy: ready" in text and "Command: ready" in text
    assert text.rstrip().endswith("No framework to fine-tune with is ready.")


def test_what_raises_exits_or_dies_when_imported_is_reported_and_the_rest_goes_on(bare, tmp_path):
    install(tmp_path, "torch", "2.99.0", "raise OSError('libcudart.so.99: cannot open shared object file')")
    install(tmp_path, "transformers", "5.24.0", "import peft")  # fails because a package is missing
    install(tmp_path, "flax", "0.12.8", "print('hello from flax')")
    install(tmp_path, "jax", "0.1", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    install(tmp_path, "optax", "0.2.8", "")
    code, text = examine(bare[0], tmp_path, bare[1])
    assert code == 1
    torch, jax = (text.partition(f"{name}: broken\n")[2].partition("\n\n")[0] for name in ("PyTorch", "JAX"))
    assert "torch: OSError: libcudart.so.99: cannot open shared object file" in torch
    assert "2.99.0" in torch and "newer than 2.13.0, which is tested" in torch
    assert "No module named" not in torch
    assert "pip install --force-reinstall 'lora-one[torch]'" in torch
    assert "was ended by SIGILL" in jax and "older than" in jax
    assert "MLX: not installed" in text
    assert "hello" not in text


def test_a_part_that_lacks_a_package_is_incomplete_and_not_broken(bare, tmp_path):
    install(tmp_path, "transformers", "5.24.0", "import peft")
    install(tmp_path, "torch", "2.13.0", "import accelerate.utils")
    code, text = examine(bare[0], tmp_path, bare[1])
    assert code == 0
    section = text.partition("PyTorch: incomplete\n")[2].partition("\n\n")[0]
    assert re.search(r"transformers 5\.24\.0 +as tested\n  peft +not installed", section)
    assert "pip install 'lora-one[torch]'" in section
    assert "JAX: not installed\n" in text  # although transformers, which it would use, is installed


def test_json_says_the_same_to_programs(bare, tmp_path):
    install(tmp_path, "mlx", "0.32.4", "")
    (tmp_path / "mlx" / "core.py").write_text("gpu = 1\nis_available = lambda device: True\n")
    install(tmp_path, "mlx_lm", "0.32.2", "")
    install(tmp_path, "tqdm", "4.70.1", "")
    code, text = examine(bare[0], tmp_path, bare[1], arguments=("--json",))
    assert code == 0
    parts = {part["name"]: part for part in json.loads(text)["parts"]}
    assert (parts["mlx"]["state"], parts["mlx"]["devices"], parts["mlx"]["install"]) == ("ready", ["gpu", "cpu"], None)
    assert parts["torch"]["packages"][0] == {"name": "torch", "installed": None, "tested": "2.13.0"}
    assert parts["cli"]["state"] == parts["core"]["state"] == "ready"


@pytest.mark.parametrize("framework", ["torch", "jax", "mlx.core"])
def test_devices_of_the_frameworks_that_are_here(framework):
    answer = probe(["json", framework])
    assert answer.errors == {}
    assert answer.devices[-1].startswith("cpu")


def test_versions_that_are_called_tested_are_those_of_the_tests():
    """The wheel has no constraints.txt, so its own list must agree with that file and with the extras."""
    listed = json.loads(doctor.TESTED.read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name.lower(): version for name, _, version in (line.partition("==") for line in lines)}
    extras = project["optional-dependencies"]
    required = {"core": project["dependencies"], **{name: extras[name] for name in listed if name != "core"}}
    for name, packages in listed.items():
        assert set(packages) == {re.match(r"[\w-]+", line)[0] for line in required[name]}
        assert packages == {package: pinned[package] for package in packages}
    assert listed.keys() == doctor.PARTS.keys() == {"core", *extras} - {"all", "dev"}


@pytest.mark.parametrize(
    ("installed", "said"),
    [
        ("2.13.0", "as tested"),
        ("2.13.0+cu130", "as tested"),
        ("2.9.1", "older than 2.13.0, which is tested"),
        ("2.14.0.dev20260101", "newer than 2.13.0, which is tested"),
        (None, "not installed"),
    ],
)
def test_versions_are_compared_as_numbers(installed, said):
    assert compared(Package("torch", installed, "2.13.0")) == said
