"""The wheel works from an empty folder."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    return next(out.glob("lora_one-*.whl"))


def test_wheel_carries_the_embedded_model_its_data_and_the_license(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("model/model.safetensors", "model/tokenizer.json", "data/train.jsonl", "data/harder/test.jsonl"):
        assert f"lora_one/demo/{name}" in names
    assert "lora_one/conformance/vectors.safetensors" in names
    assert "lora_one/doctor/tested.json" in names
    assert not any("conformance/making" in name for name in names)  # needs what no user has
    assert "lora_one/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests", "benchmarks", "adapters")) for name in names)
    assert wheel.stat().st_size < 4 * 2**20


def test_wheel_initialises_the_embedded_model_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(target)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
import lora_one, lora_one.demo
assert lora_one.__file__.startswith({str(target)!r})
from lora_one.finetune import initialize_only
from lora_one.finetune.recipe import make_recipe
class Quiet:
    say = warn = report = part = training = step = validation = score = lambda *a: None
outcome = initialize_only(make_recipe(dict(init_batches=1, batch_size=4, passes=2, out="adapter")), Quiet())
print(len(outcome.report.layers))
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=empty, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split()[-1] == "28"
    assert (empty / "adapter" / "adapter_model.safetensors").is_file()


def test_wheel_checks_conformance_from_an_empty_folder(wheel, tmp_path):
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    zipfile.ZipFile(wheel).extractall(target)
    code = f"""
import sys
sys.path.insert(0, {str(target)!r})
from lora_one import conformance
print(conformance.__file__.startswith({str(target)!r}), conformance.check_installed("numpy").verdict)
assert not {{"scipy", "mpmath", "torch", "jax", "mlx"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=empty, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "True All 60 checks agree with the spec: numpy on cpu."


def requirements() -> list[Requirement]:
    """All that pyproject.toml names, of every extra, but for the package itself."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = map(Requirement, lines)
    return [requirement for requirement in found if requirement.name != "lora-one"]


def pinned(file: str) -> dict[str, Version]:
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {canonicalize_name(name): Version(version) for name, version in lines}


def test_the_oldest_constraints_are_the_lower_bounds_that_the_package_admits():
    oldest = pinned("constraints-oldest.txt")
    for requirement in requirements():
        [bound] = requirement.specifier
        assert bound.operator == ">="
        assert oldest[canonicalize_name(requirement.name)] == Version(bound.version), requirement.name


def test_ranges_admit_what_is_pinned_and_what_accelerators_come_with():
    tested = pinned("constraints.txt")
    on_accelerators = {"torch": "2.11.0", "transformers": "5.17.0", "peft": "0.21.0", "jax": "0.11.2"}
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(tested[name])
        assert requirement.specifier.contains(on_accelerators.get(name, tested[name]))
