"""Only the command's own lines reach the terminal; the output of other libraries comes with --verbose."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
from rich.console import Console

from lora_one import demo
from lora_one.cli import commands as cli
from lora_one.cli.quiet import VERBOSE, quiet
from lora_one.errors import TargetsWarning

# A process that uses every kind of output as soon as the work begins: the libraries' own loggers, print, warnings, a
# progress bar, and the messages of huggingface_hub when PEFT saves.
CHATTY = """
import logging, sys, warnings
from lora_one import api, cli
work = api.init
def init(*arguments, **settings):
    print("CHATTER on stdout")
    print("CHATTER on stderr", file=sys.stderr)
    warnings.warn("CHATTER warned of")
    logging.warning("CHATTER of the root logger")
    from transformers.utils import logging as theirs
    theirs.get_logger("transformers.models").error("CHATTER of transformers")
    from tqdm import tqdm
    list(tqdm([1], desc="CHATTER in a bar"))
    return work(*arguments, **settings)
api.init = init
cli.main()
"""


def lora_one(*arguments, code="from lora_one.cli.commands import main; main()", **environment):
    environment = {**{name: x for name, x in os.environ.items() if name != VERBOSE}, "COLUMNS": "200", **environment}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture
def small(tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text("\n".join(demo.TRAIN.read_text().splitlines()[:8]))
    paths = ["--model", str(demo.MODEL), "--data", str(data), "--out", str(tmp_path / "out")]
    return [*paths, "--rank", "2", "--passes", "2", "--batch-size", "4", "--targets", "q_proj,v_proj"]


def test_a_whole_run_says_its_own_lines_alone(small, tmp_path):
    done = lora_one("finetune", "--steps", "1", *small, code=CHATTY)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    assert lines[0].startswith("lora-one  model ")
    assert lines[1] == "LoRA-One start, layers of model.layers."
    assert lines[2].split()[0] == "layer"
    out = tmp_path / "out"
    assert lines[-4:] == [
        f"Adapter: {out} (opens in PEFT and vLLM)",
        "Next:",
        f"lora-one inspect {out}",
        f'python: model = peft.PeftModel.from_pretrained(base_model, "{out}")',
    ]
    assert lines[-5].startswith("step     1  loss ")
    assert set(done.stdout) & set("\r\x1b") == set()
    shown = lora_one("init", *small, code=CHATTY, **{VERBOSE: "1"})
    assert (shown.stdout + shown.stderr).count("CHATTER") >= 6


def test_errors_still_surface_and_verbose_shows_where(monkeypatch, capsys):
    def broken(*arguments, **settings):
        print("CHATTER")
        raise ZeroDivisionError("by what is no mistake of the user's")

    monkeypatch.setattr("lora_one.finetune.job.initialize_only", broken)
    monkeypatch.setattr(sys, "argv", ["lora-one", "init"])
    monkeypatch.delenv(VERBOSE, raising=False)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert err == (
        "error: unexpected ZeroDivisionError: by what is no mistake of the user's (LORA_ONE_VERBOSE=1 shows where)\n"
    )
    assert (caught.value.code, "CHATTER" in out) == (1, False)
    monkeypatch.setattr(sys, "argv", ["lora-one", "init", "--verbose"])
    with pytest.raises(SystemExit):
        cli.main()
    out, err = capsys.readouterr()
    assert "CHATTER" in out
    assert "Traceback" in err and "in broken" in err


def test_an_interrupted_command_ends_with_130(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_one.finetune.job.initialize_only", interrupted)
    monkeypatch.setattr(sys, "argv", ["lora-one", "init"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 130
    assert "Traceback" not in "".join(capsys.readouterr())


def test_so_it_does_where_the_signal_is_a_real_one(tmp_path):
    code = (
        "import lora_one.finetune.job, signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background processes inherit that it is ignored
        "def wait(*a):\n"
        f"    open({str(tmp_path / 'begun')!r}, 'w').close()\n"
        "    time.sleep(60)\n"
        "lora_one.finetune.job.initialize_only = wait\n"
        "from lora_one.cli.commands import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "init"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for _ in range(600):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err


def test_a_console_speaks_while_all_else_is_quiet_and_afterwards_all_do(monkeypatch, capsys):
    monkeypatch.delenv(VERBOSE, raising=False)
    console, stream, filters = Console(width=80), sys.stdout, list(warnings.filters)
    with quiet(console):
        print("CHATTER")
        sys.stderr.write("CHATTER")
        logging.getLogger("nobody's").warning("CHATTER")
        warnings.warn("CHATTER", UserWarning, stacklevel=1)
        warnings.warn("layers [x] were left out", TargetsWarning, stacklevel=1)
        console.print("said")
    print("heard")
    out, err = capsys.readouterr()
    assert (out, err) == ("warning: layers [x] were left out\nsaid\nheard\n", "")
    assert (sys.stdout is stream, warnings.filters) == (True, filters)
    assert console.file is sys.stdout


def test_importing_the_library_leaves_logging_and_warnings_alone():
    code = (
        "import json, logging, os, sys, warnings\n"
        "def state():\n"
        "    loggers = {n: (x.level, x.disabled) for n, x in logging.root.manager.loggerDict.items()\n"
        "               if isinstance(x, logging.Logger)}\n"
        "    whole = [str(warnings.filters), logging.root.level, sys.stderr is sys.__stderr__, dict(os.environ)]\n"
        "    return whole, loggers\n"
        "import torch, peft, transformers, lora_one.backends.torch\n"
        "before = state()\n"
        "import lora_one, lora_one.finetune.job\n"
        "after = state()\n"
        "print(json.dumps([before[0] == after[0], all(after[1][n] == x for n, x in before[1].items())]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout) == [True, True], done.stderr
