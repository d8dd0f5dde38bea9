"""The simulation of replicas against queues whose waiting is known in closed form."""

from __future__ import annotations

import importlib.util
import math
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

PATH = Path(__file__).parents[2] / "benchmarks" / "predict_serving.py"


@pytest.fixture(scope="module")
def predict() -> ModuleType:
    spec = importlib.util.spec_from_file_location("predict_serving", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def jobs_of(predict: ModuleType, rate: float, service, count: int, burst: int = 1):
    rng = random.Random(5)
    moments = list(predict.arrivals(rate, count, burst, rng))
    return [predict.Job(at, service(rng), 1.0) for at in moments]


# The mean of n jobs of a queue that is half busy has a standard error of about 2 / (1 - load) /
# sqrt(n) of itself (Whitt, 1989): 1.6% for 60,000. The bounds are three of them.
COUNT, BOUND = 60_000, 0.05


def test_m_m_1(predict: ModuleType) -> None:
    """Time in the system is exponential, of the mean 1 / (service rate - arrival rate)."""
    jobs = jobs_of(predict, 0.5, lambda rng: rng.expovariate(1.0), COUNT)
    outcome = predict.simulate(jobs, 1, predict.shortest, warm=1000)
    mean = 1 / (1 - 0.5)
    assert outcome.times.mean() == pytest.approx(mean, rel=BOUND)
    for share in (0.5, 0.95):
        assert outcome.quantile(share) == pytest.approx(-math.log(1 - share) * mean, rel=BOUND)
    assert outcome.busy == pytest.approx(0.5, rel=0.02)


def test_m_d_1(predict: ModuleType) -> None:
    """Pollaczek and Khinchine: the mean wait is load / (2 (1 - load)) services."""
    jobs = jobs_of(predict, 0.5, lambda _: 1.0, COUNT)
    outcome = predict.simulate(jobs, 1, predict.shortest, warm=1000)
    assert outcome.times.mean() - 1 == pytest.approx(0.5 / (2 * 0.5), rel=BOUND)
    assert outcome.times.min() == pytest.approx(1.0)


def test_batches(predict: ModuleType) -> None:
    """M^[X]/D/1 with batches of b: within its batch a job waits (b - 1) / 2 services, and for those
    before it load * b / (2 (1 - load))."""
    jobs = jobs_of(predict, 0.5, lambda _: 1.0, COUNT, burst=4)
    outcome = predict.simulate(jobs, 1, predict.shortest, warm=1000)
    waited = 0.5 * 4 / (2 * 0.5) + (4 - 1) / 2
    assert outcome.times.mean() - 1 == pytest.approx(waited, rel=2 * BOUND)  # a quarter as many


def test_round_robin_before_n_servers(predict: ModuleType) -> None:
    """Every n-th job of a Poisson process: each server is an E_n/M/1. Its time in the system is
    exponential, of the mean 1 / (1 - s), where s solves s = (rate / (rate + 1 - s))^n."""
    n, rate = 3, 3 * 0.5
    jobs = jobs_of(predict, rate, lambda rng: rng.expovariate(1.0), COUNT)
    outcome = predict.simulate(jobs, n, predict.round_robin, warm=1000)
    s = 0.5
    for _ in range(200):
        s = (rate / (rate + 1 - s)) ** n
    assert outcome.times.mean() == pytest.approx(1 / (1 - s), rel=BOUND)


def test_the_shortest_queue_lies_between_one_line_and_round_robin(predict: ModuleType) -> None:
    """No choice beats one line before all servers: M/M/n, whose wait Erlang's C gives."""
    n, load = 4, 0.8
    jobs = jobs_of(predict, n * load, lambda rng: rng.expovariate(1.0), COUNT)
    short = predict.simulate(jobs, n, predict.shortest, warm=1000).times.mean()
    plain = predict.simulate(jobs, n, predict.round_robin, warm=1000).times.mean()
    a = n * load
    blocked = a**n / math.factorial(n) / (1 - load)
    erlang_c = blocked / (sum(a**k / math.factorial(k) for k in range(n)) + blocked)
    one_line = 1 + erlang_c / (n * (1 - load))
    assert one_line * (1 - BOUND) < short < plain * 0.8


def test_the_shortest_queue_is_chosen_by_tokens_that_are_left(predict: ModuleType) -> None:
    """By hand: 10 tokens in 10 s at one, 4 in 1 s at the other; the third job comes at 0.5."""
    job = predict.Job
    jobs = [job(0.0, 10.0, 10.0), job(0.0, 1.0, 4.0), job(0.5, 1.0, 1.0), job(9.5, 1.0, 1.0)]
    outcome = predict.simulate(jobs, 2, predict.shortest)
    np.testing.assert_allclose(outcome.times, [10.0, 1.0, 1.5, 1.0])
