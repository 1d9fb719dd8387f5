"""Who may import whom, and what `import lora_one` may need."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_one

ROOT = Path(lora_one.__file__).parent
FRAMEWORKS = {
    "torch": {"torch", "peft", "transformers", "accelerate", "bitsandbytes"},
    "jax": {"jax", "jaxlib", "flax", "optax", "orbax", "qwix", "equinox"},
    "mlx": {"mlx", "mlx_lm"},
}
BASE = {"numpy", "safetensors"}  # the hard dependencies
COMMAND = {"cli"}  # may use what the command needs


def imports(file: Path) -> set[tuple[str, bool]]:
    """(top package, or lora_one.<part> for our own; whether at the top of the file) of every import in a file."""
    found = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = ["lora_one", *file.relative_to(ROOT).parent.parts]
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            names = [prefix] if node.module else [f"{prefix}.{alias.name}" for alias in node.names]
        for name in names:
            own = name.split(".")[:3] if name.startswith("lora_one.backends") else name.split(".")[:2]
            top = ".".join(own) if name.startswith("lora_one") else name.split(".")[0]
            found.add((top, node in tree.body))
    return found


def files(*parts: str) -> list[Path]:
    return sorted(ROOT.joinpath(*parts).rglob("*.py"))


def standard(name: str) -> bool:
    return name in sys.stdlib_module_names or name == "__future__"


@pytest.mark.parametrize("file", files("core"), ids=lambda f: f.name)
def test_core_imports_numpy_at_most(file):
    for name, _ in imports(file):
        assert standard(name) or name == "numpy" or name.startswith("lora_one.core"), name


@pytest.mark.parametrize("backend", ["numpy", *FRAMEWORKS])
def test_a_backend_imports_its_own_framework_and_no_other_backend(backend):
    others = set().union(*FRAMEWORKS.values()) - FRAMEWORKS.get(backend, set())
    shared = {"lora_one.backends.interface", "lora_one.backends.checks", "lora_one.backends.targets"}
    # Every framework's checkpoints are read with Hugging Face's tokenizers and configurations.
    allowed = {"transformers"} if backend in ("jax", "mlx") else set()
    for file in files("backends", backend):
        for name, _ in imports(file):
            assert name not in others - allowed, f"{file}: {name}"
            if name.startswith("lora_one.backends."):
                assert name in shared | {f"lora_one.backends.{backend}"}, f"{file}: {name}"


def test_nothing_outside_the_backends_imports_a_framework():
    frameworks = set().union(*FRAMEWORKS.values())
    for file in files():
        part = file.relative_to(ROOT).parts
        if part[0] in ("backends", "conformance", "estimate", "finetune") and len(part) > 2:
            continue
        for name, top in imports(file):
            assert name not in frameworks or (part[0] in COMMAND and not top), f"{file}: {name}"


def test_files_that_everybody_imports_need_the_hard_dependencies_only():
    for file in files():
        part = file.relative_to(ROOT).parts
        if part[0] in {"backends", "conformance", "estimate", "finetune"} | COMMAND:
            continue
        for name, top in imports(file):
            assert not top or standard(name) or name in BASE or name.startswith("lora_one"), f"{file}: {name}"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


ONLY_BASE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top not in sys.stdlib_module_names and top not in ("numpy", "safetensors", "lora_one"):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)
sys.meta_path.insert(0, Absent())
"""


def test_import_with_only_numpy_and_safetensors_there():
    code = (
        ONLY_BASE
        + """
import lora_one
from lora_one.backends import load_backend
assert load_backend("numpy").ops.name == "numpy"
try:
    load_backend("torch")
except lora_one.errors.BackendError as error:
    print(error)
"""
    )
    assert re.search(r"backend 'torch' needs the package '\w+': pip install 'lora-one\[torch\]'", run(code))


def test_import_loads_no_framework_though_all_are_there():
    names = sorted({"datasets", "lm_eval", "PIL"}.union(*FRAMEWORKS.values()))
    code = f"import sys, lora_one, lora_one.finetune; print([n for n in {names} if n in sys.modules])"
    assert run(code).strip() == "[]"


def test_the_command_says_what_it_needs():
    code = ONLY_BASE + "import lora_one.cli"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    assert "pip install 'lora-one[cli]'" in result.stderr


def test_public_names_are_those_of_the_design():
    functions = {"convert", "init", "load", "merge", "optimizer", "save"}
    assert set(lora_one.__all__) == {"Config", "Report", "errors", *functions}


def test_adapters_is_not_a_package():
    """`adapters` is the name of somebody else's package."""
    folder = ROOT.parent / "adapters"
    if folder.is_dir():
        assert not list(folder.rglob("__init__.py"))
