"""Events and previews: the latest word, no queue, and nothing left of clients that go."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from sora_engine.serve.events import Events, event_id
from sora_engine.serve.failures import ApiError
from sora_engine.serve.preview import preview_webp
from tests.serve.serving import SMALL, Service, served


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data"), max_running=2) as made:
        yield made


def parsed(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Events, by the rules of WHATWG HTML 9.2.6; comments are left out."""
    event: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in event:
                yield event
            event = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            event[name] = value.removeprefix(" ")


def streamed(service: Service, name: str, **headers: str) -> list[dict[str, str]]:
    with service.http.stream("GET", f"/v1/videos/{name}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-store"
        return list(parsed(answer.iter_lines()))


def test_a_stream_tells_what_a_poll_would_and_ends(service: Service, monkeypatch) -> None:
    monkeypatch.setattr(service.app.state.events, "_pace_s", 0.01)
    name = service.create(num_inference_steps=100)["id"]
    events = streamed(service, name)
    told = [json.loads(event["data"]) for event in events]
    assert {event["event"] for event in events[:-1]} == {"progress"}
    assert events[-1]["event"] == "done"
    assert told[-1] == service.http.get(f"/v1/videos/{name}").json()
    assert [event["id"] for event in events] == [event_id(word) for word in told]
    steps = [word["steps_done"] for word in told]
    assert steps == sorted(steps)
    assert len(set(steps)) > 5
    progress = [word["progress"] for word in told]
    assert progress == sorted(progress)
    assert told[-1]["url"] == f"{service.url}/v1/videos/{name}/content"
    assert streamed(service, name) == events[-1:]  # of a job that is done: its last word


def test_a_client_that_comes_back_is_told_what_is_new(service: Service) -> None:
    name = service.create()["id"]
    last = streamed(service, name)[-1]
    assert streamed(service, name, **{"Last-Event-ID": last["id"]}) == []
    older = streamed(service, name, **{"Last-Event-ID": "denoising-1-0"})
    assert [event["event"] for event in older] == ["done"]


def test_four_streams_a_client_and_a_deleted_job_ends_them(service: Service) -> None:
    name = service.create(num_inference_steps=200)["id"]
    clients = [httpx.Client(base_url=service.url, timeout=30) for _ in range(5)]
    streams = [client.stream("GET", f"/v1/videos/{name}/events") for client in clients[:4]]
    answers = [stream.__enter__() for stream in streams]
    lines = [parsed(answer.iter_lines()) for answer in answers]
    for line in lines:
        assert next(line)["event"] == "progress"
    refused = clients[4].get(f"/v1/videos/{name}/events")
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "too_many_streams"
    assert service.app.state.events.num_open == 4
    assert service.http.delete(f"/v1/videos/{name}").status_code == 200
    for line, stream in zip(lines, streams, strict=True):
        *_, last = line
        assert last["event"] == "gone"
        assert json.loads(last["data"])["error"]["code"] == "not_found"
        stream.__exit__(None, None, None)
    assert service.http.get(f"/v1/videos/{name}/events").status_code == 404
    assert_nothing_open(service)


def assert_nothing_open(service: Service) -> None:
    until = time.monotonic() + 10
    events = service.app.state.events
    while events.num_open or events._slots:
        assert time.monotonic() < until
        time.sleep(0.02)
    assert b"sora_event_streams 0.0" in service.app.state.metrics.text()


def test_a_preview_is_the_last_steps_picture(service: Service) -> None:
    name = service.create(num_inference_steps=150, size="64x48")["id"]
    url = f"/v1/videos/{name}/preview"
    until = time.monotonic() + 30
    while (answer := service.http.get(url)).status_code == 404:
        assert answer.json()["error"]["code"] == "no_preview"
        assert time.monotonic() < until
    assert answer.headers["content-type"] == "image/webp"
    step = int(answer.headers["x-step"])
    assert answer.headers["etag"] == f'"{name}-{step}"'
    picture = Image.open(io.BytesIO(answer.content))
    assert picture.format == "WEBP"
    assert picture.size == (64, 48)  # latents of 8x8 pixels
    while service.http.get(url).headers.get("x-step", str(step)) == str(step):
        assert time.monotonic() < until
    newer = service.http.get(url, headers={"If-None-Match": answer.headers["etag"]})
    assert newer.status_code == 200
    live = service.desk.live(name)
    live.job.cancel()
    service.ended(name)
    assert service.http.get(url).status_code == 404


def test_a_preview_that_the_client_has_is_not_sent_again(service: Service, monkeypatch) -> None:
    name = service.create(num_inference_steps=200)["id"]
    until = time.monotonic() + 30
    while service.http.get(f"/v1/videos/{name}/preview").status_code == 404:
        assert time.monotonic() < until
    live = service.desk.live(name)
    held = type(live.job.progress)
    still = held("denoising", 9, 200, 0, 5)
    monkeypatch.setattr(type(live.job), "progress", property(lambda _job: still))
    tag = {"If-None-Match": f'"{name}-9"'}
    same = service.http.get(f"/v1/videos/{name}/preview", headers=tag)
    assert (same.status_code, same.content) == (304, b"")
    monkeypatch.undo()
    service.http.delete(f"/v1/videos/{name}")


def test_previews_are_enlarged_and_play_as_long_as_the_video() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 2, 3, 3), np.uint8).repeat(5, 0) + np.uint8(9) * np.arange(
        5, dtype=np.uint8
    ).reshape(5, 1, 1, 1)
    picture = Image.open(io.BytesIO(preview_webp(frames, 2.5)))
    assert (picture.n_frames, picture.size) == (5, (24, 16))
    total = 0
    for i in range(5):
        picture.seek(i)
        picture.load()
        total += picture.info["duration"]
        shown = np.asarray(picture.convert("RGB").resize((3, 2), Image.Resampling.BOX), float)
        assert np.abs(shown - frames[i]).mean() < 40
    assert total == 2500
    wide = Image.open(io.BytesIO(preview_webp(np.zeros((1, 10, 400, 3), np.uint8), 1.0)))
    assert wide.size == (400, 10)


# Of the hub alone.


def collected(events: Events, words: list[dict[str, Any]], **how: Any) -> list[bytes]:
    """What a stream says while a job goes through its words, each told of."""
    said: list[bytes] = []

    async def run() -> None:
        now = {"i": 0}

        async def read() -> None:
            async for line in events.stream("job", lambda: words[now["i"]], **how):
                said.append(line)

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.02)
        for i in range(1, len(words)):
            now["i"] = i
            await asyncio.to_thread(events.tell, "job")
            await asyncio.sleep(0.03)
        await asyncio.wait_for(reader, 5)

    asyncio.run(run())
    return said


def word(steps: int, status: str = "in_progress") -> dict[str, Any]:
    return {"status": status, "stage": "denoising", "steps_done": steps, "frames_decoded": 0}


def test_silence_is_broken_by_comments() -> None:
    said = collected(Events(quiet_s=0.005), [word(1), word(1), word(2, "completed")])
    assert said.count(b": still here\n\n") >= 2
    assert [line for line in said if line.startswith(b"id")] == [
        b'id: denoising-1-0\nevent: progress\ndata: {"status":"in_progress","stage":"denoising",'
        b'"steps_done":1,"frames_decoded":0}\n\n',
        b'id: denoising-2-0\nevent: done\ndata: {"status":"completed","stage":"denoising",'
        b'"steps_done":2,"frames_decoded":0}\n\n',
    ]


def test_a_slow_reader_finds_the_latest_and_no_queue() -> None:
    events = Events()
    said: list[bytes] = []

    async def run() -> None:
        steps = {"now": 0}
        stream = events.stream("job", lambda: word(steps["now"], steps.get("end", "in_progress")))
        said.append(await anext(stream))
        said.append(await anext(stream))
        for _ in range(1000):
            steps["now"] += 1
            events.tell("job")
        await asyncio.sleep(0.01)
        said.append(await anext(stream))
        steps["end"] = "failed"
        events.tell("job")
        said.extend([line async for line in stream])

    asyncio.run(run())
    assert [line.partition(b"\n")[0] for line in said] == [
        b"retry: 2000",
        *(b"id: denoising-0-0", b"id: denoising-1000-0", b"id: denoising-1000-0"),
    ]


def test_quick_steps_are_told_together_and_the_end_at_once() -> None:
    """Of words within the pace the last is told after it, and a job's end does not wait for it."""
    said: list[tuple[float, bytes]] = []
    now = word(0)

    async def run() -> None:
        events, began = Events(pace_s=0.3), time.monotonic()

        async def read() -> None:
            async for line in events.stream("job", lambda: dict(now)):
                said.append((time.monotonic() - began, line.partition(b"\n")[0]))

        reader = asyncio.create_task(read())
        await asyncio.sleep(0)
        for steps in range(1, 51):
            now.update(word(steps))
            await asyncio.to_thread(events.tell, "job")
        await asyncio.sleep(0.4)
        assert said[-1][1] == b"id: denoising-50-0", "nothing more is told of it for now"
        now.update(word(51))
        events.tell("job")
        now.update(word(52, "completed"))
        events.tell("job", last=True)
        told_s = time.monotonic() - began
        await asyncio.wait_for(reader, 5)
        assert said[-1][0] - told_s < 0.1

    asyncio.run(run())
    assert len(said) <= 5, (
        said
    )  # retry, the word as it came, the first of the 50, the last, the end
    assert said[-1][1] == b"id: denoising-52-0"


def test_a_server_that_stops_ends_its_streams() -> None:
    events = Events()

    async def run() -> list[bytes]:
        async def read() -> list[bytes]:
            return [line async for line in events.stream("job", lambda: word(1))]

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        events.close()
        return await asyncio.wait_for(reader, 5)

    assert len(asyncio.run(run())) == 2
    assert not events._slots


def test_places_are_given_back_once() -> None:
    events = Events(most=2)
    leave, other = events.enter("a"), events.enter("a")
    events.enter("b")
    with pytest.raises(ApiError):
        events.enter("a")
    leave()
    leave()
    assert events.num_open == 2
    events.enter("a")
    with pytest.raises(ApiError):
        events.check("a")
    other()
    events.check("a")


def listed(service: Service) -> list[dict[str, Any]]:
    return service.http.get("/v1/videos?limit=100").json()["data"]


def test_100_clients_that_go_at_any_time_leave_nothing(service: Service) -> None:
    """Streams, files and answers that are awaited, cut off at random."""
    done = service.ended(service.create(num_frames=25, size="96x96")["id"])["id"]
    rng = random.Random(0)
    process = psutil.Process()

    def cut(kind: str, after_s: float) -> None:
        body = json.dumps({**SMALL, "num_inference_steps": 30}).encode()
        requests = {
            "events": f"GET /v1/videos/{watched}/events HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "content": f"GET /v1/videos/{done}/content HTTP/1.1\r\nHost: localhost\r\n\r\n",
            "sync": "POST /v1/videos/sync HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body.decode()}",
        }
        with socket.create_connection(("127.0.0.1", service.server.port)) as sock:
            sock.sendall(requests[kind].encode())
            time.sleep(after_s)

    def settled() -> tuple[int, float]:
        service.idle()
        assert_nothing_open(service)
        until = time.monotonic() + 10
        while service.server.connections > 1:  # the test's own client
            assert time.monotonic() < until
            time.sleep(0.02)
        return len(os.listdir("/proc/self/fd")), process.memory_info().rss / 2**20

    known = {told["id"] for told in listed(service)}
    names = [watched := service.create(num_inference_steps=30)["id"]]
    for kind in ("events", "content", "sync"):
        cut(kind, 0.05)
    descriptors, before_mib = settled()
    for _ in range(4):
        names.append(watched := service.create(num_inference_steps=30)["id"])
        kinds = rng.choices(["events", "events", "content", "sync"], k=25)
        threads = []
        for kind in kinds:
            threads.append(threading.Thread(target=cut, args=(kind, rng.uniform(0, 0.15))))
            threads[-1].start()
            time.sleep(0.01)
        for thread in threads:
            thread.join()
        assert service.ended(watched)["status"] == "completed"  # nobody's going stopped it
    now, after_mib = settled()
    assert now <= descriptors + 2
    assert after_mib < before_mib + 40
    # Of those that were awaited on their connection nothing is left, and no other job was harmed.
    assert {told["id"] for told in listed(service)} - known == set(names)


def test_content_is_the_file(service: Service, tmp_path: Path) -> None:
    name = service.ended(service.create()["id"])["id"]
    body = service.http.get(f"/v1/videos/{name}/content").content
    assert body == (service.data / "videos" / name / "video.mp4").read_bytes()


def test_a_job_that_was_done_before_its_client_was_missed_leaves_nothing(service: Service) -> None:
    """Of one that waited on the connection: nobody was told its name."""
    known = {told["id"] for told in listed(service)}
    body = json.dumps({**SMALL, "num_inference_steps": 1}).encode()
    head = (
        "POST /v1/videos/sync HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", service.server.port)) as sock:
        sock.sendall(head.encode() + body)
        until = time.monotonic() + 10
        while {told["id"] for told in listed(service)} == known:
            assert time.monotonic() < until, "no job was made"
    until = time.monotonic() + 10
    while {told["id"] for told in listed(service)} != known:
        assert time.monotonic() < until, "the job stays"
        time.sleep(0.02)
