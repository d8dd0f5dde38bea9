"""Messages between an engine and its ranks: JSON and raw tensors over a socket, never pickle.

A message is a 4-byte length, that many bytes of JSON, and the bytes of its tensors one after the
other, as the JSON's `tensors` list describes them (name, dtype, shape).
"""

from __future__ import annotations

import json
import math
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

MAX_HEADER_BYTES = 64 * 2**20
MAX_TENSOR_BYTES = 2**40
_LENGTH = struct.Struct("<I")
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.uint8, torch.bool),
    )
}


class MessageError(ConnectionError):
    """What came is no message of this format."""


@dataclass(slots=True)
class Message:
    """kind: what is asked or told; fields: JSON values; tensors: on the host, by name."""

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Connection:
    """One end of a socket that carries messages. Sending is for any thread, receiving for one."""

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self._lock = threading.Lock()

    def fileno(self) -> int:
        return self.socket.fileno()

    @property
    def closed(self) -> bool:
        return self.socket.fileno() < 0

    def send(self, message: Message) -> None:
        """Raises OSError where the other end is gone."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in message.tensors.items()}
        described = [[name, _name_of(x.dtype), list(x.shape)] for name, x in tensors.items()]
        header = json.dumps([message.kind, message.fields, described]).encode()
        with self._lock:
            self.socket.sendall(_LENGTH.pack(len(header)) + header)
            for tensor in tensors.values():
                if tensor.numel():
                    self.socket.sendall(_bytes_of(tensor))

    def receive(self) -> Message:
        """The next message. EOFError where the other end closed, MessageError for rubbish."""
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > MAX_HEADER_BYTES:
            raise MessageError(f"a header of {length} bytes; at most {MAX_HEADER_BYTES}")
        try:
            kind, fields, described = json.loads(bytes(self._read(length)))
            if not isinstance(kind, str) or not isinstance(fields, dict):
                raise ValueError("no kind, or no fields")
            shapes = [(str(n), _DTYPES[d], [int(i) for i in shape]) for n, d, shape in described]
        except (ValueError, KeyError, TypeError) as error:
            raise MessageError(f"no message: {error}") from None
        tensors = {}
        for name, dtype, shape in shapes:
            size = math.prod(shape) * dtype.itemsize
            if min(shape, default=0) < 0 or size > MAX_TENSOR_BYTES:
                raise MessageError(f"tensor {name} of shape {shape}")
            tensor = torch.empty(shape, dtype=dtype)
            if size:
                self._read_into(_bytes_of(tensor))
            tensors[name] = tensor
        return Message(kind, fields, tensors)

    def close(self) -> None:
        self.socket.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        self._read_into(memoryview(data))
        return data

    def _read_into(self, view: memoryview) -> None:
        while view:
            count = self.socket.recv_into(view)
            if count == 0:
                raise EOFError("the other end closed")
            view = view[count:]


def _name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in _DTYPES:
        raise ValueError(f"{dtype} does not cross; {', '.join(_DTYPES)} do")
    return name


def _bytes_of(tensor: Tensor) -> memoryview:
    """A view of a contiguous tensor's bytes."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
