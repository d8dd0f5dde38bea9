"""What crosses between an engine and its ranks: whole, typed, and never more than that."""

from __future__ import annotations

import json
import socket
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from sora_engine.config import Limits
from sora_engine.distributed.message import Connection, Message, MessageError
from sora_engine.distributed.wire import request_from_message, request_to_message
from sora_engine.request import Clip, Guidance, Shot, VideoRequest, WindowPlan, resolve_request
from tests.distributed.tiny import tiny_model


@pytest.fixture
def ends():
    a, b = socket.socketpair()
    b.settimeout(10)
    yield Connection(a), Connection(b)
    a.close()
    b.close()


def test_messages_cross_whole(ends):
    a, b = ends
    tensors = {
        "x": torch.randn(3, 4).to(torch.bfloat16),
        "y": torch.arange(6).view(2, 3).T,  # not contiguous
        "none": torch.empty(0, 5),
        "flag": torch.tensor(True),
    }
    a.send(Message("do", {"n": [1, 2.5, None, "a\u20ac"]}, tensors))
    a.send(Message("more"))
    got = b.receive()
    assert (got.kind, got.fields) == ("do", {"n": [1, 2.5, None, "a\u20ac"]})
    assert list(got.tensors) == list(tensors)
    for name, tensor in tensors.items():
        assert got.tensors[name].dtype == tensor.dtype
        assert torch.equal(got.tensors[name], tensor)
    assert b.receive().kind == "more"


@pytest.mark.parametrize(
    "header",
    [
        b"\x80\x04K\x01.",  # a pickle
        b"[]",
        b'["a", {}, [["x", "object", [1]]]]',
        b'["a", {}, [["x", "float32", [-1]]]]',
        b'["a", {}, [["x", "float32", [99999999, 99999999]]]]',
        b'["a", [], []]',
        b"\xff\xff",
    ],
)
def test_rubbish_is_refused(ends, header):
    a, b = ends
    a.socket.sendall(struct.pack("<I", len(header)) + header)
    with pytest.raises(MessageError):
        b.receive()


def test_a_header_without_bounds_is_refused(ends):
    a, b = ends
    a.socket.sendall(struct.pack("<I", 2**32 - 1))
    with pytest.raises(MessageError, match="a header of 4294967295 bytes"):
        b.receive()


def test_an_end_is_an_end(ends):
    a, b = ends
    a.socket.sendall(struct.pack("<I", 10) + b"[")
    a.close()
    with pytest.raises(EOFError):
        b.receive()


def test_every_field_of_a_request_crosses(ends, tmp_path):
    a, b = ends
    model = tiny_model()
    Image.new("RGB", (40, 24), (200, 10, 30)).save(tmp_path / "red.png")
    mask = np.zeros((24, 40), bool)
    mask[:8] = True
    request = VideoRequest(
        prompt="",
        negative_prompt="dull",
        num_frames=5,
        fps=12,
        guidance_scale=2.0,
        guidance_scale_2=3.0,
        shift=2.5,
        sigmas=[0.9, 0.5],
        solver="euler",
        seed=2**40,
        clips=[
            Clip(tmp_path / "red.png", at=0),
            Clip(Image.new("RGB", (80, 48)), at=2, mask=mask),
        ],
        init=np.full((5, 24, 40, 3), 9, np.uint8),
        strength=0.5,
        shots=[Shot("x", 2), Shot("y", 3)],
        window=WindowPlan(2, 1, weights="flat"),
        latents=torch.randn(4, 3, 6, 10),
        guidance=Guidance(kind="apg", eta=0.3, momentum=-0.5),
        camera="pan left, zoom in",
    )
    resolved = resolve_request(request, model, Limits())
    a.send(request_to_message("prepare", resolved))
    message = b.receive()
    assert str(tmp_path) not in json.dumps(message.fields)  # frames cross, not paths
    got = request_from_message(message)
    for name in resolved.__dataclass_fields__:
        if name not in ("clips", "init", "latents"):
            assert getattr(got, name) == getattr(resolved, name), name
    assert torch.equal(got.latents, request.latents)
    assert np.array_equal(got.init, request.init)
    assert [clip.at for clip in got.clips] == [0, 2]
    assert (got.clips[0].frames == (200, 10, 30)).all()
    assert got.clips[0].frames.shape == got.clips[1].frames.shape == (1, 24, 40, 3)
    assert np.array_equal(got.clips[1].mask, mask)
