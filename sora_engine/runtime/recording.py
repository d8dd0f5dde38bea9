"""A session's frames in a file, and from its metadata the same frames again."""

from __future__ import annotations

import base64
import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from sora_engine.errors import CheckpointError, MediaError, SessionError
from sora_engine.io.atomic import temporary_beside, written_through
from sora_engine.io.images import decode, write_png
from sora_engine.io.provenance import Provenance, read_provenance
from sora_engine.io.remux import with_comment
from sora_engine.io.video_writer import VideoWriter, check_output
from sora_engine.models.video_model import VideoModel
from sora_engine.request import Action, SessionRequest
from sora_engine.request.actions import pack_log, unpack_log
from sora_engine.request.checks import shown
from sora_engine.request.session import request_from_json
from sora_engine.runtime.standing import Log, Standing
from sora_engine.version import version

if TYPE_CHECKING:
    from sora_engine.runtime.session import Session

logger = logging.getLogger(__name__)

FORMAT = 1
SUFFIX = ".mp4"


@dataclass(slots=True)
class Part:
    """Steps that follow each other. before: the session's actions until there, as runs."""

    before: list[tuple[Action, int]]
    log: Log | None = None


class Recording:
    """Frames of a session on their way to a file: `Session.record` makes it.

    A context manager: leaving it finishes the file; leaving it by an exception leaves none.
    """

    def __init__(self, path: Path, session: Session, model: VideoModel) -> None:
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


@dataclass(frozen=True, slots=True, eq=False)
class Recorded:
    """What a recording says: the request, and by part the actions until it and in it."""

    request: SessionRequest
    parts: list[tuple[list[tuple[Action, int]], list[tuple[Action, int]]]]


def read_recording(path: Path, model: VideoModel) -> Recorded:
    """What a file was recorded from. Raises MediaError for a file that is no recording,
    CheckpointError for another model's, SessionError where its frames followed from another
    session's, too."""
    origin = read_provenance(path)
    record = None if origin is None else origin.settings.get("session")
    if origin is None or not isinstance(record, dict):
        raise MediaError(f"{path} is no recording of a session: its metadata hold no actions")
    if record.get("format") != FORMAT:
        raise MediaError(
            f"{path} is a recording of format {record.get('format')!r}; this version reads {FORMAT}"
        )
    theirs = str(origin.settings.get("model_hash"))
    if theirs != model.weights_hash:
        raise CheckpointError(
            f"it was recorded from another model: weights {theirs[:12]}, these are "
            f"{model.weights_hash[:12]}",
            path=path,
        )
    loras = [record.to_json() for record in model.loras]
    if origin.settings.get("loras", []) != loras:
        raise CheckpointError(
            f"it was recorded with the adapters {shown(origin.settings.get('loras'))} merged in, "
            f"and this engine has {shown(loras)}",
            path=path,
        )
    if record.get("shared"):
        raise SessionError(
            f"{path} was recorded while another session had the same memory: its actions alone do "
            "not make its frames again"
        )
    try:
        first = None
        if "first" in record:
            picture = io.BytesIO(base64.b64decode(record["first"]))
            with Image.open(picture, formats=("PNG",)) as image:
                first = decode(image, path)
        request = request_from_json(dict(record["request"]), first)
        parts = [(unpack_log(before), unpack_log(log)) for before, log in record["parts"]]
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise MediaError(f"{path} is damaged as a recording: {error}") from error
    return Recorded(replace(request, exact=True), parts)


def frames_again(
    path: Path,
    record: Path | None,
    model: VideoModel,
    opened: Callable[[SessionRequest], Session],
) -> Iterator[np.ndarray]:
    """The frames of a recording, a step's at a time. What cannot be is raised at once.

    record: a file that takes them again.
    """
    recorded = read_recording(path, model)
    return _played(recorded, record, opened)


def _played(
    recorded: Recorded, record: Path | None, opened: Callable[[SessionRequest], Session]
) -> Iterator[np.ndarray]:
    with contextlib.ExitStack() as stack:
        world = stack.enter_context(opened(recorded.request))
        beginning = world.mark()
        recording = None if record is None else stack.enter_context(world.record(record))
        for before, log in recorded.parts:
            at = runs_before(world.log, before)
            if at is None:
                world.rewind(beginning)
                at = before
            if recording is not None:
                recording.paused = True
            for action in _each(at):
                world.step(action)
            if recording is not None:
                recording.paused = False
            for action in _each(log):
                yield world.step(action)


def runs_before(
    done: list[tuple[Action, int]], wanted: list[tuple[Action, int]]
) -> list[tuple[Action, int]] | None:
    """What is still to be done of the wanted actions; None where others were done."""
    return [] if done == wanted else (wanted if not done else None)


def _each(runs: list[tuple[Action, int]]) -> Iterator[Action]:
    for action, times in runs:
        for _ in range(times):
            yield action
