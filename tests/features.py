"""The table of docs/features.md: what works on which framework, by the tests that show it.

A test carries `@pytest.mark.feature(name)`. Its folder says the framework; elsewhere than in tests/backends the mark
has it as a second argument. `refused=True` marks a test of an error that says why the feature is not there. A cell is
what passed: `make features` writes the page, and a run of the whole suite fails where page and tests differ.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "features.md"
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "mlx": "MLX"}
# The rows, in their order: what each one means.
FEATURES = {
    "Start in one pass": "one backward pass over the batches, no gradient of a weight in memory",
    "Exact gradient": '`gradient="exact"`: the singular vectors of the full gradient',
    "Start without data": "`init(model)`; the optimizer's first steps make the start",
    "Quantised base": "4-bit or 8-bit weights stay as they are",
    "Float16 and bfloat16": "narrow weights, factors in float32",
    "Linear layers": "all of them, or those that `targets` names",
    "Embeddings": "LoRA on an embedding",
    "Convolutions": "LoRA on a convolution",
    "Experts": "a mixture of experts: a pair for every expert",
    "Experts as one parameter": "the same where one array holds the weights of all experts",
    "Layers stacked on any axis": "scanned and vmapped layers",
    "DoRA": "`dora=True`: the magnitude is trained beside the direction",
    "Adaptive rank": "`rank_max=`: the gradients share out the ranks",
    "New heads (modules_to_save)": "modules that are trained whole and kept with the adapter",
    "LoRA dropout": "`dropout=`",
    "Preconditioned steps": "`optimizer(precondition=True)`",
    "LoRA+": "`loraplus_lr_ratio=`: a higher rate for lora_B",
    "Parameter groups": "a learning rate for each group",
    "Gradient accumulation": "several batches, one step",
    "Learning-rate schedules": "the framework's own",
    "Resume": "a run that was stopped goes on as if it had not been",
    "Several processes, whole model in each": "data parallel",
    "Sharded weights": "FSDP2, ZeRO, a mesh",
    "Tensor parallel": "the columns or rows of a weight on several devices",
    "Adapters attached by others": "a model that has LoRA layers already is started in place",
    "Save and load": "the folder gives the same outputs again",
    "PEFT opens the folder": "with equal outputs",
    "mlx-lm opens the folder": "with equal outputs",
    "llama.cpp reads it": "`lora-one convert --to gguf`",
    "diffusers opens it": "`lora-one convert --to diffusers`",
    "Merge": "`merge`: W + s B A as the plain model's weights",
    "Merging adopted layers": "`merge` where others attached the LoRA layers",
    "Merged model as a folder": "in the layout of Hugging Face",
    "Chat data": "the command: loss on every turn of the assistant, tools, system prompts",
    "Packing": "the command: several rows in one",
    "Evaluation while training": "the command: held-out loss every few steps",
    "Early stopping": "the command: no better for some evaluations",
    "Best checkpoint": "the command: what was best on the held-out rows is kept",
    "Trackers": "the command: TensorBoard, trackio, wandb",
}
HEAD = """# What works where

Each mark in this table is a test that passed; `make features` writes it. **yes**: a test shows it by numbers.
**no**: a test shows the error that says why, and what to do instead. An empty cell promises nothing.

"""


def name_features(items: list[pytest.Item]) -> None:
    """Give each test's report the cells of the table that it shows."""
    for item in items:
        for mark in item.iter_markers("feature"):
            name, framework = mark.args if len(mark.args) == 2 else (*mark.args, _framework(item))
            if name not in FEATURES or framework not in FRAMEWORKS:
                raise pytest.UsageError(f"{item.nodeid}: no cell {name!r}, {framework!r} in tests/features.py")
            answer = "no" if mark.kwargs.get("refused") else "yes"
            item.user_properties.append(("feature", [name, framework, answer]))


def _framework(item: pytest.Item) -> str:
    parts = item.path.relative_to(ROOT).parts
    return parts[2] if parts[:2] == ("tests", "backends") else ""


def page_of(shown: dict[tuple[str, str], dict[str, set[str]]]) -> str:
    """Return the page for what tests showed: (feature, framework) -> answer -> files of tests."""
    table = [["", *FRAMEWORKS.values(), ""], ["---", *[":-:"] * len(FRAMEWORKS), "---"]]
    tests = [["", "Tests"], ["---", "---"]]
    for name, meaning in FEATURES.items():
        cells = [shown.get((name, framework), {}) for framework in FRAMEWORKS]
        if any(cells):
            table.append([name, *("yes" if "yes" in cell else "no" if cell else "" for cell in cells), meaning])
            files = sorted({file for cell in cells for answer in cell.values() for file in answer})
            tests.append([name, ", ".join(f"`{file}`" for file in files)])
    return HEAD + _markdown(table) + "\n## The tests\n\n" + _markdown(tests)


def _markdown(rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


class FeaturePage:
    """A plugin of pytest that gathers what tests showed, and writes docs/features.md or compares with it."""

    def __init__(self, write: bool, whole: bool) -> None:
        self.shown: dict[tuple[str, str], dict[str, set[str]]] = {}
        self.write, self.whole = write, whole

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            for name, value in report.user_properties:
                if name == "feature":
                    feature, framework, answer = value
                    files = self.shown.setdefault((feature, framework), {}).setdefault(answer, set())
                    files.add(report.nodeid.partition("::")[0])

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus != pytest.ExitCode.OK:
            return
        page = page_of(self.shown)
        if self.write:
            PAGE.write_text(page, encoding="utf-8")
        elif self.whole and page != PAGE.read_text(encoding="utf-8"):
            print(f"\ndocs/features.md is not what the tests showed: run `make features`. They showed:\n{page}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
