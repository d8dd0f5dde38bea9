"""Quantised weights of safetensors files as the values that they stand for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import Weights
from sora_engine.io.weights.codings import Coding, Scaled
from sora_engine.io.weights.source import Kept, Stored, kept_format_of, read_by_pieces


@dataclass(frozen=True, slots=True)
class Decoded:
    """What decoding gives."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    is_plain: bool = False


class DequantisedWeights:
    """A `WeightSource` over safetensors files.

    codings: by name the weights that are decoded; the others come as they are. hidden: scales and
    marks, which are no weights.
    """

    def __init__(self, weights: Weights, codings: Mapping[str, Coding], hidden: set[str]) -> None:
        self.weights, self.codings, self._hidden = weights, dict(codings), hidden

    @property
    def path(self) -> Path:
        return self.weights.path

    def __iter__(self) -> Iterator[str]:
        return (name for name in self.weights if name not in self._hidden)

    def __contains__(self, name: object) -> bool:
        return name in self.weights and name not in self._hidden

    def __len__(self) -> int:
        return len(self.weights) - len(self._hidden)

    def info(self, name: str) -> Stored:
        coding = self.codings.get(name)
        return self.weights.info(self._own(name)) if coding is None else Decoded(coding.shape)

    def path_of(self, name: str) -> Path:
        return self.weights.path_of(self._own(name))

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """See `WeightSource.read`."""
        coding = self.codings.get(name)
        if coding is None:
            return self.weights.read(self._own(name), device=device, dtype=dtype, rows=rows)
        decoder = partial(coding.decoder, self.weights, device)
        return read_by_pieces(coding.shape, decoder, device=device, dtype=dtype, rows=rows)

    def kept_format(self, name: str) -> str | None:
        """See `WeightSource`: int8 and fp8 with scales, and fp8 that stands for itself."""
        coding = self.codings.get(name)
        if coding is None:
            return self.weights.kept_format(self._own(name))
        if not isinstance(coding, Scaled) or len(coding.shape) != 2:
            return None
        return str(self.weights.info(coding.weight).dtype).removeprefix("torch.")

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """See `WeightSource`."""
        coding = self.codings.get(name)
        if coding is None:
            return self.weights.read_kept(self._own(name), device=device)
        form = kept_format_of(self, name)
        assert isinstance(coding, Scaled)  # no other has such a format
        scale = coding.read_scale(self.weights, device)
        scale = scale.reshape((coding.shape[0], -1) if coding.blocks else (1, 1))
        weight = self.weights.read(coding.weight, device=device)
        return Kept(form, weight, scale, coding.rotation)

    def close(self) -> None:
        self.weights.close()

    def __enter__(self) -> DequantisedWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _own(self, name: str) -> str:
        if name in self._hidden:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return name
