"""Weights out of others: some of them, under other names, or those of several sources as one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.source import Kept, Stored, WeightSource, kept_format_of


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor that is stored otherwise: as rows of a larger one, or with further dimensions of 1.

    rows: of the stored first dimension; None for all. squeezed: without its leading ones.
    """

    name: str
    rows: range | None = None
    squeezed: bool = False


@dataclass(frozen=True, slots=True)
class _Described:
    dtype: torch.dtype
    shape: tuple[int, ...]
    is_plain: bool


class SelectedWeights:
    """Some weights of a source, by new names.

    names: by each new name the one in the source, or a part of one.
    """

    def __init__(self, source: WeightSource, names: Mapping[str, str | Part]) -> None:
        self.source, self._names = source, dict(names)

    @property
    def path(self) -> Path:
        return self.source.path

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def info(self, name: str) -> Stored:
        own = self._own(name)
        if isinstance(own, str):
            return self.source.info(own)
        whole = self.source.info(own.name)
        shape = whole.shape if own.rows is None else (len(own.rows), *whole.shape[1:])
        while own.squeezed and len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        return _Described(whole.dtype, shape, whole.is_plain)

    def path_of(self, name: str) -> Path:
        own = self._own(name)
        return self.source.path_of(own if isinstance(own, str) else own.name)

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """See `WeightSource.read`."""
        own = self._own(name)
        if isinstance(own, str):
            return self.source.read(own, device=device, dtype=dtype, rows=rows)
        if own.squeezed:
            whole = self.source.read(own.name, device=device, dtype=dtype, rows=own.rows)
            whole = whole.view(self.info(name).shape)
            return whole if rows is None else whole[rows.start : rows.stop].clone()
        part = own.rows
        if rows is not None:
            part = rows if part is None else part[rows.start : rows.stop]
        return self.source.read(own.name, device=device, dtype=dtype, rows=part)

    def kept_format(self, name: str) -> str | None:
        """See `WeightSource`: whole matrices, under whichever name."""
        own = self._own(name)
        return self.source.kept_format(own) if isinstance(own, str) else None

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """See `WeightSource`."""
        kept_format_of(self, name)
        own = self._own(name)
        assert isinstance(own, str)  # parts of tensors have no such format
        return self.source.read_kept(own, device=device)

    def close(self) -> None:
        self.source.close()

    def __enter__(self) -> SelectedWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _own(self, name: str) -> str | Part:
        if name not in self._names:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return self._names[name]


class JoinedWeights:
    """The weights of several sources, each name in one of them. Raises CheckpointError."""

    def __init__(self, sources: Sequence[WeightSource]) -> None:
        self.sources = tuple(sources)
        self._source_of: dict[str, WeightSource] = {}
        for source in self.sources:
            for name in source:
                other = self._source_of.setdefault(name, source)
                if other is not source:
                    raise CheckpointError(
                        f"tensor {name!r} is also in {other.path.name}",
                        path=source.path_of(name),
                        tensor=name,
                    )

    @property
    def path(self) -> Path:
        return self.sources[0].path

    def __iter__(self) -> Iterator[str]:
        return iter(self._source_of)

    def __contains__(self, name: object) -> bool:
        return name in self._source_of

    def __len__(self) -> int:
        return len(self._source_of)

    def info(self, name: str) -> Stored:
        return self._source(name).info(name)

    def path_of(self, name: str) -> Path:
        return self._source(name).path_of(name)

    def read(
        self,
        name: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        rows: range | None = None,
    ) -> Tensor:
        """See `WeightSource.read`."""
        return self._source(name).read(name, device=device, dtype=dtype, rows=rows)

    def kept_format(self, name: str) -> str | None:
        """See `WeightSource`."""
        return self._source(name).kept_format(name)

    def read_kept(self, name: str, *, device: torch.device | str = "cpu") -> Kept:
        """See `WeightSource`."""
        return self._source(name).read_kept(name, device=device)

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def __enter__(self) -> JoinedWeights:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _source(self, name: str) -> WeightSource:
        if name not in self._source_of:
            raise CheckpointError(f"no tensor {name!r}", path=self.path, tensor=name)
        return self._source_of[name]


COMPANIONS = ("text_encoders.", "vae.", "first_stage_model.", "clip_vision.", "conditioner.")
"""Prefixes under which an all-in-one file has the parts that are not asked for."""


def under_prefix(source: WeightSource, prefixes: Sequence[str]) -> WeightSource:
    """The weights under the first of `prefixes` that a file has, without it; `source` itself where
    it has none. An all-in-one file's other parts are left out; what is of no known part stays, and
    keeps its name."""
    prefix = next((p for p in prefixes if any(name.startswith(p) for name in source)), "")
    if not prefix:
        return source
    others = tuple(p for p in (*COMPANIONS, "model.diffusion_model.") if p != prefix)
    kept = [n for n in source if n.startswith(prefix) or not n.startswith(others)]
    return SelectedWeights(source, {name.removeprefix(prefix): name for name in kept})
