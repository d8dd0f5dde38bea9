"""The Typer application, its entry point, and how errors become exit codes."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Annotated

import typer

from sora_engine.errors import SoraError
from sora_engine.version import version

INTERRUPTED = 130
TERMINATED = 143

app = typer.Typer(
    help="Inference for Sora-class video diffusion transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class UsageError(Exception):
    """A wrong value on the command line, as one line for its user."""


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; raises nothing."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        return app(args=arguments, prog_name="sora", standalone_mode=False) or 0
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except typer.Abort:  # how typer passes on a Ctrl-C that came before a command ran
        return _complain("interrupted", INTERRUPTED)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except UsageError as error:
        return _complain(str(error), 2)
    except BrokenPipeError:
        # Whoever read the output has gone (`| head`); Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            return _complain(error.format_message(), 2)
        if os.environ.get("SORA_DEBUG") == "1":
            raise
        if isinstance(error, SoraError):
            return _complain(str(error), 1)
        what = f"{type(error).__name__}: {error}"
        return _complain(f"{what} (SORA_DEBUG=1 shows where)", 1)


def _complain(message: str, code: int) -> int:
    print(f"sora: error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def _on_terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sora_engine {version()}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def say(line: str) -> None:
    print(line, flush=True)
