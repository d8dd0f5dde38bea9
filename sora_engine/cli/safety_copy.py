"""The finished latents of a job in a file, for as long as its video is not whole."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sora_engine.cli.app import say, warn

if TYPE_CHECKING:
    from torch import Tensor

    from sora_engine.io.latents import SavedLatents


class SafetyCopy:
    """From finished latents `sora decode` goes on: a decode that fails, is stopped or is killed
    loses nothing.

    It lies beside the output, under a name that nothing has: what an earlier run left there, or
    another one is about to need, stays. Where that place takes no file it lies in the current
    folder, or in that of temporary files, and the user is told. No failure of it is a failure of
    the job.
    """

    def __init__(self, output: str, saved: Callable[[Tensor], SavedLatents]) -> None:
        self._output = Path(output)
        self._saved = saved
        self._path: Path | None = None

    def keep(self, latents: Tensor) -> None:
        """Write them. Called on the engine's thread, before they are decoded."""
        reasons = self._write(latents)
        if self._path is None:
            warn(f"finished latents are not kept while they are decoded: {reasons[0]}")
        elif reasons:
            warn(f"finished latents are in {self._path} while they are decoded: {reasons[0]}")

    def _write(self, latents: Tensor) -> list[str]:
        """Write them in the first place that takes them; why those before it do not."""
        from sora_engine.io.atomic import claim_beside
        from sora_engine.io.latents import SUFFIX

        reasons: list[str] = []
        for place in self._places():
            try:
                claimed = claim_beside(place, SUFFIX)
                try:
                    self._saved(latents).write(claimed)
                except BaseException:
                    claimed.unlink(missing_ok=True)
                    raise
            except Exception as error:  # whatever it is: the video is made all the same
                reasons.append(str(error))
                continue
            self._path = claimed
            break
        return reasons

    def _places(self) -> Iterator[Path]:
        yield self._output
        with suppress(OSError):  # a current folder that was removed
            yield Path.cwd() / self._output.name
        with suppress(OSError):
            yield Path(tempfile.gettempdir(), self._output.name)

    def offer(self, latents: Tensor | None) -> None:
        """There is no video: say where the latents are, if there are any.

        latents: those of the job. They are written now where the first copy could not be, or went
        with its folder.
        """
        if latents is not None and not (self._path is not None and self._path.exists()):
            self._path = None
            self._write(latents)
        if self._path is not None:
            advice = shlex.join(["sora", "decode", str(self._path), "-o", str(self._output)])
            say(f"the finished latents are in {self._path}; `{advice}` goes on")

    def remove(self) -> None:
        """The video is whole."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()
