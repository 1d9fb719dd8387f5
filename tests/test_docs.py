"""The pages name what exists: files, modules, functions, commands and links."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_imports import FILES

ROOT = Path(__file__).parents[1]
FOLDERS = "lora_one|tests|benchmarks|docs|adapters"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "adapters").rglob("*.md")),
    *sorted((ROOT / "benchmarks").rglob("*.md")),
]
SOURCES = [file for folder in FOLDERS.split("|") for file in (ROOT / folder).rglob("*.py")]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
HOUSE_PAGES = [
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "docs/how-it-works.md",
    "docs/extending/backend.md",
]  # in plain English


def defined(path: str) -> bool:
    """Whether a dotted name is a module of ours, or a name that one defines or imports, or a member of its classes."""
    module, names = path, []
    while module not in FILES:
        module, _, name = module.rpartition(".")
        names.insert(0, name)
        if not module:
            return False
    body = ast.parse(FILES[module].read_text(encoding="utf-8")).body
    for name in names:
        nodes = [node for node in body if name in _names_of(node)]
        if not nodes:
            return False
        body = getattr(nodes[0], "body", [])
    return True


def _names_of(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    if isinstance(node, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize("page", TEXTS)
def test_names_on_a_page_exist(page):
    names = set(re.findall(r"\blora_one(?:\.[A-Za-z_]\w*)+", TEXTS[page])) - {"lora_one.json"}
    statement = re.compile(r"^ *from (lora_one(?:\.[\w.]+)?) import ([\w, ]+)$", flags=re.MULTILINE)
    for module, imported in statement.findall(TEXTS[page]):
        names |= {f"{module}.{name.strip()}" for name in imported.split(",")}
    assert not {name for name in names if not defined(name)}


@pytest.mark.parametrize("page", TEXTS)
def test_files_on_a_page_exist(page):
    paths = set(re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./-]*\w", TEXTS[page]))
    assert not {path for path in paths if not list(ROOT.glob(path)) and "NAME" not in path}
    bare = set(re.findall(r"`([a-z_/]+\.py)`", TEXTS[page]))
    assert not {path for path in bare if not any(str(file).endswith(f"/{path}") for file in SOURCES)}


def test_every_file_of_the_algorithm_is_on_the_page_that_explains_it():
    helpers = {"__init__.py", "arrays.py", "stacking.py"}
    for file in (ROOT / "lora_one" / "core").glob("*.py"):
        assert file.name in helpers or f"`lora_one/core/{file.name}`" in TEXTS["docs/how-it-works.md"], file.name


@pytest.mark.parametrize("page", TEXTS)
def test_links_on_a_page_lead_somewhere(page):
    links = {link.split("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]) if "://" not in link}
    assert not {link for link in links if link and not ((ROOT / page).parent / link).exists()}


@pytest.mark.parametrize("page", TEXTS)
def test_commands_on_a_page_exist(page):
    text = TEXTS[page]
    for module in re.findall(r"python -m ((?:benchmarks|lora_one)[\w.]*\w)", text):
        file = ROOT / module.replace(".", "/")
        assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([\w-]+)", text, flags=re.MULTILINE)) <= targets
    source = "".join(
        file.read_text(encoding="utf-8") for name, file in FILES.items() if name.startswith("lora_one.cli")
    )
    for command in re.findall(r"(?:`|^)lora-one ([a-z]+)", text, flags=re.MULTILINE):
        assert re.search(rf'command\((name=)?"{command}"|def {command}\b', source), command


@pytest.mark.parametrize("page", HOUSE_PAGES)
def test_sentences_are_short(page):
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    prose = re.sub(r"^(    .*|\|.*|#.*)$", "", prose, flags=re.MULTILINE)
    sentences = [s for s in re.split(r"(?<=[.!?])\s+|\n\s*\n|\n\s*(?:\*|-|\d+\.) ", prose) if len(s.split()) > 1]
    words = [len(sentence.split()) for sentence in sentences]
    assert sum(words) / len(words) <= 25
    for sentence in sentences:
        assert len(re.findall(r"(?<![\w.])\d+(?:\.\d+)*\b", re.sub(r"`[^`]*`|\([^)]*\)", "", sentence))) <= 3, sentence


def test_the_hooks_run_what_lint_runs():
    yaml = pytest.importorskip("yaml")
    [local] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local" and {hook["language"] for hook in local["hooks"]} == {"system"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    lint = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, flags=re.MULTILINE)[1].replace("$(BIN)", ".venv/bin")
    assert [hook["entry"] for hook in local["hooks"]] == [line.strip() for line in lint.splitlines()]
