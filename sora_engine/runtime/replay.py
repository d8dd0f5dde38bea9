"""From a recording's metadata the same frames again."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from sora_engine.errors import CheckpointError, MediaError, SessionError
from sora_engine.io.images import decode
from sora_engine.io.provenance import read_provenance
from sora_engine.models.video_model import VideoModel
from sora_engine.request import Action, SessionRequest
from sora_engine.request.actions import unpack_log
from sora_engine.request.checks import shown
from sora_engine.request.session import request_from_json
from sora_engine.runtime.recording import FORMAT
from sora_engine.runtime.session import Session


@dataclass(frozen=True, slots=True, eq=False)
class Played:
    """What a recording says: the request, and by part the actions until it and in it."""

    request: SessionRequest
    parts: list[tuple[list[tuple[Action, int]], list[tuple[Action, int]]]]


def read_recording(path: Path, model: VideoModel) -> Played:
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
    return Played(replace(request, exact=True), parts)


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
    recorded: Played, record: Path | None, opened: Callable[[SessionRequest], Session]
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
