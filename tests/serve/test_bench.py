"""`sora bench --only http`: what it measures, against a service in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

import sora_engine as sora
from sora_engine.bench import http
from sora_engine.bench.results import SUBJECT, Measurement, ResultError
from sora_engine.bench.serving import Kind
from tests.faults.engines import engine as new_engine
from tests.serve.serving import Service, served

TINY = Kind(32, 32, 1, 2, share=1)
LONG = Kind(64, 64, 5, 200, share=1, small=False)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as made:
        yield made


@pytest.fixture(scope="module")
def engine() -> Iterator[sora.Engine]:
    with new_engine() as made:
        yield made


@pytest.fixture
def client(service: Service) -> Iterator[http.Client]:
    with contextlib.closing(http.Client(service.url)) as made:
        yield made


def test_all_that_is_sent_is_made(
    service: Service, engine: sora.Engine, client: http.Client
) -> None:
    before = len(service.desk.store.all("completed"))
    found = http._throughput(engine, service.url, TINY, 4, 1)
    assert set(found.samples) == {SUBJECT, http.EMBEDDED, http.SAVING}
    assert all(value > 0 for values in found.samples.values() for value in values)
    assert len(service.desk.store.all("completed")) - before == 4
    alone = http._latency(engine, service.url, TINY, 2)
    assert len(service.desk.store.all("completed")) - before == 4 + 3
    assert alone.spread(http.EMBEDDED).median > 0


def test_the_default_jobs_are_what_words_alone_become(engine: sora.Engine) -> None:
    made = engine.resolve(sora.VideoRequest(prompt="a red circle"))
    kind = http.DEFAULT
    asked = (kind.width, kind.height, kind.num_frames, kind.steps)
    assert asked == (made.width, made.height, made.num_frames, made.num_inference_steps)
    assert "64x64, 17 frames, 40 steps" in http._size(kind)


def test_polls_and_cancels_leave_nothing(service: Service, monkeypatch) -> None:
    monkeypatch.setattr(http, "KEPT_POLLS", 10**6)
    found: list[Measurement] = [
        http._polls(service.url, LONG, 3, 0.2),
        http._cancel(service.url, LONG, 2),
    ]
    assert all(value > 0 for one in found for value in one.samples[SUBJECT])
    rate = found[0].figures["polls a second"]
    assert rate == pytest.approx(len(found[0].samples[SUBJECT]) / 0.2)
    service.idle()


def test_what_goes_wrong_is_an_error_of_the_benchmark(
    engine: sora.Engine, client: http.Client, service: Service, monkeypatch
) -> None:
    with pytest.raises(ResultError, match="answered 400"):
        client.create(Kind(32, 32, 10**6, 2, share=1), 0)
    with pytest.raises(ResultError, match="answered 404"):
        client.ask("GET", "/v1/videos/none")
    monkeypatch.setattr(http.sys, "executable", "false")
    with pytest.raises(ResultError, match="ended with 1 before it was ready"), http.server("x", 1):
        pass


@pytest.mark.slow
def test_the_group_runs_tiny(capsys) -> None:
    from sora_engine.cli import main

    assert main(["bench", "--tiny", "--only", "http"]) == 0
    assert "a small job behind a large one" in capsys.readouterr().out
