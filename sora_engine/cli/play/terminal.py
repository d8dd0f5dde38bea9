"""A terminal that sends every key as it is pressed, and is put back as it was whatever happens."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import weakref
from types import FrameType, TracebackType
from typing import Any

from sora_engine.cli.app import UsageError
from sora_engine.cli.play.keyboard import ASK, TAKE_BACK, Key, Keyboard

INSTEAD = "--actions, --policy, --replay with -o, or --page would work without one"
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[?7l" + ASK
_LEAVE = TAKE_BACK + "\x1b[?2026l\x1b[0m\x1b[?7h\x1b[?25h\x1b[?1049l"
FALLBACK = (80, 24)


class Terminal:
    """Standard input and output while a world is played: a context manager.

    Between entering and leaving there are no echo and no lines, the cursor is hidden, and what was
    on the screen waits behind. A stop (Ctrl-Z) puts all that back until the process goes on.
    """

    def __init__(self) -> None:
        self.blank = True
        """Nothing is drawn in it, or not any more: whoever draws sets it to False."""
        self._in, self._out = _descriptors()
        self._keyboard = Keyboard()
        self._saved: list[Any] | None = None
        self._before: Any = None
        self._woken, self._waker = os.pipe()
        os.set_blocking(self._waker, False)
        weakref.finalize(self, _close, self._woken, self._waker)

    def __enter__(self) -> Terminal:
        try:
            self._take()
            if threading.current_thread() is threading.main_thread():
                self._before = signal.signal(signal.SIGTSTP, self._stop)
        except BaseException:
            self._give_back()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._before is not None:
                signal.signal(signal.SIGTSTP, self._before)
        finally:
            self._give_back()

    def size(self) -> tuple[int, int]:
        """Columns and rows of the window."""
        try:
            columns, rows = os.get_terminal_size(self._out)
        except OSError:
            return FALLBACK
        return columns or FALLBACK[0], rows or FALLBACK[1]

    def write(self, text: str) -> None:
        """Send all of it. Raises OSError where the terminal has gone."""
        data = memoryview(text.encode())
        while data:
            data = data[os.write(self._out, data) :]

    def wake(self) -> None:
        """End the waiting for keys, from any thread."""
        with contextlib.suppress(BlockingIOError):  # it has been woken often enough
            os.write(self._waker, b"!")

    def keys(self, timeout_s: float) -> list[Key]:
        """Keys that come within the time, or at once where some are there; none where it is woken.
        Raises EOFError where the terminal has gone, KeyboardInterrupt for Ctrl-C."""
        ready, _, _ = select.select([self._in, self._woken], [], [], max(0.0, timeout_s))
        if self._woken in ready:
            os.read(self._woken, 4096)
        if self._in not in ready:
            if not ready:
                self._keyboard.wait_no_longer()
            return []
        try:
            data = os.read(self._in, 4096)
        except OSError:  # as of a pty whose window was closed
            data = b""
        if not data:
            raise EOFError("the terminal was closed")
        keys = self._keyboard.read(data)
        # A terminal that tells of releases sends these two as keys rather than as signals.
        for key in keys:
            if key.ctrl and key.name == "c":
                raise KeyboardInterrupt
            if key.ctrl and key.name == "z":
                os.kill(os.getpid(), signal.SIGTSTP)
        return keys

    def _take(self) -> None:
        import termios

        self._saved = termios.tcgetattr(self._in)
        raw = termios.tcgetattr(self._in)
        raw[0] &= ~(termios.IXON | termios.ICRNL)
        raw[3] &= ~(termios.ICANON | termios.ECHO)
        raw[6][termios.VMIN], raw[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSADRAIN, raw)
        self.write(_ENTER)
        self.blank = True

    def _give_back(self) -> None:
        import termios

        if self._saved is None:
            return
        with contextlib.suppress(OSError):  # a terminal that has gone needs nothing
            self.write(_LEAVE)
        with contextlib.suppress(OSError, termios.error):
            # What was typed ahead was meant for the world, and not for the shell.
            termios.tcsetattr(self._in, termios.TCSAFLUSH, self._saved)
        self._saved = None

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """Ctrl-Z: the shell has its terminal until the process goes on."""
        self._give_back()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops here, until SIGCONT
        signal.signal(number, self._stop)
        self._take()


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _descriptors() -> tuple[int, int]:
    """Of standard input and output; UsageError where they are no terminal."""
    try:
        import termios  # noqa: F401
    except ImportError as error:
        raise UsageError(f"sora play draws in a terminal of Unix; {INSTEAD}") from error
    found = []
    for name, stream in (("input", sys.stdin), ("output", sys.stdout)):
        try:
            number = stream.fileno()
        except (AttributeError, OSError, ValueError):
            number = -1
        if number < 0 or not os.isatty(number):
            raise UsageError(f"sora play needs a terminal, and standard {name} is none; {INSTEAD}")
        found.append(number)
    if os.environ.get("TERM", "dumb") == "dumb":
        raise UsageError(f"sora play draws in colours, and TERM says that it cannot; {INSTEAD}")
    return found[0], found[1]
