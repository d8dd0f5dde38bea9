"""Turns by key: a flood of one key does not hold up another's job."""

from __future__ import annotations

import random

import pytest

from sora_engine.serve.turns import Turns


def drained(turns: Turns) -> list[str]:
    return list(iter(turns.pop, None))


def test_one_owner_goes_in_order_and_by_priority() -> None:
    turns = Turns()
    for name, priority in (("a", 0), ("b", 2), ("c", 0), ("d", 2), ("e", -1)):
        turns.add(name, "x", 5.0, priority)
    assert list(turns.order()) == ["b", "d", "a", "c", "e"]
    assert [turns.position(name) for name in "abcdef"] == [2, 0, 3, 1, 4, None]
    assert drained(turns) == ["b", "d", "a", "c", "e"]
    assert turns.pop() is None


def test_a_job_that_comes_behind_a_flood_is_next() -> None:
    turns = Turns()
    for i in range(60):
        turns.add(f"a{i}", "alice", 1.0)
    assert [turns.pop() for _ in range(10)] == [f"a{i}" for i in range(10)]
    turns.add("b0", "bob", 30.0)
    assert turns.position("b0") == 0
    assert turns.pop() == "b0"
    # Bob has had 30 jobs' worth: Alice has as many before his next one.
    turns.add("b1", "bob", 1.0)
    assert turns.position("b1") == 30
    assert drained(turns).index("b1") == 30


def test_shares_are_even_whatever_is_sent() -> None:
    """At any time the work that two busy keys were given differs by one job of each at most."""
    rng = random.Random(0)
    turns, work = Turns(), {}
    for owner, count, most in (("a", 300, 1.0), ("b", 40, 9.0), ("c", 90, 3.0)):
        for i in range(count):
            name = f"{owner}{i}"
            work[name] = rng.uniform(0.1, most)
            turns.add(name, owner, work[name])
    given = dict.fromkeys("abc", 0.0)
    left = {"a": 300, "b": 40, "c": 90}
    while all(left.values()):
        name = turns.pop()
        assert name is not None
        given[name[0]] += work[name]
        left[name[0]] -= 1
        values = sorted(given.values())
        assert values[-1] - values[0] <= 9.0 + 3.0


def test_an_idle_key_saves_nothing_up() -> None:
    turns = Turns()
    for i in range(100):
        turns.add(f"a{i}", "alice", 1.0)
    for _ in range(50):
        turns.pop()
    for i in range(50):
        turns.add(f"b{i}", "bob", 1.0)
    owners = [name[0] for name in drained(turns)]
    assert all(owners[i : i + 2].count("b") == 1 for i in range(0, 100, 2))


def test_what_is_removed_costs_nothing() -> None:
    turns = Turns()
    turns.add("a", "alice", 100.0)
    turns.add("b", "bob", 1.0)
    turns.add("a1", "alice", 1.0)
    assert turns.remove("a")
    assert not turns.remove("a")
    assert len(turns) == 2
    turns.add("a2", "alice", 1.0)
    assert drained(turns) == ["b", "a1", "a2"]
    with pytest.raises(ValueError, match="over 0"):
        turns.add("z", "bob", 0.0)


def test_order_is_what_happens() -> None:
    rng = random.Random(1)
    turns = Turns()
    for i in range(200):
        turns.add(f"j{i}", rng.choice("abcd"), rng.uniform(0.1, 4), rng.choice((0, 0, 1)))
        if rng.random() < 0.3:
            expected = list(turns.order())
            assert turns.pop() == expected[0]
            assert list(turns.order()) == expected[1:]
    expected = list(turns.order())
    assert drained(turns) == expected
