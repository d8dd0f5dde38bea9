"""Frames decoded over ranks, split in rows, are those of one rank."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize(
    ("ranks", "shape", "residual", "wraps"),
    [
        (2, (3, 6, 5), False, False),
        (3, (2, 7, 4), False, False),  # uneven
        (4, (2, 3, 4), False, False),  # more ranks than rows
        (2, (3, 5, 3), True, False),  # the layout of Wan 2.2
        (3, (2, 4, 3), False, True),  # a loop: ranks agree on when it closes
    ],
)
def test_frames_are_those_of_one_rank(fleet, ranks, shape, residual, wraps):
    made = fleet.run(
        "decoding", layout={"ring": ranks}, shape=shape, residual=residual, wraps=wraps
    )
    active = [rank for rank in made[:ranks] if rank["rows"]]
    assert len(active) == min(ranks, shape[1])
    assert sum(rank["rows"] for rank in active) == shape[1] * (8 if residual else 4)
    assert all(rank["levels"] > 30 for rank in active)  # no flat picture: an error would show
    assert all(rank["equal"] for rank in active), [rank["error"] for rank in active]
    assert all(rank["sent"] > 0 for rank in active)
