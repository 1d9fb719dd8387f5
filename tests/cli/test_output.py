"""What the commands write where: JSON for programs, bars for terminals, tables that lose no number, exit statuses."""

import io
import json
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from typer.testing import CliRunner

from lora_one import demo
from lora_one.checkpoint import conversion
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.cli import commands, folders, machine, options
from lora_one.cli.bars import bar, bars, clock
from lora_one.cli.output import output, show
from lora_one.cli.values import one_of
from lora_one.conformance.targets import DTYPES
from lora_one.estimate.hardware import PEAKS
from lora_one.estimate.workload import DTYPE_BYTES

SMALL = ["--rank", "2", "--batch-size", "4", "--init-batches", "1", "--targets", "q_proj,v_proj"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    code = "from lora_one.cli.commands import main; main()"
    environment = {**os.environ, "COLUMNS": "80", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


def answer(*arguments: str) -> dict:
    """The one JSON object on stdout, which has nothing else."""
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A short run: its folder, and what it said as JSON."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "d.jsonl"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:12]))
    paths = ["--model", str(demo.MODEL), "--data", str(data), "--out", str(folder / "a"), "--valid-share", "0.25"]
    return folder / "a", answer("finetune", *paths, "--steps", "2", "--eval-steps", "1", *SMALL)


def test_finetune_as_json(job):
    folder, values = job
    assert set(values) == {"report", "losses", "before", "after", "out", "scores", "resumed"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert values["losses"] == [line["loss"] for line in lines if "loss" in line]
    assert (values["out"], values["before"], values["scores"], values["resumed"]) == (str(folder), None, {}, 0)
    saved = json.loads((folder / "lora_one.json").read_text())["report"]
    assert values["report"]["layers"] == saved["layers"] and len(saved["layers"]) == 8


def test_inspect_as_json(job):
    folder, outcome = job
    values = answer("inspect", str(folder))
    assert set(values) == {"adapter", "layers", "report", "settings", "losses", "picture", "page"}
    found = {layer.name: layer.singular_values for layer in inspect_adapter(folder).layers}
    assert {layer["name"]: layer["singular_values"] for layer in values["layers"]} == found
    assert [loss for _, loss in values["losses"]["training"]] == outcome["losses"]
    assert [step for step, _ in values["losses"]["held_out"]] == [0, 1, 2]
    both = answer("inspect", str(folder), str(folder))
    assert set(both) == {"first", "second", "layers", "differences", "losses", "page"}
    assert both["first"] == both["second"] and both["differences"] == {}
    assert {layer["name"] for layer in both["layers"]} == set(found)


def test_convert_and_merge_as_json(job, tmp_path):
    folder, _ = job
    assert answer("convert", str(folder), str(tmp_path / "x"), "--to", "mlx") == {
        "adapter": str(tmp_path / "x"),
        "to": "mlx",
    }
    assert answer("merge", str(demo.MODEL), str(folder), str(tmp_path / "m")) == {"model": str(tmp_path / "m")}
    merged, base = (load_file(path / "model.safetensors") for path in (tmp_path / "m", demo.MODEL))
    changed = {name.rsplit(".", 2)[1] for name in base if (merged[name] != base[name]).any()}
    assert changed == {"q_proj", "v_proj"}


def test_a_failed_command_prints_no_json(tmp_path):
    done = command("inspect", str(tmp_path), "--json")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ")


def test_numbers_that_json_does_not_have_become_null(capsys):
    with output(as_json=True) as out:
        print("a library's line")
        out.say("a line for people")
        out.values = {"a": [1.5, float("inf")], "b": {"c": (float("nan"), 2)}}
    written, errors = capsys.readouterr()
    assert json.loads(written) == {"a": [1.5, None], "b": {"c": [None, 2]}}
    assert errors == "a library's line\n"


def table() -> Table:
    filled = Table(title="numbers", caption="what they are")
    for name in ("layer", "first", "second"):
        filled.add_column(name, justify="right")
    filled.add_row("layers.0.q_proj", "0.123456", "128 x 384")
    filled.add_row("layers.1.q_proj", "[red]0.654321[/]", "")
    return filled


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("width", [80, 40, 25])
def test_no_table_loses_a_number(width, is_terminal):
    console = Console(file=io.StringIO(), width=width, force_terminal=is_terminal, no_color=True, color_system=None)
    show(console, table())
    lines = console.file.getvalue().splitlines()
    text = "\n".join(lines)
    for cell in ("layers.0.q_proj", "0.123456", "128 x 384", "layers.1.q_proj", "0.654321"):
        assert cell in text
    row = next(line for line in lines if "0.123456" in line)
    if width == 80 or not is_terminal:
        assert row.split("│")[1].strip() == "layers.0.q_proj" and row.split("│")[3].strip() == "128 x 384"
    elif width == 40:
        assert row == "  first 0.123456, second 128 x 384"
    if is_terminal:
        assert max(map(len, lines)) <= width
    assert console.width == width


def test_bars_are_for_terminals():
    pipe = Console(file=io.StringIO(), width=80)
    with bar(pipe, "Reading") as advance:
        advance(1, 2)
    assert pipe.file.getvalue() == ""
    terminal = Console(file=io.StringIO(), width=40, force_terminal=True, color_system=None)
    with bars(terminal) as progress:
        task = progress.add_task("A long description of what is done here", total=4, note="")
        for done in (1, 2, 3):
            progress.update(task, completed=done)
        progress.refresh()
        drawn = terminal.file.getvalue()
    last = re.split(r"\r|\x1b\[2K", drawn)[-1]
    assert re.search(r"A long .*… 3/4 +\d:\d\d left", last), drawn
    assert len(last) <= 40


def test_the_first_part_that_is_done_says_how_long_the_rest_takes():
    now = [0.0]
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None, get_time=lambda: now[0])
    progress = bars(console)
    task = progress.add_task("Answering", total=None, note="")
    shown = []
    for now[0], done in ((5.0, None), (20.0, 64)):
        if done:
            progress.update(task, completed=done, total=256)
        shown.append(progress.columns[-1].render(progress.tasks[0]).plain)
    assert shown == ["0:05 so far", "1:00 left"]


def test_times():
    assert [clock(seconds) for seconds in (0, 59.6, 3599, 3723)] == ["0:00", "1:00", "59:59", "1:02:03"]


def on_terminal(*arguments: str, **environment: str) -> str:
    """What a command writes to a terminal."""
    ours, theirs = pty.openpty()
    code = "from lora_one.cli.commands import main; main()"
    environment = {**os.environ, "TERM": "xterm", **environment}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the end, on Linux
            break
        if not part:
            break
        parts.append(part)
    os.close(ours)
    process.wait(timeout=60)
    return b"".join(parts).decode().replace("\r\n", "\n")


@pytest.mark.parametrize(("term", "has_colors"), [("xterm", True), ("dumb", False)])
def test_a_narrow_terminal_gets_all_numbers(job, tmp_path, term, has_colors):
    folder, _ = job
    files = ["--plot", str(tmp_path / "x.png"), "--page", str(tmp_path / "x.html")]
    text = on_terminal("inspect", str(folder), *files, COLUMNS="40", TERM=term)
    assert ("\x1b" in text) == has_colors  # and moves of the bars
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for layer in inspect_adapter(folder).layers:
        assert f"{layer.name.removeprefix('model.layers.')}\n" in plain
        assert f"|sBA| {layer.norm:.3g}," in plain


@pytest.mark.parametrize(
    ("environment", "shown"), [({}, "\x1b[1;31merror:\x1b[0m"), ({"NO_COLOR": "1"}, "\x1b[1merror:\x1b[0m")]
)
def test_no_color(environment, shown):
    assert shown in on_terminal("inspect", "nowhere", **environment)


def completions(line: str) -> list[str]:
    words = line.split(" ")
    done = command(_LORA_ONE_COMPLETE="complete_bash", COMP_WORDS=line.rstrip(), COMP_CWORD=str(len(words) - 1))
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("lora-one fin", {"finetune"}),
        ("lora-one finetune --schedule ", {"linear", "cosine", "constant"}),
        ("lora-one finetune --model ", set()),
    ],
)
def test_the_shell_completes_commands_and_values(line, expected):
    assert set(completions(line)) == expected


def test_the_values_that_are_completed_are_those_that_are_allowed():
    assert set(machine.DTYPES) == set(DTYPES)
    assert set(machine.STORED) == set(DTYPE_BYTES)
    assert set(machine.HARDWARE) == set(PEAKS)
    assert folders.LAYOUTS == conversion.LAYOUTS
    for name, values in options.VALUES.items():
        for value in values:
            options.recipe_from(None, {name: value})  # which raises for a value that is not allowed
    assert one_of(folders.LAYOUTS)("f") == ["flax"]


def test_the_completion_script_is_for_the_command():
    done = command(_LORA_ONE_COMPLETE="source_bash")
    assert "complete -o default -F _lora_one_completion lora-one" in done.stdout


@pytest.mark.parametrize(
    "name", ["finetune", "init", "inspect", "convert", "merge", "estimate", "conformance", "doctor"]
)
def test_help_fits_into_80_columns_and_offers_json(name):
    done = CliRunner(env={"COLUMNS": "80"}).invoke(commands.app, [name, "--help"], prog_name="lora-one")
    assert done.exit_code == 0
    assert done.stdout.startswith(f"Usage: lora-one {name} ")
    assert "--json" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_each_command_has_a_summary_that_fits():
    text = CliRunner(env={"COLUMNS": "80"}).invoke(commands.app, ["--help"]).stdout
    assert "..." not in text.partition("Commands:")[2]
