"""Who may import whom, and what `import lora_one` may need. All of it is read from the source."""

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_one

ROOT = Path(lora_one.__file__).parent
FILES = {
    ".".join(("lora_one", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(ROOT.rglob("*.py"))
}
FRAMEWORKS = {
    "numpy": set(),
    "torch": {"torch", "peft", "transformers", "accelerate", "bitsandbytes"},
    "jax": {"jax", "jaxlib", "flax", "optax", "orbax", "qwix", "equinox"},
    "mlx": {"mlx", "mlx_lm"},
}
BASE = {"numpy", "safetensors"}  # the hard dependencies
# A tool that needs framework code has one folder with one module per framework.
PER_FRAMEWORK = re.compile(
    r"lora_one\.(backends|conformance\.targets|estimate\.rates|finetune\.tuners)\.(numpy|torch|jax|mlx)(\..*)?"
)
# The library that an integration is named after, with those that it needs itself.
INTEGRATIONS = {"lora_one.integrations.transformers": FRAMEWORKS["torch"]}
# part of the package -> the other parts that it may import. The command may import everything.
MAY_IMPORT = {
    "errors": set(),
    "environment": set(),
    "demo": set(),
    "core": set(),
    "checks": {"errors"},
    "files": {"errors"},
    "config": {"checks", "core", "errors"},  # core has the default of the balance
    "plots": {"errors", "files"},
    "progress": {"errors"},
    "report": {"checks", "config", "core", "errors", "plots"},
    "checkpoint": {"checks", "core", "environment", "errors", "files", "plots", "report"},
    "backends": {"checkpoint", "checks", "config", "core", "environment", "errors", "report"},
    "ranks": {"backends", "config", "core"},
    "passes": {"backends", "config", "core", "errors", "ranks", "report"},
    "initialization": {"backends", "config", "core", "errors", "passes", "ranks", "report"},
    "api": {"backends", "checkpoint", "config", "errors", "initialization", "progress", "report"},
    "lora_one": {"api", "checkpoint", "config", "errors", "report"},
    "integrations": {"api", "backends", "checks", "config", "errors", "report"},
    "finetune": {
        "api",
        "backends",
        "checks",
        "config",
        "core",
        "demo",
        "environment",
        "errors",
        "files",
        "initialization",
        "progress",
        "report",
    },
    "page": {"checkpoint", "checks", "errors", "files", "finetune", "report"},
    "estimate": {"backends", "config", "core", "errors"},
    "conformance": {"backends", "core", "environment", "errors"},
    "doctor": {"environment", "lora_one"},
}


def imports(module: str) -> set[tuple[str, bool]]:
    """(module of ours, or top package of others'; whether at the top of the file) of every import in a file."""
    file = FILES[module]
    tree = ast.parse(file.read_text(encoding="utf-8"))
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in FILES else base for a in node.names]
        else:
            continue
        found |= {(name if name in FILES else name.split(".")[0], node in tree.body) for name in names}
    return found


def own_imports(module: str) -> set[str]:
    return {name for name, _ in imports(module) if name in FILES and name != module}


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def standard(name: str) -> bool:
    return name in sys.stdlib_module_names or name == "__future__"


def test_no_module_imports_itself_by_way_of_others():
    """Imports inside functions and under TYPE_CHECKING count too."""
    graphlib.TopologicalSorter({module: own_imports(module) for module in FILES}).prepare()


@pytest.mark.parametrize("name", sorted({part(module) for module in FILES} - {"cli", "__main__"}))
def test_a_part_imports_what_it_may(name):
    for module in FILES:
        if part(module) == name:
            others = {part(other) for other in own_imports(module)} - {name}
            assert others <= MAY_IMPORT[name], module


def test_few_modules_lie_flat():
    assert len(list(ROOT.glob("*.py"))) <= 12


def test_files_and_functions_are_short():
    for module, file in FILES.items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 300, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = node.end_lineno - body[0].lineno + 1 if body else 0
                assert lines <= 60, f"{module}.{node.name}"


def test_core_imports_numpy_at_most():
    for module in FILES:
        if part(module) == "core":
            assert all(standard(name) or name == "numpy" or name in FILES for name, _ in imports(module)), module


def test_a_framework_is_imported_in_its_own_modules_only():
    for module in FILES:
        match = PER_FRAMEWORK.fullmatch(module)
        own = FRAMEWORKS[match[2]] if match else INTEGRATIONS.get(module, set())
        if module.startswith("lora_one.finetune.tuners."):  # whose tokenizers all of them use
            own = own | {"transformers"}
        others = set().union(*FRAMEWORKS.values()) - own
        assert not others & {name for name, _ in imports(module)}, module


@pytest.mark.parametrize("backend", FRAMEWORKS)
def test_no_backend_imports_another(backend):
    shared = {"lora_one.backends." + name for name in ("interface", "checks", "processes", "targets", "waiting")}
    for module in FILES:
        if module.startswith(f"lora_one.backends.{backend}"):
            for name in own_imports(module):
                assert (
                    part(name) != "backends" or name in shared or f"{name}.".startswith(f"lora_one.backends.{backend}.")
                ), (module, name)


def test_files_that_everybody_imports_need_the_hard_dependencies_only():
    for module in FILES:
        if part(module) == "cli" or module.startswith("lora_one.conformance.making"):
            continue
        if PER_FRAMEWORK.fullmatch(module) or module in INTEGRATIONS:
            continue
        for name, top in imports(module):
            assert not top or standard(name) or name in BASE or name in FILES, f"{module}: {name}"


def test_the_face_of_a_package_defines_nothing():
    """Backends name their one set of operations there; the package itself its version."""
    for module, file in FILES.items():
        if file.name == "__init__.py":
            text = file.read_text(encoding="utf-8")
            kinds = {type(node) for node in ast.parse(text).body}
            assert kinds <= {ast.Expr, ast.Import, ast.ImportFrom, ast.Assign} and len(text.splitlines()) <= 40, module


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
    assert set(lora_one.__all__) == {"Config", "DeferredReport", "Report", "errors", *functions}


def test_adapters_is_not_a_package():
    """`adapters` is the name of somebody else's package."""
    folder = ROOT.parent / "adapters"
    if folder.is_dir():
        assert not list(folder.rglob("__init__.py"))
