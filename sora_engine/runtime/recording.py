"""A session's frames on their way to a file, with the actions that made them in its metadata."""

from __future__ import annotations

import base64
import io
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sora_engine.errors import MediaError
from sora_engine.io.atomic import temporary_beside, written_through
from sora_engine.io.images import write_png
from sora_engine.io.provenance import Provenance
from sora_engine.io.remux import with_comment
from sora_engine.io.video_writer import VideoWriter, check_output
from sora_engine.models.video_model import VideoModel
from sora_engine.request import Action, ResolvedSession
from sora_engine.request.actions import pack_log
from sora_engine.runtime.recall import Memory
from sora_engine.runtime.standing import Log, Standing
from sora_engine.version import version

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".mp4"


@dataclass(slots=True)
class Part:
    """Steps that follow each other. before: the session's actions until there, as runs."""

    before: list[tuple[Action, int]]
    log: Log | None = None


class Recorded(Protocol):
    """What a recording must know of its session."""

    @property
    def settings(self) -> ResolvedSession: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def seed(self) -> int: ...
    @property
    def fps(self) -> float: ...

    def end_recording(self, recording: Recording) -> None:
        """It takes no more frames."""
        ...


class Recording:
    """Frames of a session on their way to a file: `Session.record` makes it.

    A context manager: leaving it finishes the file; leaving it by an exception leaves none.
    """

    def __init__(self, path: Path, session: Recorded, model: VideoModel) -> None:
        if path.suffix.lower() != SUFFIX:
            raise MediaError(f"{path}: a session is recorded to an {SUFFIX} file")
        self.path = check_output(path, fps=session.fps)
        self.paused = False
        """While it is, steps go by unrecorded."""
        self._session, self._model = session, model
        self._target = written_through(self.path)
        self._rough = temporary_beside(self._target).with_suffix(SUFFIX)
        self._writer: VideoWriter | None = VideoWriter(self._rough, session.fps)
        self._parts: list[Part] = []
        self._last: Standing | None = None
        self._error: MediaError | None = None

    def take(self, before: Standing, standing: Standing, action: Action) -> None:
        """The frames of a step that led from `before` to `standing`."""
        if self.paused or self._writer is None:
            return
        if before is not self._last:  # it begins, or the session went back in the meantime
            self._parts.append(Part(Log.runs(before.log)))
        self._parts[-1].log = Log.with_one(self._parts[-1].log, action)
        self._last = standing
        try:
            for frame in standing.frames:
                self._writer.write(frame)
        except MediaError as error:  # the step itself went well: it is told as the recording ends
            logger.warning("a recording ends here: %s", error)
            self._error = error
            self._writer.abort()
            self._writer = None

    def close(self) -> None:
        """Finish the file. MediaError where there is nothing in it, or it cannot be written."""
        writer, self._writer = self._writer, None
        self._session.end_recording(self)
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        if writer is None:
            return
        finished = temporary_beside(self._target)
        try:
            writer.close()
            with_comment(self._rough, finished, self._provenance().to_json())
            os.replace(finished, self._target)
        except OSError as error:
            raise MediaError(f"{self.path} cannot be written: {error}") from error
        finally:
            for left in (self._rough, finished):
                left.unlink(missing_ok=True)
        self._last = None

    def abort(self) -> None:
        """Leave no file."""
        writer, self._writer = self._writer, None
        self._session.end_recording(self)
        if writer is not None:
            writer.abort()
        self._last = None

    def end(self) -> None:
        """The session ends: finish the file, if there is anything in it."""
        try:
            if self._parts:
                self.close()
            else:
                self.abort()
        except MediaError as error:
            logger.warning("a recording was lost: %s", error)

    def __enter__(self) -> Recording:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _provenance(self) -> Provenance:
        session, model = self._session, self._model
        settings = session.settings
        request = {k: v for k, v in settings.to_json().items() if k != "exact"}
        company = 1 if self._last is None else self._last.company
        record: dict[str, Any] = {
            "format": FORMAT,
            "request": request,
            "parts": [
                [pack_log(part.before), pack_log(Log.runs(part.log))] for part in self._parts
            ],
            "alone": company == 1,
            "shared": session.memory.was_shared,
        }
        if settings.first is not None:
            picture = io.BytesIO()
            write_png(picture, settings.first)
            record["first"] = base64.b64encode(picture.getvalue()).decode()
        return Provenance(
            prompt=settings.video.prompt,
            seed=session.seed,
            model=model.name,
            version=version(),
            settings={
                "session": record,
                "model_hash": model.weights_hash,
                "device": model.device.type,
                "dtype": model.dtype_name,
                "loras": [record.to_json() for record in model.loras],
            },
        )
