"""Turns by key: a flood of one key does not hold up another's job."""

from __future__ import annotations

import itertools
import random

from sora_engine.serve.turns import Turn, Turns


class Line:
    """Jobs by name that wait, as a desk keeps them."""

    def __init__(self) -> None:
        self.turns: Turns[str] = Turns(lambda name: self.waiting[name])
        self.waiting: dict[str, Turn] = {}
        self._numbers = itertools.count()

    def add(self, name: str, owner: str, work: float = 1.0, priority: int = 0) -> None:
        self.waiting[name] = Turn(owner, work, priority, next(self._numbers))

    def order(self) -> list[str]:
        return self.turns.order(list(self.waiting))

    def pop(self) -> str:
        name = self.turns.choose(list(self.waiting))
        del self.waiting[name]
        return name

    def drain(self) -> list[str]:
        return [self.pop() for _ in range(len(self.waiting))]


def test_one_owner_goes_in_order_and_by_priority() -> None:
    line = Line()
    for name, priority in (("a", 0), ("b", 2), ("c", 0), ("d", 2), ("e", -1)):
        line.add(name, "x", 5.0, priority)
    assert line.order() == ["b", "d", "a", "c", "e"]
    assert line.drain() == ["b", "d", "a", "c", "e"]


def test_a_job_that_comes_behind_a_flood_is_next() -> None:
    line = Line()
    for i in range(60):
        line.add(f"a{i}", "alice")
    assert [line.pop() for _ in range(10)] == [f"a{i}" for i in range(10)]
    line.add("b0", "bob", 30.0, priority=-8)  # priority is among one's own jobs
    assert line.pop() == "b0"
    # Bob has had 30 jobs' worth: Alice has as many before his next one.
    line.add("b1", "bob", priority=8)
    assert line.drain().index("b1") == 30


def test_shares_are_even_whatever_is_sent() -> None:
    """At any time the work that two busy keys were given differs by one job of each at most."""
    rng = random.Random(0)
    line, work = Line(), {}
    for owner, count, most in (("a", 300, 10.0), ("b", 40, 90.0), ("c", 90, 30.0)):
        for i in range(count):
            name = f"{owner}{i}"
            work[name] = rng.uniform(1, most)
            line.add(name, owner, work[name])
    given = dict.fromkeys("abc", 0.0)
    left = {"a": 300, "b": 40, "c": 90}
    while all(left.values()):
        name = line.pop()
        given[name[0]] += work[name]
        left[name[0]] -= 1
        values = sorted(given.values())
        assert values[-1] - values[0] <= 90.0 + 30.0


def test_an_idle_key_saves_nothing_up() -> None:
    line = Line()
    for i in range(100):
        line.add(f"a{i}", "alice")
    for _ in range(50):
        line.pop()
    for i in range(50):
        line.add(f"b{i}", "bob")
    owners = [name[0] for name in line.drain()]
    assert all(owners[i : i + 2].count("b") == 1 for i in range(0, 100, 2))


def test_what_was_had_alone_is_not_held_against_anyone() -> None:
    line = Line()
    for i in range(20):
        line.add(f"a{i}", "alice", 10.0)
        line.pop()
    line.add("a", "alice")
    line.add("b", "bob")
    assert line.drain() == ["a", "b"]


def test_order_is_what_happens() -> None:
    rng = random.Random(1)
    line = Line()
    for i in range(200):
        line.add(f"j{i}", rng.choice("abcd"), rng.uniform(1, 40), rng.choice((0, 0, 1)))
        if rng.random() < 0.3:
            expected = line.order()
            assert line.pop() == expected[0]
            assert line.order() == expected[1:]
    expected = line.order()
    assert line.drain() == expected
