"""`sora play` in a terminal: keys are typed into a pty, and what is drawn is read from it."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sora_engine as sora
from sora_engine.runtime.replay import read_recording
from tests.unit.glass import Glass, lines_of, pixels_of
from tests.unit.world_folder import save_world

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
DEMO = """
import itertools, os, sys, threading, time
import numpy as np
from sora_engine.cli.app import app, main

@app.command()
def demo(fails: bool = False):
    from sora_engine.cli.play.feed import Feed
    from sora_engine.cli.play.show import show
    from sora_engine.cli.play.terminal import Terminal
    feed = Feed()
    feed.status.text = "demo"

    def make():
        for i in itertools.count():
            feed.put([np.full((8, 8, 3), i % 256, dtype=np.uint8)], 50.0)
            feed.status.message = f"frame {i}"
            time.sleep(0.02)
            if fails and i == 20:
                return feed.end(RuntimeError("the world broke"))

    def press(key):
        feed.status.text = f"pressed {key.name}"
        return key.name != "q"

    terminal = Terminal()
    with terminal:
        threading.Thread(target=make, daemon=True).start()
        show(terminal, feed, press)

sys.exit(main(sys.argv[1:]))
"""
"""A feed of grey frames in a terminal: what a world is to it, without one."""


class Window:
    """A terminal with a program in it."""

    def __init__(self, arguments: list[str], columns: int, rows: int, folder: Path) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(columns, rows)
        self.glass = Glass(columns, rows)
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.before = termios.tcgetattr(self.slave)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "TERM": "xterm-256color",
            "OMP_NUM_THREADS": "1",
        }
        self.program = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            cwd=folder,
            env=environment,
            start_new_session=True,
            preexec_fn=self._own,
        )

    def _own(self) -> None:
        """The pty sends it signals, as a shell's terminal does."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whoever runs the tests may ignore it
        # A session's leader is orphaned, and no terminal stops such: so a child is in front.
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def until(self, condition: Callable[[], bool], what: str = "") -> None:
        """Read what is drawn until something is so."""
        end = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < end, f"{what}: {self.text()}"
            assert self._read(0.05) or self.program.poll() is None, f"{what}: {self.text()}"

    def shows(self, words: str) -> None:
        """Wait for a text."""
        self.until(lambda: words in self.text(), words)

    def text(self) -> str:
        """What stands in the window."""
        return "\n".join("".join(row).rstrip() for row in self.glass.characters)

    def end(self) -> int:
        """Wait for the program's exit code."""
        end = time.monotonic() + TIMEOUT_S
        while self.program.poll() is None:
            assert time.monotonic() < end, self.text()
            self._read(0.05)
        while self._read(0.1):
            pass
        return self.program.returncode

    def as_it_was(self) -> bool:
        """Whether the terminal is as it was before the program: its modes, and its settings."""
        self.until(lambda: not self._read(0.0))
        now = termios.tcgetattr(self.slave)
        pushed, popped = (self.glass.sent.count(code) for code in ("\x1b[>11u", "\x1b[<u"))
        return now == self.before and self.glass.modes == {"25", "7"} and pushed == popped

    def close(self) -> None:
        self.program.kill()
        self.program.wait()
        os.close(self.slave)
        os.close(self.master)

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return False
        with contextlib.suppress(OSError):
            data = os.read(self.master, 1 << 16)
            self.glass.write(self._decoder.decode(data))
            return bool(data)
        return False


@contextlib.contextmanager
def window(
    arguments: list[str], columns: int = 80, rows: int = 24, folder: Path = ROOT
) -> Iterator[Window]:
    shown = Window(arguments, columns, rows, folder)
    try:
        yield shown
    finally:
        shown.close()


def demo(*options: str) -> list[str]:
    return ["-c", DEMO, "demo", *options]


def greys(shown: Window, columns: int = 80, rows: int = 24) -> list[int]:
    """The frames that were drawn, by their number."""
    from sora_engine.cli.play.screen import Layout

    lie = Layout.of(columns, rows, 8, 8)
    found = []
    for picture in shown.glass.pictures:
        pixels = pixels_of(picture, lie.top, lie.left, lie.height, lie.width)
        assert (pixels == pixels[0, 0, 0]).all()
        found.append(int(pixels[0, 0, 0]))
    return found


def test_a_world_is_played_by_keys_and_what_is_drawn_is_what_it_makes(tmp_path: Path) -> None:
    """Typed: record, steps to the right, an act, the recording's end, quit. The frames that are
    read back from the escape codes are those of a session that does what the recording says."""
    folder = save_world(tmp_path / "world")
    play = ["-m", "sora_engine", "play", "--model", str(folder), "--seed", "5", "-o", "mine.mp4"]
    with window(play, 80, 24, tmp_path) as shown:
        shown.shows(" fps | ")
        shown.type("r")
        shown.shows("mine.mp4 is being recorded")
        for key in ("\x1b[C", "\x1b[C", " ", "\x1b[A"):
            shown.type(key)
            count = len(shown.glass.pictures)
            shown.until(lambda before=count: len(shown.glass.pictures) > before + 10)
        shown.type("r")
        shown.shows("mine.mp4 is recorded")
        shown.type("q")
        assert shown.end() == 0
        assert shown.as_it_was()
        told = shown.text().replace("\n", "")  # lines are broken at the window's edge
        assert "mine.mp4: recorded; sora play --replay mine.mp4 plays it again" in told
        pictures = list(shown.glass.pictures)
    with sora.Engine.from_pretrained(folder) as engine:
        recorded = read_recording(tmp_path / "mine.mp4", engine.loaded_model)
        replayed = np.concatenate(list(engine.replay(tmp_path / "mine.mp4")))
        (part,) = recorded.parts
        request = sora.SessionRequest(seed=5)
        with engine.open_session(request) as session:
            expected = [*session.frames]
            for action, times in [*part[0], *part[1]]:
                for _ in range(times):
                    expected += [*session.step(action)]
    done = {button for action, _ in part[1] for button in action.press}
    assert done == {"right", "act", "up"}
    assert np.array_equal(replayed, np.stack(expected[-len(replayed) :]))
    seen = drawn(pictures, expected)
    last = max(i for i, number in enumerate(seen) if number is not None)
    assert None not in seen[: last + 1]  # what came after the recording is known to nobody
    assert seen[: last + 1] == sorted(seen[: last + 1])
    assert len(set(seen)) > len(expected) / 4  # those that were late are left out
    # The recording, seen again: it ends by itself, with its last frame.
    with window([*play[:-4], "--replay", "mine.mp4"], 80, 24, tmp_path) as shown:
        assert shown.end() == 0
        assert shown.as_it_was()
        seen = drawn(shown.glass.pictures, list(replayed))
    assert None not in seen
    assert seen == sorted(seen)
    assert seen[-1] == len(replayed) - 1
    assert len(set(seen)) > len(replayed) / 4


def drawn(pictures: list[Any], frames: list[np.ndarray]) -> list[int | None]:
    """Which frame each picture shows, in a window of 80x24; None for another one."""
    numbers = {frame.tobytes(): i for i, frame in enumerate(frames)}
    assert len(numbers) == len(frames)  # no two are alike
    return [numbers.get(pixels_of(each, 3, 24, 32, 32).tobytes()) for each in pictures]


def test_a_window_of_another_size_is_drawn_anew() -> None:
    with window(demo()) as shown:
        shown.shows("frame 20")
        numbers = greys(shown)
        assert numbers == sorted(numbers)
        assert len(set(numbers)) > 10
        shown.resize(30, 9)
        glass = shown.glass = Glass(80, 24)  # as it still draws for the old size
        shown.until(lambda: "\x1b[2J" in glass.sent)
        start = glass.sent.rindex("\x1b[2J")
        smaller = shown.glass = Glass(30, 9)
        smaller.write(glass.sent[start:])
        shown.until(lambda: len(smaller.pictures) > 5)
        assert len(set(greys(shown, 30, 9))) > 3
        shown.type("q")
        assert shown.end() == 0


def test_keys_are_told_whole() -> None:
    with window(demo()) as shown:
        shown.shows("demo")
        shown.type("\x1b[A")
        shown.shows("pressed up")
        shown.type("\x1b")
        time.sleep(0.3)
        shown.type("x")
        shown.shows("pressed x")
        shown.type("q")
        assert shown.end() == 0
        assert shown.as_it_was()


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("key", 130, "sora: error: interrupted"),
        ("ctrl-c as a key", 130, "sora: error: interrupted"),
        (signal.SIGINT, 130, "sora: error: interrupted"),
        (signal.SIGTERM, 143, "sora: error: ended by SIGTERM"),
        (signal.SIGHUP, 129, "sora: error: ended by SIGHUP"),
        ("error", 1, "sora: error: RuntimeError: the world broke"),
    ],
)
def test_the_terminal_is_put_back_whatever_happens(
    how: str | signal.Signals, code: int, words: str
) -> None:
    with window(demo("--fails") if how == "error" else demo()) as shown:
        shown.shows("frame ")
        assert not shown.as_it_was()
        assert {"1049"} <= shown.glass.modes
        if how == "key":
            shown.type("\x03")
        elif how == "ctrl-c as a key":
            shown.type("\x1b[99;5u")
        elif how != "error":
            shown.program.send_signal(how)
        assert shown.end() == code
        assert shown.as_it_was()
        assert words in shown.text()


def test_a_stop_gives_the_terminal_back_until_it_goes_on() -> None:
    """In a process group that is not orphaned, as a shell's are: a parent waits for it."""
    shell = (
        "import os, signal, sys\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.setpgid(0, 0)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])\n"
        "signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n"
        "os.waitpid(child, os.WUNTRACED)\n"
        "while True:\n"
        "    os.tcsetpgrp(0, child)\n"
        "    os.kill(child, signal.SIGCONT)\n"
        "    _, status = os.waitpid(child, os.WUNTRACED)\n"
        "    if not os.WIFSTOPPED(status):\n"
        "        os.tcsetpgrp(0, os.getpid())\n"
        "        sys.exit(os.waitstatus_to_exitcode(status))\n"
        "    os.tcsetpgrp(0, os.getpid())\n"
        "    print('stopped', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    with window(["-c", shell, *demo()]) as shown:
        shown.shows("frame 5")
        for stop in ("\x1a", "\x1b[122;5u"):
            shown.type(stop)
            shown.shows("stopped")
            assert shown.as_it_was()
            count = len(shown.glass.pictures)
            shown.type("\n")
            shown.until(lambda before=count: len(shown.glass.pictures) > before + 5)
            assert {"1049"} <= shown.glass.modes
            assert "frame" in "\n".join(lines_of(shown.glass.pictures[-1]))
        shown.type("q")
        assert shown.end() == 0
        assert shown.as_it_was()


def test_a_terminal_without_colours_is_told() -> None:
    with window(["-c", "import os\nos.environ['TERM'] = 'dumb'\n" + DEMO, "demo"]) as shown:
        assert shown.end() == 2
        assert "TERM says that it cannot; --actions" in shown.text().replace("\n", "")
