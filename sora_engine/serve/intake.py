"""Uploads, looked at before anything else is done with them, in a process that may do very little.

Decoders are the largest surface that a stranger's bytes meet. So a child decodes each upload once,
whole, with bounds that the kernel keeps: memory, processor time, no new files, few descriptors. It
is told the open file and not its name, and what its metadata say is followed by nobody. What it
finds is on one line of its output; all else, its end by a signal among it, means that the upload
cannot be used.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sora_engine.errors import MediaError
from sora_engine.serve.formats import kind_of_upload


@dataclass(frozen=True, slots=True, kw_only=True)
class Caps:
    """max_pixels: of a frame. max_frames: in a file. memory_bytes: what decoding may take beside
    the libraries' own. cpu_s, wall_s: seconds of the processor, and in all."""

    max_pixels: int = 4096 * 4096
    max_frames: int = 2000
    memory_bytes: int = 256 << 20
    cpu_s: int = 20
    wall_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Examined:
    """An upload that can be decoded. kind: its media type. fps: 1 for a picture."""

    kind: str
    width: int
    height: int
    num_frames: int
    fps: float

    @property
    def is_picture(self) -> bool:
        return self.num_frames == 1


class Intake:
    """Looks at uploads, at most `at_once` of them at a time. Safe to use from any thread."""

    def __init__(self, caps: Caps | None = None, at_once: int = 2) -> None:
        self.caps = caps or Caps()
        self._places = threading.BoundedSemaphore(at_once)

    def examine(self, path: Path) -> Examined:
        """What is in a file; MediaError, which names no path, for what is none of the formats or
        cannot be decoded within the caps. It takes about half a second."""
        with path.open("rb") as file:
            kind = kind_of_upload(file)  # reads a few bytes, and runs no decoder
            with self._places:
                return self._ask(file.fileno(), kind)

    def _ask(self, descriptor: int, kind: str) -> Examined:
        child = subprocess.Popen(
            [
                *(sys.executable, "-m", "sora_engine.serve.examiner"),
                *(str(descriptor), kind, json.dumps(asdict(self.caps))),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(descriptor,),
            env=_environment(),
            start_new_session=True,
        )
        with child:
            try:
                said, _ = child.communicate(timeout=self.caps.wall_s)
            except subprocess.TimeoutExpired:
                raise MediaError(
                    f"the upload takes over {self.caps.wall_s:g} s to decode; a shorter or smaller "
                    "one would work"
                ) from None
            finally:
                child.kill()  # nothing where it has ended
        return _understood(said, child.returncode)


def _understood(said: bytes, code: int | None) -> Examined:
    try:
        answer: dict[str, Any] = json.loads(said)
    except ValueError:
        answer = {}
    if code == 0 and "width" in answer:
        return Examined(**answer)
    raise MediaError(
        str(answer.get("why", "the upload cannot be decoded within the server's bounds"))
    )


def _environment() -> dict[str, str]:
    """What Python needs to find itself: no key, no proxy, nothing else of the server's."""
    kept = {
        name: os.environ[name]
        for name in ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "SYSTEMROOT")
        if name in os.environ
    }
    # Threads of numerical libraries would count against the memory that is allowed.
    return {**kept, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
