"""Grids of a packed batch: segments are videos of frames x rows x columns tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Grid = tuple[int, int, int]


def check_grids(
    op: str, name: str, flat: Sequence[int], offsets: list[int] | None = None
) -> list[Grid]:
    """The flattened grids as triples, each with as many tokens as its segment (CPU alone)."""
    if len(flat) % 3 or any(extent < 0 for extent in flat):
        raise ValueError(f"{op}: {name} {list(flat)}; (frames, rows, columns) a segment is due")
    if not flat:
        raise ValueError(f"{op}: {name} is [], an empty batch; one grid or more is due")
    grids = [(flat[i], flat[i + 1], flat[i + 2]) for i in range(0, len(flat), 3)]
    if offsets is None:
        return grids
    if len(grids) != len(offsets) - 1:
        raise ValueError(f"{op}: {len(grids)} {name} for {len(offsets) - 1} segments")
    for i, (t, h, w) in enumerate(grids):
        if t * h * w != offsets[i + 1] - offsets[i]:
            raise ValueError(
                f"{op}: grid {t}x{h}x{w} of segment {i} has {t * h * w} tokens, "
                f"the segment {offsets[i + 1] - offsets[i]}"
            )
    return grids


def flatten(op: str, grids: Sequence[Sequence[int]]) -> list[int]:
    """Grids as one list of ints, which is what crosses `torch.ops`."""
    flat: list[int] = []
    for grid in grids:
        if len(grid) != 3:
            raise ValueError(f"{op}: grid {tuple(grid)}; (frames, rows, columns) is due")
        flat += (int(extent) for extent in grid)
    return flat


def starts_of(grids: Sequence[Grid]) -> list[int]:
    """The first token of each grid, and the number of tokens at the end."""
    starts = [0]
    for t, h, w in grids:
        starts.append(starts[-1] + t * h * w)
    return starts


def check_tokens(op: str, grids: Sequence[Grid], tokens: Tensor) -> None:
    total = starts_of(grids)[-1]
    if total != tokens.shape[0]:
        raise ValueError(f"{op}: the grids have {total} tokens, the tensor {tokens.shape[0]}")
