"""The whole service: keys on every route, owners, fair turns, uploads, and nothing that leaks."""

from __future__ import annotations

import io
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from starlette.routing import Route

from sora_engine.errors import BackendError
from sora_engine.serve.keys import hash_of, new_key
from sora_engine.serve.logs import JsonLines, NoPrompts
from sora_engine.serve.settings import Settings
from tests.serve.raw import connected, status_of, until_closed
from tests.serve.servers import Nursery, Server
from tests.serve.serving import SMALL, Service, served

ALICE, BOB = new_key(), new_key()
OPEN = {
    *[("GET", path) for path in ("/health", "/ready", "/metrics", "/v1/models")],
    *[("GET", "/v1/models/{model_id:path}"), ("POST", "/session")],
    *[("GET", path) for path in ("/", "/favicon.ico", "/page/{name}")],  # the page, without data
}
SECRET_WORD = "xylophone"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("server-of-alice-and-bob")
    keys = folder / "keys"
    keys.write_text(f"alice {hash_of(ALICE)} max_jobs=12\nbob {hash_of(BOB)} max_priority=2\n")
    keys.chmod(0o600)
    data = folder / "data"
    with served(data, api_keys=keys, max_running=1, max_upload=300_000) as made:
        made.http.headers["Authorization"] = f"Bearer {ALICE}"
        yield made


def as_bob() -> dict[str, str]:
    return {"Authorization": f"Bearer {BOB}"}


def code_of(answer: httpx.Response) -> str:
    return answer.json()["error"]["code"]


def routes(service: Service) -> list[Route]:
    """All of the real application."""
    found = [
        route
        for included in service.app.routes
        for route in getattr(included, "original_router", service.app).routes
        if isinstance(route, Route)
    ]
    assert len(found) > 20
    return found


def test_every_route_is_shut_but_those_of_the_list(service: Service) -> None:
    """A route that is added is shut unless it is put on the list."""
    for route in routes(service):
        path = re.sub(r"\{[^}]*\}", "x", route.path)
        for method in route.methods or ():
            for name, given in {
                "none": {"Authorization": ""},
                "wrong": {"Authorization": f"Bearer {ALICE[:-2]}__"},
            }.items():
                answer = service.http.request(method, path, headers=given)
                key = "GET" if method == "HEAD" else method, route.path
                is_shut = answer.status_code == 401 and (
                    method == "HEAD" or code_of(answer) == "invalid_api_key"
                )
                # A session is asked for with a key in the body; here it is none.
                assert is_shut is (key not in OPEN), (method, route.path, name)
            if method not in ("POST", "DELETE"):  # nothing is ordered here
                assert service.http.request(method, path).status_code != 401


def test_another_owners_jobs_are_not_there(service: Service) -> None:
    mine = service.ended(service.create()["id"])["id"]
    theirs = service.create(as_bob())["id"]
    service.ended(theirs, as_bob())
    listed = service.http.get("/v1/videos?limit=100").json()["data"]
    assert mine in {told["id"] for told in listed}
    assert theirs not in {told["id"] for told in listed}
    other = service.http.get("/v1/videos", headers=as_bob()).json()
    assert [told["id"] for told in other["data"]] == [theirs]
    nobody = "video_0_" + "a" * 26
    for route in routes(service):
        if "{video_id}" not in route.path:
            continue
        for method in route.methods or ():
            asked = {"priority": 0} if route.path.endswith("/priority") else {"prompt": "p"}
            body = {"json": asked} if method == "POST" else {}
            for name in (theirs, nobody):
                path = route.path.replace("{video_id}", name)
                answer = service.http.request(method, path, **body)
                assert answer.status_code == 404, (method, route.path)
                if method != "HEAD":
                    assert code_of(answer) == "not_found"
    with_other = service.http.post(
        "/v1/videos/connect",
        json={"prompt": "p", "first": {"video_id": mine}, "second": {"video_id": theirs}},
    )
    assert with_other.status_code == 404
    assert service.http.get(f"/v1/videos?after={theirs}").status_code == 400
    assert service.http.get(f"/v1/videos/{theirs}", headers=as_bob()).status_code == 200


def test_a_flood_of_one_key_does_not_hold_up_another(service: Service) -> None:
    """With a place for one job at a time Bob's is the next to begin, and his cap is his own."""
    flood = [service.create(num_inference_steps=20)["id"] for _ in range(12)]
    answer = service.http.post("/v1/videos", json=SMALL)
    assert (answer.status_code, code_of(answer)) == (429, "too_many_jobs")
    assert int(answer.headers["retry-after"]) >= 1
    bobs = service.create(as_bob(), num_inference_steps=20)
    assert bobs["queue_position"] <= 1
    told = service.ended(bobs["id"], as_bob())
    states = [service.http.get(f"/v1/videos/{name}").json() for name in flood]
    done = [state for state in states if state["status"] == "completed"]
    # Two at most: the one that was at work, and one that had begun when Bob came.
    assert len(done) <= 3, len(done)
    assert told["status"] == "completed"
    places = [state["queue_position"] for state in states if state["status"] == "queued"]
    assert places == sorted(places)
    for name in flood:
        service.http.delete(f"/v1/videos/{name}")
    service.idle()


def test_priorities_are_capped_by_key(service: Service) -> None:
    for headers, priority, status in ((None, 1, 400), (None, 0, 200), (as_bob(), 2, 200)):
        answer = service.http.post(
            "/v1/videos", json={**SMALL, "priority": priority}, headers=headers
        )
        assert answer.status_code == status
        if status == 400:
            assert answer.json()["error"]["param"] == "priority"
    service.idle()


def picture(size: tuple[int, int] = (32, 32)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, np.uint8)).save(out, "PNG")
    return out.getvalue()


def test_an_upload_is_kept_and_used_by_its_id(service: Service) -> None:
    evil = "../../../etc/passwd\x00<b>\u202egnp.exe"
    answer = service.http.post("/v1/uploads", files={"file": (evil, picture(), "text/html")})
    assert answer.status_code == 200, answer.text
    told = answer.json()
    assert {**told, "id": ""} == {
        **{"id": "", "object": "upload", "bytes": len(picture()), "media_type": "image/png"},
        **{"width": 32, "height": 32, "num_frames": 1, "fps": 1.0},
    }
    stored = {path.name for path in (service.data / "uploads").iterdir()}
    assert all(re.fullmatch("[0-9a-f]{64}", name) for name in stored)
    assert told["id"].removeprefix("upload_") in stored
    job = service.create(input_reference={"upload": told["id"]})
    assert service.ended(job["id"])["status"] == "completed"
    asked = service.http.get(f"/v1/videos/{job['id']}/request").text
    assert "passwd" not in asked


def test_uploads_that_wait_hold_nobody_up(service: Service, monkeypatch) -> None:
    """As many as asyncio's own threads, and more, while a job is ordered."""
    taken = threading.Event()
    monkeypatch.setattr(service.app.state.intake, "examine", lambda _path: taken.wait(30))
    with ThreadPoolExecutor(12) as clients:
        sent = [
            clients.submit(
                httpx.post,
                f"{service.url}/v1/uploads",
                files={"file": ("a.png", picture())},
                headers={"Authorization": f"Bearer {ALICE}"},
                timeout=60,
            )
            for _ in range(12)
        ]
        begun = time.monotonic()
        service.create()
        assert time.monotonic() - begun < 15
        assert not any(one.done() for one in sent)
        taken.set()
    service.idle()


@pytest.mark.parametrize(
    ("files", "data", "status", "code"),
    [
        ({"file": ("a.png", picture()[:60])}, {}, 400, "unreadable_media"),
        ({"file": ("a.mp4", b"#EXTM3U\nhttp://127.0.0.1/x")}, {}, 400, "unreadable_media"),
        ({"file": ("a.png", b"")}, {}, 400, "unreadable_media"),
        ({"other": ("a.png", picture())}, {}, 400, "invalid_value"),
        ({"file": ("a.png", picture())}, {"x": "1"}, 400, "invalid_value"),
        ({}, {"file": "text"}, 400, "invalid_value"),
        ({"file": ("a.png", b"\x89PNG\r\n\x1a\n" + b"x" * 400_000)}, {}, 413, "body_too_large"),
    ],
)
def test_uploads_that_are_none_are_refused(
    service: Service, files: Any, data: Any, status: int, code: str
) -> None:
    before = set((service.data / "uploads").iterdir())
    answer = service.http.post("/v1/uploads", files=files or None, data=data)
    assert (answer.status_code, code_of(answer)) == (status, code)
    assert set((service.data / "uploads").iterdir()) == before
    for secret in (str(service.data), "/proc", "/work", "/tmp"):
        assert secret not in answer.text


def test_forms_have_bounds(service: Service) -> None:
    many = {f"field{i}": "x" for i in range(65)}
    long = {"prompt": "x" * 290_000}
    boundary = "-" * 60
    for sent in ({"data": many, "files": {"f": b""}}, {"data": long, "files": {"f": b""}}):
        answer = service.http.post("/v1/videos", **sent)  # type: ignore[arg-type]
        assert answer.status_code == 400, answer.text
    odd = service.http.post(
        "/v1/videos",
        content=b"--" + boundary.encode() * 1000,
        headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    assert odd.status_code == 400


def test_hosts_and_origins_of_others_are_refused(service: Service) -> None:
    for path in ("/health", "/v1/videos"):
        answer = service.http.get(path, headers={"Host": "evil.example"})
        assert (answer.status_code, code_of(answer)) == (421, "misdirected")
    answer = service.http.post("/v1/videos", json=SMALL, headers={"Origin": "http://evil.example"})
    assert (answer.status_code, code_of(answer)) == (403, "foreign_origin")
    for answer in (service.http.get("/v1/videos"), service.http.get("/health")):
        assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])


def test_pages_of_named_origins_may_ask(tmp_path: Path) -> None:
    friend, key = "https://friend.example", "a-key-of-some-length"
    with served(tmp_path / "data", cors=(friend,), api_key=key) as made:
        wanted = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        for origin, allowed in ((friend, friend), ("https://evil.example", None)):
            before = made.http.options("/v1/videos", headers={"Origin": origin, **wanted})
            assert before.headers.get("access-control-allow-origin") == allowed
            assert "access-control-allow-credentials" not in before.headers
            given = {"Origin": origin, "Authorization": f"Bearer {key}"}
            answer = made.http.post("/v1/videos", json=SMALL, headers=given)
            assert answer.status_code == (200 if allowed else 403)
            assert answer.headers.get("access-control-allow-origin") == allowed
        shut = made.http.get("/v1/videos", headers={"Origin": friend})
        assert shut.status_code == 401
        made.idle()


def test_a_cookie_is_enough_for_pages(service: Service) -> None:
    with httpx.Client(base_url=service.url) as page:
        assert page.post("/session", json={"key": "x" * 40}).status_code == 401
        assert page.get("/v1/videos").status_code == 401
        assert page.post("/session", json={"key": ALICE}).status_code == 204
        assert page.get("/v1/videos").status_code == 200
        assert page.delete("/session").status_code == 204
        assert page.get("/v1/videos").status_code == 401


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Log lines as the service lets them through; those of later tests are whole again."""
    caplog.set_level(logging.DEBUG)
    with caplog.filtering(NoPrompts()):
        yield caplog


def test_no_path_key_or_prompt_leaks(service: Service, told: pytest.LogCaptureFixture) -> None:
    """All answers of a run, its files and its log lines are searched."""
    answers: list[httpx.Response] = []

    def ask(method: str, path: str, **what: Any) -> httpx.Response:
        answers.append(service.http.request(method, path, **what))
        return answers[-1]

    prompt = f"a {SECRET_WORD} " + "that plays on and on " * 200  # over what the encoder reads
    upload = ask("POST", "/v1/uploads", files={"file": ("a.png", picture())}).json()["id"]
    made = ask(
        "POST",
        "/v1/videos",
        json={**SMALL, "prompt": prompt, "input_reference": {"upload": upload}},
    ).json()
    service.ended(made["id"])
    bad = {"timeline": {"clips": [{"upload": upload, "start": 5}]}}
    failing = ask("POST", "/v1/videos", json={**SMALL, "prompt": prompt, **bad})
    if failing.status_code == 200:
        service.ended(failing.json()["id"])
        ask("GET", f"/v1/videos/{failing.json()['id']}")
    for path in ("", "/request", "/content", "/content?variant=thumbnail", "/preview", "/nothing"):
        ask("GET", f"/v1/videos/{made['id']}{path}")
    missing = {"upload": "upload_" + "0" * 64}
    ask("POST", "/v1/videos", json={**SMALL, "input_reference": missing})
    for path in ("/metrics", "/health", "/ready", "/v1/models", "/v1/videos", "/docs", "/%2e%2e"):
        ask("GET", path)
    ask("POST", "/v1/videos", json={**SMALL, "size": "7x"})
    ask("POST", "/v1/videos", content=b"{", headers={"Content-Type": "application/json"})
    remixed = ask("POST", f"/v1/videos/{made['id']}/remix", json={"prompt": "other"}).json()
    service.ended(remixed["id"])
    video = ask("GET", f"/v1/videos/{remixed['id']}/content")
    assert b"ftyp" in video.content[:16]

    paths = [str(service.data), str(Path(__file__).parents[2]), "/site-packages", "/proc/"]
    name = socket.gethostname()
    secrets = [*paths, ALICE, BOB, hash_of(ALICE), *([name] if len(name) > 5 else [])]
    sent = [answer.content + repr(answer.headers.raw).encode() for answer in answers]
    folder = service.data / "videos"
    sent += [file.read_bytes() for file in folder.rglob("*") if file.is_file()]
    for secret in secrets:
        assert not [one[:200] for one in sent if secret.encode() in one], secret
    lines = [JsonLines().format(record) for record in told.records]
    assert any(made["id"] in line for line in lines)
    for line in lines:
        for word in (SECRET_WORD, ALICE, BOB):
            assert word not in line, line
    stored = (service.data / "jobs.sqlite").read_bytes() + (
        service.data / "jobs.sqlite-wal"
    ).read_bytes()
    assert ALICE.encode() not in stored
    assert SECRET_WORD.encode() in stored  # the search finds what is there


def test_log_lines_are_json_and_name_the_request(service: Service, caplog) -> None:
    caplog.set_level(logging.INFO, logger="sora_engine.serve.requests")
    answer = service.http.get("/v1/videos/nothing%0aforged")
    until = time.monotonic() + 5
    while not caplog.records and time.monotonic() < until:
        time.sleep(0.01)
    told = json.loads(JsonLines().format(caplog.records[-1]))
    assert told["message"] == "GET /v1/videos/nothing\\nforged 404"
    assert told["request_id"] == answer.headers["x-request-id"]
    assert told["owner"] == "alice"
    assert told["level"] == "info"
    assert told["ms"] > 0
    failed = logging.makeLogRecord({"msg": "it\nfailed", "name": "x"})
    assert "\n" not in JsonLines().format(failed)


def test_the_data_folder_is_its_owners_alone(service: Service) -> None:
    assert service.data.stat().st_mode & 0o077 == 0


def test_spans_need_the_api(monkeypatch) -> None:
    import builtins

    from sora_engine.serve.tracing import Tracing

    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(name=name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendError, match="pip install opentelemetry-api"):
        Tracing()
    assert not Settings().otel


def test_the_command_itself_is_guarded(nursery: Nursery, tmp_path: Path) -> None:
    """What `sora serve` listens with, and not only the application."""
    with Server(nursery, tmp_path / "data", header_timeout="0.5s", body_timeout="0.5s") as server:
        port = int(server.url.rpartition(":")[2])
        with connected(port) as sock:
            begun = time.monotonic()
            sock.sendall(b"GET /health HTTP/1.1\r\nHo")
            until_closed(sock, 20)
            assert time.monotonic() - begun < 10
        head = b"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: 90\r\n"
        with connected(port) as sock:
            sock.sendall(head + b"Content-Type: application/json\r\n\r\n{")
            assert status_of(until_closed(sock, 20)) == 408
        took = []
        for _ in range(15):
            begun = time.monotonic()
            assert server.http.get("/health").headers.get("server") is None
            took.append(time.monotonic() - begun)
        assert sorted(took)[7] < 0.035  # 0.04 and more where an answer waits for acknowledgements


def test_a_stream_sees_the_end_of_a_drain(nursery: Nursery, tmp_path: Path) -> None:
    with Server(nursery, tmp_path / "data", faults={"slow_steps": 50}) as server:
        name = server.create(num_inference_steps=20)["id"]
        with server.http.stream("GET", f"/v1/videos/{name}/events") as answer:
            lines = answer.iter_lines()
            while "denoising-" not in next(lines):
                pass
            server.signal(signal.SIGTERM)
            last = [line for line in lines if line.startswith("event: ")][-1]
        assert last == "event: done"
        assert server.ended() == 0
