"""What callers pass to an engine beside requests: each check returns it, or raises an error that
names it."""

from __future__ import annotations

import os
from dataclasses import replace
from os import PathLike
from pathlib import Path

from sora_engine.config import Limits
from sora_engine.errors import RequestError
from sora_engine.io.atomic import refuse_no_name
from sora_engine.request.checks import finite, flag, integer, positive, shown
from sora_engine.runtime.hooks import Hooks
from sora_engine.runtime.job import JobOptions
from sora_engine.runtime.scheduler import MAX_PRIORITY


def check_types(limits: object, hooks: object) -> None:
    for name, value, kind in (("limits", limits, Limits), ("hooks", hooks, Hooks)):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be sora_engine.{kind.__name__}, got {shown(value)}")


def path_of(name: str, value: object) -> Path:
    """A path in a text or a Path; RequestError for other things, bytes among them."""
    if not isinstance(value, (str, PathLike)) or isinstance(os.fspath(value), bytes):
        raise RequestError(f"{name} must be a path in a text or a Path, got {shown(value)}")
    return Path(value)


def checked_options(options: JobOptions) -> JobOptions:
    """The options, their numbers plain ones; RequestError for a value that cannot be."""
    priority = integer("priority", options.priority, 0)
    if not -MAX_PRIORITY <= priority <= MAX_PRIORITY:
        raise RequestError(
            f"priority must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}"
        )
    save_every = integer("save_every", options.save_every, 1)
    if save_every < 1:
        raise RequestError(f"save_every must be steps, 1 or more, got {save_every}")
    deadline_s, save_every_s = options.deadline_s, options.save_every_s
    keep_frames = flag("keep_frames", options.keep_frames)
    if not keep_frames and options.on_frames is None:
        raise RequestError("keep_frames=False: on_frames must take the frames, or they are lost")
    save_last_s = finite("save_last_s", options.save_last_s, 0.0)
    if save_last_s < 0:
        raise RequestError(f"save_last_s must be seconds, 0 or more, got {save_last_s:g}")
    for name in ("on_frames", "on_latents", "on_progress"):
        given = getattr(options, name)
        if given is not None and not callable(given):
            raise RequestError(f"{name} must be a function, got {shown(given)}")
    if options.save_to is not None:
        try:
            refuse_no_name(options.save_to)
        except OSError as error:
            raise RequestError(f"save_to: {error}") from error
    return replace(
        options,
        priority=priority,
        save_every=save_every,
        save_every_s=None if save_every_s is None else positive("save_every_s", save_every_s),
        save_last_s=save_last_s,
        keep_frames=keep_frames,
        deadline_s=None if deadline_s is None else positive("deadline_s", deadline_s),
    )
