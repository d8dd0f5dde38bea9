"""From the bodies of clients to `VideoRequest`s, by way of what is stored.

What is stored is plain JSON and holds all that a request needs to be made again: the task, its
fields, the seed, and the clips by the hashes of their bytes.

    {"task": "extend", "fields": {"prompt": ..., "video": {"upload": <sha256>}, "seconds": 2.0}}

`over` are the fields of a request that starts from what another one became (remix, refine): they
are laid over the request that the task makes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora_engine.errors import RequestError
from sora_engine.request import (
    Clip,
    Footage,
    Guidance,
    Lora,
    ModelFacts,
    Shot,
    SparsePlan,
    VideoRequest,
    WindowPlan,
    tasks,
)
from sora_engine.request.masks import read_mask
from sora_engine.serve.failures import bad_value
from sora_engine.serve.wire import Body, Media

if TYPE_CHECKING:
    import torch

    from sora_engine.request import ResolvedRequest

PLAIN = (
    *("height", "width", "fps", "negative_prompt", "original_prompt", "num_inference_steps"),
    *("guidance_scale", "guidance_scale_2", "shift", "sigmas", "ladder", "solver", "seed"),
    *("round_to_grid", "strict_grid", "resample", "label"),
)
"""Fields that go into the request as they are."""
UNSTORED = ("user", "priority", "deadline_s", "model")

Stored = dict[str, Any]


def stored_of(task: str, body: Body, keep: Callable[[Media, str], dict[str, Any]]) -> Stored:
    """What is stored of a body.

    keep: turns a picture or a clip, given in the field of that name, into its stored form.
    """
    fields = body.model_dump(exclude_unset=True, exclude_none=True)
    for name in UNSTORED:
        fields.pop(name, None)
    _keep_media(body, fields, keep)
    if "size" in fields:
        width, height = fields.pop("size").split("x")
        fields["height"], fields["width"] = int(height), int(width)
    timeline = fields.pop("timeline", {})
    twice = next((name for name in timeline if fields.get(name)), None)
    if twice is not None:
        raise bad_value(f"{twice} is given in timeline too; leave one out", twice)
    return {"task": task, "fields": {**fields, **timeline}}


def _keep_media(
    body: Body, fields: dict[str, Any], keep: Callable[[Media, str], dict[str, Any]]
) -> None:
    for name in list(fields):
        value = getattr(body, name)
        if isinstance(value, Media):
            fields[name] = keep(value, name)
        elif isinstance(value, Body):
            _keep_media(value, fields[name], keep)
        elif isinstance(value, list) and value and isinstance(value[0], Media):
            fields[name] = [_kept_clip(clip, keep) for clip in value]


def _kept_clip(clip: Any, keep: Callable[[Media, str], dict[str, Any]]) -> dict[str, Any]:
    kept = {**keep(clip, "clips"), "at": clip.at}
    if clip.mask is not None:
        kept["mask"] = keep(clip.mask, "mask")
    return kept


def remixed(base: Stored, media: dict[str, Any], body: Body, strength: float) -> Stored:
    """The stored request of another video again, from what it became, under other fields."""
    given = stored_of(base["task"], body, lambda _media, name: {"name": name})["fields"]
    strength = given.pop("strength", strength)
    return {
        "task": base["task"],
        "fields": {**base["fields"], **given},
        "over": {"init": media, "strength": strength},
    }


def repeated(base: Stored, body: Body) -> Stored:
    """The stored request of another video as it was, under other fields."""
    given = stored_of(base["task"], body, lambda _media, name: {"name": name})["fields"]
    return {**base, "fields": {**base["fields"], **given}}


def uploads_of(stored: Any) -> set[str]:
    """The hashes of all uploads that a stored request needs."""
    if isinstance(stored, dict):
        own = {stored["upload"]} if isinstance(stored.get("upload"), str) else set()
        return own.union(*(uploads_of(value) for value in stored.values()))
    if isinstance(stored, list):
        return set().union(*(uploads_of(value) for value in stored))
    return set()


class Translator:
    """Makes requests for one model. path: where an upload lies, by its hash. loras: the names that
    requests may give. resolve: the engine's."""

    def __init__(
        self,
        model: ModelFacts,
        path: Callable[[str], Path],
        loras: Mapping[str, Path],
        resolve: Callable[[VideoRequest], ResolvedRequest],
    ) -> None:
        self._model, self._path, self._loras, self._resolve = model, path, loras, resolve

    def request_of(self, stored: Stored) -> VideoRequest:
        """The request; RequestError, MediaError or ApiError for what cannot be."""
        fields = dict(stored["fields"])
        request = self._of_task(stored["task"], fields)
        over = stored.get("over")
        if over is not None:
            request = replace(
                request, init=self._frames(over["init"]), strength=over["strength"], latents=None
            )
        if fields.get("draft") and over is None:
            request = tasks.draft(self._model, request)
        if "latents" in fields and over is None:
            request = replace(request, latents=self._noise(fields["latents"], request))
        return request

    def _of_task(self, task: str, fields: dict[str, Any]) -> VideoRequest:
        model, settings = self._model, self._settings(fields)
        prompt = fields.get("prompt", "")
        match task:
            case "create":
                return self._created(prompt, fields, settings)
            case "image":
                return tasks.image(prompt, **settings)
            case "edit":
                return self._edited(prompt, fields, settings)
            case "extend":
                return tasks.extend(
                    model,
                    self._frames(fields["video"]),
                    prompt,
                    before_s=fields.get("before_s", 0.0),
                    after_s=fields.get("seconds", 0.0),
                    **settings,
                )
            case "loop":
                clip = self._frames(fields["video"])
                return tasks.loop(model, clip, prompt, gap_s=fields.get("gap_s", 1.0), **settings)
            case "connect":
                first, second = self._frames(fields["first"]), self._frames(fields["second"])
                gap = fields.get("gap_s", 1.0)
                return tasks.connect(model, first, second, prompt, gap_s=gap, **settings)
            case "upscale":
                more = {name: fields[name] for name in ("scale", "strength") if name in fields}
                clip = self._frames(fields["video"])
                return tasks.upscale(model, clip, prompt, **more, **settings)
            case _:
                raise RequestError(f"there is no task {task!r}")

    def _settings(self, fields: dict[str, Any]) -> dict[str, Any]:
        settings = {name: fields[name] for name in PLAIN if name in fields}
        if "camera" in fields:  # a list is never the path of a file
            camera = fields["camera"]
            settings["camera"] = [camera] if isinstance(camera, str) else camera
        if "guidance" in fields:
            settings["guidance"] = Guidance(**fields["guidance"])
        if "window" in fields:
            plan: Any = SparsePlan if "reach" in fields["window"] else WindowPlan
            window = fields["window"]
            if plan is WindowPlan and "overlap" not in window:
                from sora_engine.request.windows import default_overlap

                window = {"overlap": default_overlap(window["length"]), **window}
            settings["window"] = plan(**window)
        if fields.get("loras"):
            settings["loras"] = tuple(self._lora(**lora) for lora in fields["loras"])
        return settings

    def _lora(self, name: str, strength: float = 1.0, expert: str | None = None) -> Lora:
        if name not in self._loras:
            known = ", ".join(sorted(self._loras)) or "none"
            raise bad_value(f"loras: {name!r} is none of this server; it has {known}", "loras")
        return Lora(name, strength, expert)

    def _created(
        self, prompt: str, fields: dict[str, Any], settings: dict[str, Any]
    ) -> VideoRequest:
        loop = fields.get("loop", False)
        num_frames = self._length(fields, loop)
        shots = tuple(Shot(**shot) for shot in fields.get("shots", ()))
        settings |= {"loop": loop, "shots": shots, "num_frames": num_frames}
        strength = fields.get("strength")
        reference = fields.get("input_reference")
        if reference is None:
            request = VideoRequest(prompt, strength=strength, **settings)
        elif self._is_clip(reference):
            if num_frames is None:
                settings.pop("num_frames")
            more = {} if strength is None else {"strength": strength}
            clip = self._frames(reference)
            request = tasks.edit(self._model, clip, prompt, **more, **settings)
        else:
            if strength is not None:
                raise bad_value("strength: it is of a clip; the first frame is taken whole")
            request = tasks.animate(self._model, self._frames(reference), prompt, **settings)
        if "clips" in fields:
            placed = tuple(self._clip(clip, request) for clip in fields["clips"])
            request = replace(request, clips=(*request.clips, *placed))
        if "init" in fields:
            request = replace(request, init=self._frames(fields["init"]), strength=strength)
        return request

    def _length(self, fields: dict[str, Any], loop: bool) -> int | None:
        if "num_frames" in fields or "seconds" not in fields:
            return fields.get("num_frames")
        fps = fields.get("fps", self._model.defaults.fps)
        frames = max(1, round(fields["seconds"] * fps))
        time = self._model.grid.time
        return -(-frames // time) * time if loop else frames

    def _edited(
        self, prompt: str, fields: dict[str, Any], settings: dict[str, Any]
    ) -> VideoRequest:
        clip = self._frames(fields["video"])
        given = [name for name in ("strength", "mask", "missing") if name in fields]
        if len(given) > 1:
            raise bad_value(f"{given[1]}: {given[0]} is given too; leave one out", given[1])
        if "mask" in fields:
            mask = self._path(fields["mask"]["upload"])
            return tasks.inpaint(self._model, clip, mask, prompt, **settings)
        if "missing" in fields:
            missing = tasks.parse_ranges(fields["missing"])
            return tasks.fill(self._model, clip, missing, prompt, **settings)
        more = {"strength": fields["strength"]} if given else {}
        return tasks.edit(self._model, clip, prompt, **more, **settings)

    def _frames(self, media: Mapping[str, Any]) -> Path | Footage:
        path = self._path(media["upload"])
        if media.get("start") or media.get("stop") is not None:
            return Footage(path, media.get("start", 0), media.get("stop"))
        return path

    def _is_clip(self, media: Mapping[str, Any]) -> bool:
        """Whether it has more than one frame."""
        from sora_engine.io.video_reader import measure_video

        return measure_video(self._path(media["upload"]), stop=2)[0] > 1

    def _clip(self, media: Mapping[str, Any], request: VideoRequest) -> Clip:
        frames, at = self._frames(media), media.get("at", 0)
        if "mask" not in media:
            return Clip(frames, at=at)
        defaults = self._model.defaults
        size = request.height or defaults.height, request.width or defaults.width
        fps = request.fps or defaults.fps
        from sora_engine.request.source import measure

        settings = {"fps": fps}
        made_anew = read_mask(
            self._path(media["mask"]["upload"]),
            num_frames=measure(self._model, frames, settings).num_frames,
            clip_size=size,
            size=size,
            fps=fps,
        )
        return Clip(frames, at=at, mask=~made_anew)

    def _noise(self, text: str, request: VideoRequest) -> torch.Tensor:
        import torch

        resolved = self._resolve(request)
        shape = self._model.grid.shape(
            resolved.canvas_height,
            resolved.canvas_width,
            resolved.canvas_frames,
            loop=resolved.loop,
        )
        try:
            data = np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        except (binascii.Error, ValueError) as error:
            raise bad_value(f"latents must be base64 of float32: {error}", "latents") from error
        if data.size != np.prod(shape) or not np.isfinite(data).all():
            raise bad_value(
                f"latents must be {int(np.prod(shape))} finite numbers of shape {list(shape)}, "
                f"got {data.size}",
                "latents",
            )
        return torch.from_numpy(data.reshape(shape).astype(np.float32))
