"""Turns: who waited longest goes first, and who fits at the same expert comes along."""

from __future__ import annotations

from dataclasses import dataclass

from sora_engine.scheduler import Scheduler


@dataclass
class Turn:
    name: str
    tokens: int
    expert: int = 0
    last_ran: int = 0


def step(scheduler, jobs):
    chosen = scheduler.next_step(jobs, expert_of=lambda j: j.expert, tokens_of=lambda j: j.tokens)
    return [job.name for job in chosen]


def test_small_jobs_run_together():
    jobs = [Turn("a", 10), Turn("b", 20), Turn("c", 30)]
    assert step(Scheduler(100), jobs) == ["a", "b", "c"]
    assert step(Scheduler(100), []) == []


def test_a_still_image_is_not_stuck_behind_a_minute_of_video():
    scheduler = Scheduler(100)
    jobs = [Turn("minute", 5000), Turn("image", 10)]
    turns = [step(scheduler, jobs) for _ in range(4)]
    assert turns == [["minute"], ["image"], ["minute"], ["image"]]


def test_experts_take_turns():
    scheduler = Scheduler(100)
    jobs = [Turn("a", 10, 0), Turn("b", 10, 1), Turn("c", 10, 0)]
    assert [step(scheduler, jobs) for _ in range(3)] == [["a", "c"], ["b"], ["a", "c"]]


def test_nobody_starves():
    scheduler = Scheduler(25)
    jobs = [Turn(str(i), 10, i % 2) for i in range(6)]
    ran = [name for _ in range(12) for name in step(scheduler, jobs)]
    assert min(ran.count(str(i)) for i in range(6)) >= 3
