"""Memories of places, held against a map of cells that is written down one by one."""

from __future__ import annotations

import gc
import random

import pytest
import torch

from sora_engine.request import Action
from sora_engine.runtime.recall import STALE, TILE, Memory, Moment, Places, Recent, away
from sora_engine.runtime.standing import Log

ROOM = 2**30
MAP_BYTES = TILE * TILE * 8


def a_moment(place: tuple[float, float], size: tuple[int, int] = (4, 6)) -> Moment:
    return Moment(torch.zeros(2, 1, *size), (), place, "")


def cells_of(moment: Moment, world: tuple[int, int] | None) -> set[tuple[int, int]]:
    top, left = map(round, moment.place)
    rows, columns = moment.size
    cells = ((top + r, left + c) for r in range(rows) for c in range(columns))
    return {c if world is None else (c[0] % world[0], c[1] % world[1]) for c in cells}


def best_of(made, n, view, seen, context, world) -> list[int]:
    """One by one those that show most that is not shown yet, found by asking each cell."""
    need = {c: seen[c] for c in cells_of(view, world) if c in seen and made[seen[c]] not in context}
    kept = sorted(set(seen.values()), reverse=True)
    saw = {i: cells_of(made[i], world) for i in kept if made[i] not in context}
    picked: list[int] = []

    def worth(numbers: list[int]) -> float:
        return sum(
            max([1.0 if i == last else STALE for i in numbers if c in saw[i]], default=0.0)
            for c, last in need.items()
        )

    while len(picked) < n and saw:
        best = max(saw, key=lambda i: worth([*picked, i]))  # the first of equals: the newest
        if worth([*picked, best]) == worth(picked):
            break
        picked.append(best)
    return sorted(picked)


@pytest.mark.parametrize("world", [None, (20, 20), (16, 37), (3, 5)])
@pytest.mark.parametrize("room", [ROOM, 30_000])
def test_who_shows_most_of_what_was_seen_is_recalled(world, room):
    rng = random.Random(1)
    index, seen, made = Places(world), {}, []
    place = (0.0, 0.0)
    for step in range(150):
        place = (place[0] + rng.choice([-1, 0, 1]), place[1] + rng.choice([-1, 0, 1, 30]))
        context = made[-3:]
        view = a_moment(place)
        picked = index.pick(place, 2, context)
        if room == ROOM:
            want = best_of(made, 2, view, seen, context, world)
            assert [made.index(m) for m in picked] == want
        else:
            assert all(m in made for m in picked)
        before = index.moments
        after = index.added(view, room)
        assert index.moments == before  # it has not changed
        index = after
        made.append(view)
        seen |= dict.fromkeys(cells_of(view, world), step)
        assert index.nbytes <= room
        if room == ROOM:
            assert index.num_places == len(seen)
            assert set(index.moments) == {made[i] for i in set(seen.values())}
            assert index.num_lost == 0
        kept = set(index.moments)
        shown = {c: i for c, i in seen.items() if made[i] in kept}
        assert index.num_places == len(shown)
    assert index.nbytes == sum(m.nbytes for m in index.moments) + len(index.tiles) * MAP_BYTES
    if room != ROOM and world is None:
        assert index.num_lost > 0
        # Those that were seen longest ago went first.
        assert min(made.index(m) for m in index.moments) > 50


def test_a_view_that_was_left_bit_by_bit_is_recalled_whole():
    """Each of those that saw a part of it later is the latest of a column alone."""
    index = Places(None).added(a_moment((0.0, 0.0), (4, 4)), ROOM)
    for column in range(1, 9):
        index = index.added(a_moment((0.0, float(column)), (4, 4)), ROOM)
    back = index.pick((0.0, 0.0), 2, index.moments[-4:])
    assert index.moments[0] in back
    cells = set.union(*(cells_of(m, None) for m in back))
    assert cells_of(a_moment((0.0, 0.0), (4, 4)), None) <= cells


def test_a_memory_without_room_keeps_nothing():
    index = Places(None).added(a_moment((0.0, 0.0)), 0)
    assert index.moments == ()
    assert not index.tiles
    assert (index.nbytes, index.num_places, index.num_lost) == (0, 0, 24)
    assert index.pick((0.0, 0.0), 3, ()) == []


def test_a_view_between_cells_is_of_the_nearest():
    index = Places(None).added(a_moment((0.0, 0.0)), ROOM).added(a_moment((0.0, 6.4)), ROOM)
    first, second = index.moments
    assert index.pick((0.0, -0.4), 5, ()) == [first]
    assert index.pick((0.4, 0.6), 5, ()) == [first, second]
    assert index.pick((0.0, 0.6), 5, (second,)) == [first]
    assert index.pick((0.0, 0.6), 1, ()) == [first]
    assert index.pick((0.0, 0.6), 0, ()) == []


def test_without_places_the_last_before_the_context_are_recalled():
    made = [a_moment((0.0, 0.0)) for _ in range(8)]
    index = Recent(5)
    for moment in made:
        index = index.added(moment, ROOM)
    assert index.moments == tuple(made[-5:])
    assert index.pick((0.0, 0.0), 2, made[-2:]) == made[-4:-2]
    assert index.pick((0.0, 0.0), 9, made[-2:]) == made[-5:-2]
    assert index.pick((0.0, 0.0), 0, made[-2:]) == []
    assert index.added(made[0], made[0].nbytes).moments == (made[0],)
    assert index.nbytes == 5 * made[0].nbytes


def test_a_memory_that_was_shared_is_not_taken_back():
    memory = Memory(Places(None), kind=None, room=ROOM)
    memory.join()
    empty = memory.index
    memory.add(a_moment((0.0, 0.0)))
    memory.go_back(empty)
    assert memory.index is empty
    memory.join()
    memory.leave()
    memory.add(a_moment((0.0, 0.0)))
    memory.go_back(empty)
    assert len(memory.index.moments) == 1
    assert (memory.was_shared, memory.num_sessions) == (True, 1)


def test_the_way_round_a_torus_is_the_nearest():
    assert away((1.0, 0.0), (19.0, 3.0), (20, 20)) == (2.0, -3.0)
    assert away((0.0, 0.0), (10.0, 11.0), (20, 20)) == (-10.0, 9.0)
    assert away((1.0, 0.0), (19.0, 3.0), None) == (-18.0, -3.0)


def test_a_long_log_is_let_go_of_at_once():
    log = None
    for i in range(200_000):
        log = Log.with_one(log, Action(prompt=str(i)))
    assert log.step == len(Log.runs(log)) == 200_000
    del log
    gc.collect()
