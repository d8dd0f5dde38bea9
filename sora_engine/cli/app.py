"""The Typer application, its entry point, and how errors become exit codes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sora_engine.errors import SoraError
from sora_engine.io.system import keep_memory
from sora_engine.version import version

INTERRUPTED = 130
HUNG_UP = 129
TERMINATED = 143


class UsageError(Exception):
    """A wrong value on the command line, as one line for its user."""


class OnceCommand(TyperCommand):
    """A command of which an option that holds one value is given once.

    click takes the last of several without a word.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter, count in Counter(order).items():
            single = parameter.param_type_name == "option" and not parameter.multiple
            if single and count > 1:
                name = max(parameter.opts, key=len)
                raise UsageError(f"{name} is given {count} times; it takes one value")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            os.getcwd()
        except OSError as error:  # numerical libraries end the process there
            raise UsageError(
                "the current folder is not there any more; `cd` into one that is"
            ) from error
        return super().invoke(ctx)


class _FailedError(Exception):
    """A command failed with what typer has a meaning of its own for."""


class Commands(TyperGroup):
    """All commands, each of whose failures is told.

    typer takes a broken pipe for a reader of standard output that went away, and ends the process
    with 1 and without a word; it takes an end of file for a Ctrl-C. Here `say` looks after standard
    output, and what is left are connections and files.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, EOFError) as error:
            raise _FailedError from error


app = typer.Typer(
    cls=Commands,
    help="Inference for Sora-class video diffusion transformers.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code; raises nothing."""
    if arguments is None:  # a process of its own
        keep_memory()
    _prepare_streams()
    _prepare_signals()
    _unsaid.clear()
    logger, told = logging.getLogger("sora_engine"), _Told(logging.WARNING)
    logger.addHandler(told)
    try:
        return _run(arguments)
    finally:
        logger.removeHandler(told)


def _run(arguments: list[str] | None) -> int:
    try:
        code = app(args=arguments, prog_name="sora", standalone_mode=False) or 0
        if code == INTERRUPTED:  # what typer makes of a Ctrl-C, without a word
            return _complain("interrupted", INTERRUPTED)
        if _unsaid:
            return _complain(f"standard output cannot be written: {_unsaid[0]}", 1)
        return code
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except typer.Abort:  # how typer passes on a Ctrl-C that came before a command ran
        return _complain("interrupted", INTERRUPTED)
    except SystemExit as error:
        return _ended(error)
    except UsageError as error:
        return _complain(str(error), 2)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: an unknown option, a missing argument
            return _complain(error.format_message(), 2)
        if isinstance(error, _FailedError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if os.environ.get("SORA_DEBUG") == "1":
            raise error
        if isinstance(error, SoraError):
            return _complain(str(error), 1)
        what = f"{type(error).__name__}: {error}"
        if isinstance(error, MemoryError) and not str(error):
            what = "memory ran out; a smaller model, size or length would take less"
        return _complain(f"{what} (SORA_DEBUG=1 shows where)", 1)


def _ended(error: SystemExit) -> int:
    """The exit code of a command that a signal, or some library, ended."""
    if error.code is None or error.code == 0:
        return 0
    if not isinstance(error.code, int):
        return _complain(str(error.code), 1)
    names = {TERMINATED: "ended by SIGTERM", HUNG_UP: "ended by SIGHUP"}
    return _complain(names.get(error.code, f"ended with {error.code}"), error.code)


class _Told(logging.Handler):
    """Warnings of the engine, each as one line. How jobs fare the commands tell themselves."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "sora_engine.runtime.worker":
            warn(record.getMessage())


def _complain(message: str, code: int) -> int:
    _to_stderr(f"sora: error: {one_line(' '.join(message.split()))}")
    return code


def one_line(text: str) -> str:
    """A text for a terminal: what would end the line, or be a command to it, is escaped. Names of
    files and texts of files' metadata may hold such."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f]")


def warn(message: str) -> None:
    """One line beside the output that the work goes on from."""
    _to_stderr(f"sora: warning: {one_line(' '.join(message.split()))}")


def _to_stderr(line: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody can be told
            print(line, file=sys.stderr, flush=True)


def _prepare_streams() -> None:
    """Make what is written to a closed or a narrow stream harmless."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            # Else the next file that is opened takes its number, and libraries that print would
            # print into the video. The lowest free number is given out, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _prepare_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for name, code in (("SIGTERM", TERMINATED), ("SIGHUP", HUNG_UP)):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        # nohup has it ignored, and so it stays.
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _on_signal(code))


def _on_signal(code: int) -> Callable[[int, FrameType | None], None]:
    def end(_signal: int, _frame: FrameType | None) -> None:
        raise SystemExit(code)

    return end


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


_unsaid: list[Exception] = []
"""Why standard output could not be written, once it could not."""


def say(line: str) -> None:
    """Print a line. Where that fails the work goes on, and the exit code tells of it."""
    if _unsaid or sys.stdout is None:
        return
    try:
        print(one_line(line), flush=True)
    except (OSError, ValueError) as error:  # the reader has gone, the disk is full
        _unsaid.append(error)
        with contextlib.suppress(OSError, ValueError):
            # What is buffered would be tried, and complained of, once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
