"""Final latents do not depend on the ranks: every layout against one rank, at fp32."""

from __future__ import annotations

import pytest

from sora_engine.config import ParallelConfig
from sora_engine.distributed.layout import check_devices, check_heads, check_world, layouts
from sora_engine.errors import LayoutError
from tests.distributed.cases import REQUESTS

FIVE_HEADS = 5

# Each request meets each kind of layout, and each layout several requests.
QUICK = [
    ({"ulysses": 2}, "guided mixed sparse"),
    ({"ring": 2}, "loop moving sparse"),
    ({"guidance": 2}, "shots"),
    ({"ulysses": 2, "window": 2}, "camera"),
    ({"window": 2}, "windows"),
    ({"ulysses": 3}, "prime"),
    ({"ring": 3}, "few mixed camera"),
    ({"window": 3}, "windowed loop"),
    ({"ulysses": 4}, "prime guided windows"),
    ({"ring": 4}, "prime shots"),
    ({"ulysses": 2, "ring": 2}, "mixed few"),
    ({"ring": 2, "guidance": 2}, "mixed loop"),
    ({"ulysses": 2, "guidance": 2, "window": 2}, "mixed windows prime few sparse"),
    ({"ulysses": 4, "ring": 2}, "mixed moving sparse"),
    ({"ring": 8}, "guided sparse"),
    ({"ulysses": 2, "ring": 2, "window": 2}, "windowed loop"),
]


def check(fleet, layout, request, **arguments):
    ranks = fleet.run("denoise", layout=layout, request=request, **arguments)
    made = ranks[: ParallelConfig(**layout).num_ranks]
    assert made[0]["error"] < 1e-5
    assert len({rank["digest"] for rank in made}) == 1  # all ranks hold the same bits
    assert all(rank is None for rank in ranks[len(made) :])


@pytest.mark.parametrize(("layout", "requests"), QUICK, ids=lambda value: str(value))
def test_latents_are_those_of_one_rank(fleet, layout, requests):
    names = [name for name in REQUESTS if name in requests]
    assert names
    for request in names:
        check(fleet, layout, request)


def test_batches_smaller_than_a_step(fleet):
    """Cells cut their parts into as many batches as they need."""
    check(fleet, {"ulysses": 2, "guidance": 2}, "windows", max_tokens=40)


def every_layout():
    for size in (1, 2, 3, 4, 8):
        for layout in layouts(size, num_heads=FIVE_HEADS):
            axes = ("ulysses", "ring", "guidance", "window")
            yield {axis: getattr(layout, axis) for axis in axes if getattr(layout, axis) > 1}


@pytest.mark.slow
@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("layout", list(every_layout()), ids=lambda layout: str(layout))
def test_every_layout_with_every_request(fleet, layout, request_name):
    check(fleet, layout, request_name)


LENGTHS = ([13], [7, 30, 1, 2, 19], [2, 3], [1] * 17, [0, 5, 0, 8])
MESHES = ({"ulysses": 4}, {"ring": 3}, {"ulysses": 2, "ring": 2}, {"ulysses": 4, "ring": 2})


@pytest.mark.parametrize("layout", MESHES, ids=str)
def test_attention_over_shards_against_fp64(fleet, layout):
    """Prime counts, empty ranks, segments of one token and of none; five heads on four ranks."""
    for lengths in LENGTHS:
        ranks = [r for r in fleet.run("attention", layout=layout, lengths=lengths) if r is not None]
        assert max(rank["error"] for rank in ranks) < 1e-6
        assert sum(rank["tokens"] for rank in ranks) == sum(lengths)


GRIDS = ([(7, 2, 3)], [(5, 1, 7), (1, 2, 2), (9, 2, 1)], [(2, 1, 1), (3, 1, 2)], [(4, 5, 5)])


@pytest.mark.parametrize("layout", [{"ring": 3}, {"ulysses": 2, "ring": 4}, {"ring": 8}], ids=str)
def test_sparse_attention_over_a_ring_against_fp64(fleet, layout):
    """Blocks that begin and end within frames; of other ranks' keys, those that are seen cross."""
    config = ParallelConfig(**layout)
    for grids in GRIDS:
        for reach in (0, 1):
            made = fleet.run("sparse_attention", layout=layout, grids=grids, reach=reach)
            ranks = made[: config.num_ranks]
            assert max(rank["error"] for rank in ranks) < 1e-6
            # With each key and value in fp32, of the five heads those of the rank's column.
            heads = [3, 2] if config.ulysses == 2 else [5]
            for column, own in enumerate(heads):
                of_column = ranks[column :: config.ulysses]
                seen = sum(rank["foreign"] for rank in of_column)
                assert sum(rank["sent"] for rank in of_column) == seen * 2 * own * 8 * 4


def test_attention_in_half_precision(fleet):
    """Exchanged in bfloat16, merged in float32: within bfloat16's own rounding."""
    ranks = fleet.run("attention", layout={"ulysses": 2, "ring": 2}, lengths=[40], dtype="bfloat16")
    assert max(rank["error"] for rank in ranks[:4]) < 2e-2


@pytest.mark.parametrize("ranks", [2, 4])
def test_ulysses_sends_each_head_once(fleet, ranks):
    """No more than 4 / P of the tokens' bytes: q, k and v out, the result back, nothing padded."""
    tokens, heads, head_dim = 101, 5, 8
    made = fleet.run("attention", layout={"ulysses": ranks}, lengths=[60, 41], head_dim=head_dim)
    sent = [rank["sent"]["ulysses"] for rank in made[:ranks]]
    of_all_tokens = tokens * heads * head_dim * 4
    assert all(n <= 4 / ranks * of_all_tokens for n in sent)


def test_a_ring_sends_no_keys_that_are_not_needed(fleet):
    """Segments that end where ranks meet: nothing is sent. One that crosses: its keys alone."""
    apart = fleet.run("attention", layout={"ring": 3}, lengths=[5, 5, 5])
    assert [rank["sent"].get("ring", 0) for rank in apart[:3]] == [0, 0, 0]
    crossing = fleet.run("attention", layout={"ring": 3}, lengths=[4, 2, 9])
    # The second segment lies on ranks 0 and 1 (a token each), the third on 1 and 2 (4 and 5).
    row = 2 * 5 * 8 * 4
    assert [rank["sent"]["ring"] for rank in crossing[:3]] == [1 * row, (1 + 4) * row, 5 * row]


def test_layouts_are_those_that_heads_allow():
    eight = layouts(8, num_heads=5)
    products = {layout.num_ranks for layout in eight}
    assert products == {8}
    assert max(layout.ulysses for layout in eight) == 4
    assert ParallelConfig(ulysses=2, guidance=2, window=2) in eight
    assert len(set(eight)) == len(eight)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ulysses": 0}, "ulysses must be a positive integer, got 0"),
        ({"guidance": 3}, "guidance = 3: there are two branches, so 1 or 2"),
        ({"ring": True}, "ring must be a positive integer, got True"),
        ({"timeout_s": 0}, "timeout_s must be over 0, got 0"),
    ],
)
def test_configurations_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**arguments)


def test_impossible_layouts_are_refused_with_the_nearest_that_work():
    with pytest.raises(LayoutError, match=r"has 5; over 8 ranks .*: ring=2 ulysses=4;"):
        check_heads(ParallelConfig(ulysses=8), 5)
    check_heads(ParallelConfig(ulysses=4, ring=2), 5)
    with pytest.raises(LayoutError, match=r"takes 8 GPUs, and 4 are there; .*: ulysses=4;"):
        check_devices(ParallelConfig(ulysses=8), 4, "GPUs", num_heads=40)
    with pytest.raises(LayoutError, match=r"takes 4 ranks, and 2 were started; .*: ulysses=2;"):
        check_world(ParallelConfig(ulysses=4), 2)
    with pytest.raises(LayoutError, match="data=1 would work"):
        check_world(ParallelConfig(data=2), 2)
