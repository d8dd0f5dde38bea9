"""Requests that are odd, and none of them a 5xx: what HTTP allows is done, all else is named."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from tests.serve.raw import asked, status_of
from tests.serve.serving import SMALL, Service, served

KEY = "a-key-of-sixteen-chars"
VIDEOS = "/v1/videos"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as made:
        yield made


@pytest.fixture(scope="module")
def video(service: Service) -> dict[str, Any]:
    return service.ended(service.create()["id"])


@pytest.mark.parametrize(
    ("body", "headers", "status", "param", "told"),
    [
        (b'{"prompt": "a", "prompt": "b"}', {}, 400, None, "prompt is given twice"),
        (json.dumps({**SMALL, "seed": True}), {}, 400, "seed", "true is neither"),
        (json.dumps({**SMALL, "loop": 2}), {}, 400, "loop", "boolean"),
        (json.dumps({**SMALL, "fps": 1e-300}), {}, 400, "fps", "0.001"),
        (json.dumps({**SMALL, "fps": 1e300}), {}, 400, "fps", "1000"),
        (json.dumps({**SMALL, "size": "90000x90000"}), {}, 400, "size", "pixels; at most"),
        (json.dumps({**SMALL, "timeline": '{"loop": true, "loop": false}'}), {}, 400, "timeline",
         "an object or a list"),
        (b"\x1f\x8b", {"Content-Encoding": "gzip"}, 415, None, "gzip is not read"),
        (b"[" * 100_000, {}, 400, None, "no JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", {}, 400, None, "no JSON"),
        (b'{"prompt": "a \\ud800"}', {}, 400, "prompt", "unicode"),
        (b"<a/>", {"Content-Type": "application/xml"}, 415, None, "application/xml"),
        (b"", {"Content-Type": ""}, 400, "prompt", "required"),
    ],
)  # fmt: skip
def test_a_body_that_cannot_be_is_named(
    service: Service,
    body: bytes | str,
    headers: dict[str, str],
    status: int,
    param: str | None,
    told: str,
) -> None:
    before = len(service.desk.store.all())
    answer = service.http.post(VIDEOS, content=body, headers={**JSON, **headers})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param)
    assert told in error["message"]
    assert len(service.desk.store.all()) == before


def test_a_job_that_waits_for_its_client_fails_as_its_fault_is(service: Service) -> None:
    """Who gives a deadline that cannot be kept is at fault, and need not ask again."""
    for path, body in ((f"{VIDEOS}/sync", SMALL), ("/v1/images/generations", {"prompt": "a"})):
        answer = service.http.post(path, json={**body, "deadline_s": 1e-9})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "deadline")
        assert answer.headers["x-should-retry"] == "false"


def test_head_is_get_without_a_body(service: Service, video: dict[str, Any]) -> None:
    for path in ("/health", "/ready", "/v1/models", VIDEOS, f"{VIDEOS}/{video['id']}", "/metrics"):
        head, got = service.http.head(path), service.http.get(path)
        assert (head.status_code, head.content) == (200, b""), path
        assert head.headers["content-type"] == got.headers["content-type"]
    missing = service.http.head(f"{VIDEOS}/none")
    assert (missing.status_code, missing.content) == (404, b"")
    assert service.http.head(f"{VIDEOS}/{video['id']}/events").status_code == 405
    assert service.http.head(f"{VIDEOS}/plan").status_code == 404  # no id


def test_head_needs_the_key_that_get_needs(tmp_path) -> None:
    with served(tmp_path / "data", api_key=KEY) as service:
        assert service.http.head(VIDEOS).status_code == 401
        assert service.http.head("/health").status_code == 200
        own = {"Authorization": f"Bearer {KEY}"}
        assert service.http.head(VIDEOS, headers=own).status_code == 200


BODY = json.dumps(SMALL).encode()
HEAD = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def test_a_body_of_two_lengths_is_refused(service: Service) -> None:
    """Else what follows would be a request of its own to one of two that read it."""
    lengths = b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    said = asked(service.server.port, HEAD + lengths + smuggled)
    assert status_of(said) == 400
    assert b"two_lengths" in said
    assert said.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"Transfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"Content-Length: 500\r\n\r\n" + BODY,
    ],
)
def test_a_client_that_goes_within_its_body_is_no_fault(
    service: Service, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="sora_engine.serve")
    with socket.create_connection(("127.0.0.1", service.server.port)) as sock:
        sock.sendall(HEAD + sent)
        time.sleep(0.1)
    until = time.monotonic() + 10
    while not (lines := [r for r in caplog.records if "POST /v1/videos" in r.getMessage()]):
        assert time.monotonic() < until
        time.sleep(0.02)
    assert [record.getMessage() for record in lines] == ["POST /v1/videos 499"]
    ours = [record for record in caplog.records if record.name.startswith("sora_engine")]
    assert [record for record in ours if record.levelno >= logging.WARNING] == []


def test_ranges_and_tags(service: Service, video: dict[str, Any]) -> None:
    path = f"{VIDEOS}/{video['id']}/content"
    whole = service.http.get(path)
    size, etag = len(whole.content), whole.headers["etag"]
    for part_of, part in {
        "bytes=0-0": whole.content[:1],
        "bytes=-1": whole.content[-1:],
        "bytes=5-": whole.content[5:],
        f"bytes={size - 1}-": whole.content[-1:],
        f"bytes=-{10**17}": whole.content,
        f"bytes=0-{10**17}": whole.content,
    }.items():
        answer = service.http.get(path, headers={"Range": part_of})
        assert (answer.status_code, answer.content) == (206, part), part_of
    for part_of in ("bytes=-0", "bytes=5-2", f"bytes={size}-"):
        answer = service.http.get(path, headers={"Range": part_of})
        assert answer.status_code == 416, part_of
        assert answer.headers["content-range"] == f"bytes */{size}"
    for part_of in ("bytes=0-1,3-4", "items=0-1", "bytes=a-b", "bytes=1", "bytes=0x0-1"):
        answer = service.http.get(path, headers={"Range": part_of})
        assert (answer.status_code, len(answer.content)) == (200, size), part_of
    for tags in (etag, f'"other", {etag}', f"W/{etag}", "*"):
        answer = service.http.get(path, headers={"If-None-Match": tags})
        assert (answer.status_code, answer.content) == (304, b""), tags
    for tags in ('"other"', etag[:-2] + '"', ""):
        assert service.http.get(path, headers={"If-None-Match": tags}).status_code == 200, tags


def test_who_deletes_what_it_lists_comes_to_the_end(tmp_path) -> None:
    with served(tmp_path / "data") as service:
        names = [service.create(num_frames=1, num_inference_steps=1)["id"] for _ in range(5)]
        assert [service.ended(name)["status"] for name in names] == ["completed"] * 5
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0)
        seen = []
        for listed in client.videos.list(limit=2, order="asc"):
            seen.append(listed.id)
            client.videos.delete(listed.id)
        assert seen == names
        assert service.http.get(VIDEOS).json()["data"] == []
        never = service.http.get(VIDEOS, params={"after": "video_0_never"})
        assert (never.status_code, never.json()["error"]["param"]) == (400, "after")


def test_a_picture_is_no_video(service: Service) -> None:
    body = {"prompt": "a", "size": "32x32", "n": 3, "seed": 5, "num_inference_steps": 1}
    answer = service.http.post("/v1/images/generations", json={**body, "response_format": "url"})
    pictures = [each["url"].split("/")[-2] for each in answer.json()["data"]]
    assert len(set(pictures)) == 3
    assert [service.desk.store.get(name).facts["seed"] for name in pictures] == [5, 6, 7]
    name = pictures[0]
    head = service.http.head(f"/v1/images/{name}/content")
    assert (head.status_code, head.headers["content-type"]) == (200, "image/png")
    for path in ("remix", "upscale", "cancel"):
        answer = service.http.post(f"{VIDEOS}/{name}/{path}", json={"prompt": "b"})
        if path == "cancel":  # it is done, and stays
            continue
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    assert service.http.get(f"{VIDEOS}/{name}").status_code == 404
    assert name not in service.http.get(VIDEOS).text


def test_deletes_at_once_and_cancels_of_what_is_done(
    service: Service, video: dict[str, Any]
) -> None:
    name = service.create(num_inference_steps=100)["id"]
    with ThreadPoolExecutor(8) as pool:
        codes = list(
            pool.map(lambda _: httpx.delete(f"{service.url}{VIDEOS}/{name}").status_code, range(8))
        )
    assert set(codes) <= {200, 404}
    assert 200 in codes
    assert service.http.get(f"{VIDEOS}/{name}").status_code == 404
    told = service.http.post(f"{VIDEOS}/{video['id']}/cancel").json()
    assert (told["status"], told["error"]) == ("completed", None)
