"""Requests and canvases as messages. Of a request every field, and nothing that is not one.

Pictures cross as the frames that they hold, read on the engine's side: ranks open no file that a
request names.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.distributed.message import Message
from sora_engine.request import Clip, Guidance, ResolvedRequest, Shot, SparsePlan, WindowPlan
from sora_engine.request.camera import CameraPath
from sora_engine.request.frames import load_frames
from sora_engine.request.lora import LoraRecord

PLANS: dict[str, type[WindowPlan] | type[SparsePlan]] = {
    "WindowPlan": WindowPlan,
    "SparsePlan": SparsePlan,
}
_PLAIN = (bool, int, float, str, type(None))


def request_to_message(kind: str, request: ResolvedRequest) -> Message:
    """Raises RequestError or MediaError for frames that cannot be read."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}

    def frames(name: str, given: Any, what: str) -> None:
        loaded = load_frames(given, request.height, request.width, request.fps, what)
        tensors[name] = torch.from_numpy(np.ascontiguousarray(loaded))

    for name in (f.name for f in fields(request)):
        value = getattr(request, name)
        if name == "clips":
            for i, clip in enumerate(value):
                frames(f"clip.{i}", clip.frames, "clip")
                if clip.mask is not None:
                    tensors[f"mask.{i}"] = torch.from_numpy(np.ascontiguousarray(clip.mask))
            values[name] = [clip.at for clip in value]
        elif name == "init":
            if value is not None:
                frames("init", value, "start video")
        elif name == "latents":
            if value is not None:
                tensors["latents"] = value
        elif name == "shots":
            values[name] = [asdict(shot) for shot in value]
        elif name == "guidance":
            values[name] = asdict(value)
        elif name == "window":
            values[name] = None if value is None else [type(value).__name__, asdict(value)]
        elif name == "camera":
            values[name] = None if value is None else value.to_json()
        elif name == "loras":
            values[name] = [record.to_json() for record in value]
        elif name == "sigmas":
            values[name] = None if value is None else list(value)
        elif isinstance(value, _PLAIN):
            values[name] = value
        else:
            raise TypeError(f"ResolvedRequest.{name} = {value!r} has no form as a message")
    return Message(kind, {"request": values}, tensors)


def request_from_message(message: Message) -> ResolvedRequest:
    """The request that `request_to_message` wrote."""
    values, tensors = dict(message.fields["request"]), message.tensors
    values["clips"] = tuple(
        Clip(tensors[f"clip.{i}"].numpy(), at, _optional_numpy(tensors.get(f"mask.{i}")))
        for i, at in enumerate(values["clips"])
    )
    init = tensors.get("init")
    values["init"] = None if init is None else init.numpy()
    values["latents"] = tensors.get("latents")
    values["shots"] = tuple(Shot(**shot) for shot in values["shots"])
    values["guidance"] = Guidance(**values["guidance"])
    if values["window"] is not None:
        kind, plan = values["window"]
        values["window"] = PLANS[kind](**plan)
    values["sigmas"] = None if values["sigmas"] is None else tuple(values["sigmas"])
    values["camera"] = CameraPath.from_json(values["camera"])
    values["loras"] = tuple(LoraRecord(**record) for record in values["loras"])
    return ResolvedRequest(**values)


def _optional_numpy(tensor: Tensor | None) -> np.ndarray | None:
    return None if tensor is None else tensor.numpy()


_STATE = "canvas."


def state_to_message(
    kind: str, state: CanvasState, request: ResolvedRequest | None = None
) -> Message:
    """The state of a canvas, and the request that it is of, where that is not known."""
    message = Message(kind) if request is None else request_to_message(kind, request)
    message.fields["frame_texts"] = list(state.frame_texts)
    message.tensors |= {_STATE + name: tensor.cpu() for name, tensor in state.tensors.items()}
    return message


def state_from_message(message: Message) -> CanvasState:
    """The state that a message brings."""
    tensors = {
        name.removeprefix(_STATE): tensor
        for name, tensor in message.tensors.items()
        if name.startswith(_STATE)
    }
    return CanvasState(tensors, tuple(message.fields["frame_texts"]))
