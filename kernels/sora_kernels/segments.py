"""Segments of a packed batch on the host: offsets, and runs of equal segments."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Run(NamedTuple):
    """`segments` consecutive segments, from number `first`, that all have `q_len` queries and
    `k_len` keys, and padding beside them or none."""

    q_start: int
    k_start: int
    q_len: int
    k_len: int
    segments: int
    first: int
    padded: bool = False

    @property
    def q_stop(self) -> int:
        return self.q_start + self.q_len * self.segments

    @property
    def k_stop(self) -> int:
        return self.k_start + self.k_len * self.segments


def offsets_of(cu_seqlens: torch.Tensor) -> list[int]:
    """The offsets as Python ints. On a device this waits for it."""
    return cu_seqlens.tolist()


def equal_runs(
    q_offsets: list[int], k_offsets: list[int], padding: list[int] | None = None
) -> list[Run]:
    """Join consecutive segments of equal lengths: each run is one dense batch.

    A uniform batch is a single run, and serves without a loop over segments. padding: keys of
    padding of each segment.
    """
    runs: list[Run] = []
    for i in range(len(q_offsets) - 1):
        q_len = q_offsets[i + 1] - q_offsets[i]
        k_len = k_offsets[i + 1] - k_offsets[i]
        padded = padding is not None and padding[i] > 0
        last = runs[-1] if runs else None
        if last is not None and (last.q_len, last.k_len, last.padded) == (q_len, k_len, padded):
            runs[-1] = last._replace(segments=last.segments + 1)
        else:
            runs.append(Run(q_offsets[i], k_offsets[i], q_len, k_len, 1, i, padded))
    return runs


def batched(tensor: torch.Tensor, start: int, length: int, count: int) -> torch.Tensor:
    """A run of a packed tensor as a view.

    tensor: `[tokens, heads, head_dim]`; returns `[count, heads, length, head_dim]`.
    """
    part = tensor.narrow(0, start, length * count)
    return part.unflatten(0, (count, length)).transpose(1, 2)
