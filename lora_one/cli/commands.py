"""The `lora-one` command."""

import sys
import traceback
from typing import NoReturn

from lora_one.errors import ConfigError, LoraOneError

try:
    import typer
    from rich.markup import escape
except ModuleNotFoundError as error:
    sys.exit(f"the lora-one command needs the package {error.name!r}: pip install 'lora-one[cli]'")

from . import folders, jobs, machine
from .output import open_console
from .quiet import VERBOSE, is_verbose

FAILED, WRONG_USAGE, INTERRUPTED = 1, 2, 130  # exit statuses: docs/guide/command.md

# Without markup the help is plain text, which leaves more room for words in a narrow terminal than boxes do.
app = typer.Typer(
    help="LoRA-One: a better starting point for LoRA fine-tuning.", no_args_is_help=True, rich_markup_mode=None
)
for command in (
    *(jobs.finetune, jobs.init, folders.inspect, folders.convert, folders.merge),
    *(machine.estimate, machine.conformance, machine.doctor),
):
    app.command()(command)


def main() -> None:
    """Run the command. Errors become messages on stderr instead of tracebacks; Ctrl-C exits with status 130."""
    try:
        app(prog_name="lora-one")
    except ConfigError as error:
        _fail(str(error), WRONG_USAGE)
    except LoraOneError as error:
        _fail(str(error))
    except SystemExit as stop:
        raise SystemExit(INTERRUPTED if _interrupted(stop) else stop.code) from None
    except Exception as error:  # a bug in this library or in another one
        if is_verbose() or "--verbose" in sys.argv:
            traceback.print_exception(error)
        _fail(f"unexpected {type(error).__name__}: {error} ({VERBOSE}=1 shows where)")


def _fail(text: str, status: int = FAILED) -> NoReturn:
    open_console(stderr=True).print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
    sys.exit(status)


def _interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C ended the command. Typer turns it into an exit status of 1."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None
