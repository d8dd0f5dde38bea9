"""From the body of a request to a job: its files are kept, its fields checked, its job accepted."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import io
import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, get_args

from pydantic import ValidationError

from sora_engine.denoise.denoise import num_steps
from sora_engine.errors import MediaError
from sora_engine.serve.failures import ApiError, bad_value, message_of
from sora_engine.serve.form import Form, read_form
from sora_engine.serve.replies import Plan
from sora_engine.serve.service import Service, owner_of, service_of
from sora_engine.serve.store import Mismatch, Row
from sora_engine.serve.tracing import TRACEPARENT
from sora_engine.serve.translate import Stored, remixed, repeated, stored_of
from sora_engine.serve.wire import Body, Media, Sampling

if TYPE_CHECKING:
    from fastapi import Request

    from sora_engine.serve.desk import Desk

B = TypeVar("B", bound=Body)

REMIX_STRENGTH = 0.6
"""As of `tasks.edit`."""


@dataclass(frozen=True, slots=True)
class Order:
    """What a client asks for. task: of `translate`. model: of its body. source: the id of the video
    that it starts from, where its path names one. again: its own request is made again, from what
    it became. refine: at the size that it was a draft of. repeat: its own request is made again as
    it was, whatever became of it."""

    task: str
    model: type[Sampling]
    source: str | None = None
    again: bool = False
    refine: bool = False
    repeat: bool = False
    kind: str = "video"


async def place(request: Request, order: Order) -> Row:
    """Accept the job that a request asks for; ApiError, and what the engine raises, where not."""
    service, owner = service_of(request), owner_of(request)
    desk = service.desk
    key = _idempotency_key(request)
    form = await read_form(request)
    try:
        clerk = Clerk(service, desk, owner, request.headers.get("traceparent"))
        return await asyncio.to_thread(clerk.place, order, form, key)
    finally:
        await form.close()


async def propose(request: Request, order: Order) -> Plan:
    """What the job that a request asks for would take; raises as `place`."""
    service, owner = service_of(request), owner_of(request)
    desk = service.desk
    form = await read_form(request)
    try:
        clerk = Clerk(service, desk, owner)
        return await asyncio.to_thread(clerk.propose, order, form)
    finally:
        await form.close()


async def read(request: Request, model: type[B]) -> B:
    """The body of a request that brings no files."""
    form = await read_form(request)
    await form.close()
    if form.files:
        name = next(iter(form.files))
        raise bad_value(f"{name}: no file is read here", name)
    return checked(model, form.fields)


def checked(model: type[B], fields: dict[str, Any]) -> B:
    """The body that has these fields; ApiError 400 names the first that is wrong."""
    for name, value in fields.items():
        known = model.model_fields.get(name)
        if isinstance(value, bool) and known is not None and not _may_be_bool(known.annotation):
            raise bad_value(f"{name}: {str(value).lower()} is neither a number nor a text", name)
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part)[:80] for part in first["loc"])
        param = str(first["loc"][0])[:80] if first["loc"] else None
        said = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            said = "there is no such parameter"
        raise bad_value(f"{where}: {said}" if where else said, param) from error


def _may_be_bool(annotation: Any) -> bool:
    """Whether a field takes true or false; pydantic takes them for 1 and 0 elsewhere."""
    return annotation is bool or any(
        isinstance(part, bool) or _may_be_bool(part) for part in get_args(annotation)
    )


class Clerk:
    """Takes one client's orders. Its methods may take a second, and are for threads."""

    def __init__(
        self, service: Service, desk: Desk, owner: str, traceparent: str | None = None
    ) -> None:
        """traceparent: of W3C Trace Context, where the client is part of a trace."""
        self._trace = {}
        if traceparent is not None and TRACEPARENT.fullmatch(traceparent):
            self._trace = {"traceparent": traceparent}
        self._service, self._desk, self._owner = service, desk, owner
        self._files = service.files
        self._prompt: str | None = None

    def place(self, order: Order, form: Form, key: str | None) -> Row:
        """Accept a job."""
        stored, body, facts = self.read(order, form)
        told = json.dumps(
            [order.task, order.source, order.again, order.repeat, stored], sort_keys=True
        )
        idempotency = None if key is None else (key, hashlib.sha256(told.encode()).hexdigest())
        try:
            return self._desk.create(
                self._owner,
                stored,
                {**facts, **self._trace, "priority": body.priority, "deadline_s": body.deadline_s},
                kind=order.kind,
                idempotency=idempotency,
            )
        except Mismatch as error:
            raise ApiError(
                400,
                "idempotency_mismatch",
                "this Idempotency-Key came with another body before; a new key would work",
            ) from error

    def propose(self, order: Order, form: Form) -> Plan:
        """What a job would take."""
        stored, _, _ = self.read(order, form)
        resolved, promise = self._desk.admission.plan(stored)
        waiting, _ = self._desk.counts
        return Plan(
            size=f"{resolved.width}x{resolved.height}",
            num_frames=resolved.num_frames,
            fps=resolved.fps,
            seconds=f"{resolved.num_frames / resolved.fps:g}",
            num_steps=num_steps(resolved, self._desk.engine.model.grid),
            canvas=resolved.canvas,
            peak_memory_mb=None if promise is None else round(promise.peak / (1 << 20), 3),
            queue_position=waiting,
            eta_s=self._desk.pace.eta_s(resolved),
        )

    def read(self, order: Order, form: Form) -> tuple[Stored, Sampling, dict[str, Any]]:
        """What is stored of an order, its body, and what its job's answers tell of it."""
        source = None
        if order.source is not None:
            source = self._own(order.source) if order.repeat else self._completed(order.source)
        fields = dict(form.fields)
        for name, file in form.files.items():
            if name in fields:
                raise bad_value(f"{name} is given as a file and as a field; leave one out", name)
            if name not in order.model.model_fields:
                raise bad_value(f"{name}: there is no such parameter", name)
            fields[name] = {"upload": f"upload_{self._kept(file.file, name)}"}
        body = checked(order.model, fields)
        self._check_names(body)
        facts: dict[str, Any] = {"model": body.model or self._desk.engine.model.name}
        if source is None:
            stored = stored_of(order.task, body, self._keep)
        elif order.repeat:
            stored = repeated(source.body, body)
        else:
            media = self._keep(Media(video_id=source.id), "video")
            if order.again:
                stored = remixed(source.body, media, body, REMIX_STRENGTH)
                facts["remixed_from"] = source.id
                if order.refine:
                    _undrafted(stored)
            else:
                stored = stored_of(order.task, body, self._keep)
                stored["fields"]["video"] = media
        stored["fields"].setdefault("prompt", self._prompt or "")
        length = stored["fields"]
        if order.task == "create" and "seconds" in length and "num_frames" not in length:
            facts["seconds"] = f"{length['seconds']:g}"
        return stored, body, facts

    def _check_names(self, body: Sampling) -> None:
        settings, name = self._service.settings, self._desk.engine.model.name
        if body.model is not None and body.model not in (name, *settings.aliases):
            raise ApiError(400, "model_not_found", f"model: this server has {name}", param="model")
        most = self._service.most_priority(self._owner)
        if body.priority > most:
            raise bad_value(f"priority: at most {most} here", "priority")

    def _keep(self, media: Media, name: str) -> dict[str, Any]:
        if media.upload is not None:
            sha256 = media.upload.removeprefix("upload_")
            path = self._files.upload(sha256)
            if path.is_file():
                path.touch()  # it is kept for as long again
            elif (elsewhere := self._service.neighbours.upload(sha256)) is not None:
                self._files.keep_file(elsewhere)
            else:
                raise bad_value(f"{name}: there is no such upload", name)
        elif media.video_id is not None:
            found = self._service.neighbours.result(self._owner, media.video_id)
            if found is None:
                row = self._completed(media.video_id, name)
                folder, prompt = self._files.video(row.id), row.facts.get("prompt")
            else:
                folder, prompt = found.folder, found.prompt
            if self._prompt is None:
                self._prompt = prompt
            try:
                sha256 = self._files.keep_file(folder / "video.mp4")
            except FileNotFoundError:
                raise bad_value(f"{name}: there is no such video", name) from None
        else:
            assert media.image_url is not None
            sha256 = self._named(media.image_url, name)
        kept: dict[str, Any] = {"upload": sha256}
        if media.start:
            kept["start"] = media.start
        if media.stop is not None:
            kept["stop"] = media.stop
        return kept

    def _named(self, url: str, name: str) -> str:
        """What an address holds, kept: a data URL, or another where the operator allows that."""
        fetcher = self._service.fetcher
        if fetcher is None or url.startswith("data:"):
            return self._kept(io.BytesIO(_data_of(url, name)), name)
        with tempfile.TemporaryFile(dir=self._files.tmp) as file:
            try:
                fetcher.fetch(url, file)
            except MediaError as error:
                raise ApiError(400, "unreadable_media", f"{name}: {error}", param=name) from error
            file.seek(0)
            return self._kept(file, name)

    def _own(self, name: str) -> Row:
        return self._desk.row(self._owner, name, "video")

    def _completed(self, name: str, param: str | None = None) -> Row:
        row = self._own(name)
        if row.state != "completed":
            raise ApiError(
                400, "video_not_completed", f"the video is {row.state}, not completed", param=param
            )
        return row

    def _kept(self, source: BinaryIO, name: str) -> str:
        """A client's file, kept under its hash once it is known to be a picture or a clip."""

        def check(path: Path) -> None:
            try:
                self._service.verify(path)
            except MediaError as error:
                told = message_of(error, {str(path): "the file", **self._service.hidden})
                raise ApiError(400, "unreadable_media", f"{name}: {told}", param=name) from error

        return self._files.keep_upload(source, check)


def _undrafted(stored: Stored) -> None:
    if not stored["fields"].pop("draft", False):
        raise bad_value("the video is no draft: it was not created with draft")


def _idempotency_key(request: Request) -> str | None:
    key = request.headers.get("idempotency-key")
    if key is not None and not re.fullmatch(r"[\x21-\x7e]{1,255}", key):
        raise bad_value("Idempotency-Key: 1 to 255 printable characters would work")
    return key


def _data_of(url: str, name: str) -> bytes:
    """The bytes of a data URL; no other is followed."""
    head, comma, data = url.partition(",")
    if not re.fullmatch(r"data:(image|video)/[a-z0-9.+-]{1,40};base64", head) or not comma:
        raise bad_value(f"{name}: no address is followed; a data URL or a file would do", name)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_value(f"{name}: the data URL is no base64: {error}", name) from error
