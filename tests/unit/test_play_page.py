"""`sora play --page`: a server on this machine alone, asked as a browser asks it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sora_engine as sora
from sora_engine.cli.app import UsageError
from sora_engine.cli.play import page
from sora_engine.cli.play.page import PageServer
from sora_engine.cli.play.player import Player
from sora_engine.request import Action
from tests.unit.world_folder import save_world

ROOT = Path(__file__).parents[2]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained(folder) as loaded:
        yield loaded


@pytest.fixture
def served(engine: sora.Engine, tmp_path: Path) -> Iterator[tuple[PageServer, sora.Session]]:
    with engine.open_session(sora.SessionRequest(seed=5)) as world:
        player = Player(world, tmp_path / "play.mp4")
        with PageServer(player, 0) as server:
            loop = threading.Thread(target=server.serve_forever, args=(0.05,))
            loop.start()
            player.start()
            try:
                yield server, world
            finally:
                player.stop()
                loop.join(20)
                assert not loop.is_alive()  # it ends with the world


def ask(
    server: PageServer, method: str, path: str, body: object = None, **headers: str
) -> tuple[int, bytes, http.client.HTTPMessage]:
    connection = http.client.HTTPConnection(page.HOST, server.port, timeout=20)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        kind = JSON if body is not None else {}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {**kind, **named})
        reply = connection.getresponse()
        return reply.status, reply.read(), reply.headers
    finally:
        connection.close()


def state(server: PageServer) -> dict[str, object]:
    return json.loads(ask(server, "GET", "/state")[1])


def until(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def pictures(server: PageServer, count: int) -> list[np.ndarray]:
    """The first PNGs of the stream, as a browser takes it apart."""
    connection = http.client.HTTPConnection(page.HOST, server.port, timeout=20)
    try:
        connection.request("GET", "/stream")
        reply = connection.getresponse()
        kind = reply.headers["Content-Type"]
        assert kind == "multipart/x-mixed-replace; boundary=frame"
        found = []
        assert reply.readline() == b"--frame\r\n"
        while len(found) < count:
            assert reply.readline() == b"Content-Type: image/png\r\n"
            length = re.fullmatch(rb"Content-Length: (\d+)\r\n", reply.readline())
            assert reply.readline() == b"\r\n"
            with Image.open(io.BytesIO(reply.read(int(length[1])))) as image:
                found.append(np.asarray(image))
            assert reply.readline() == b"\r\n"
            assert reply.readline() == b"--frame\r\n"
        return found
    finally:
        connection.close()


def test_a_page_plays_a_world(served) -> None:
    """Buttons go down and up, commands are done, and the pictures are the world's frames."""
    server, world = served
    status, body, headers = ask(server, "GET", "/")
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    assert b'<img id="view" src="/stream"' in body
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    told = state(server)
    assert told["keys"]["space"] == "act"
    assert told["commands"] == {
        "z": "rewind", "m": "mark", "b": "branch", "tab": "next", "r": "record", "p": "pause",
    }  # fmt: skip
    assert ask(server, "POST", "/held", {"held": ["right"], "tapped": ["right"]})[0] == 204
    until(lambda: sum(times for action, times in world.log if action == Action("right")) > 2)
    assert ask(server, "POST", "/held", {"held": []})[0] == 204
    assert ask(server, "POST", "/held", {"tapped": ["act"]})[0] == 204
    until(lambda: Action("act") in dict(world.log))
    seen = pictures(server, 8)
    assert ask(server, "POST", "/do", {"do": "pause"})[0] == 204
    until(lambda: state(server)["paused"])
    actions = world.log
    assert sum(times for action, times in actions if action == Action("act")) == 1
    assert actions[-1][0] == Action()
    with world.owner.open_session(sora.SessionRequest(seed=5)) as again:
        made = [*again.frames]
        for action, times in actions:
            for _ in range(times):
                made += [*again.step(action)]
    numbers = {frame.tobytes(): i for i, frame in enumerate(made)}
    order = [numbers[np.ascontiguousarray(each).tobytes()] for each in seen]
    assert order == sorted(set(order))


def test_the_keys_of_a_page_that_has_gone_are_let_go(served, monkeypatch) -> None:
    server, world = served
    monkeypatch.setattr(page, "SILENT_S", 0.2)
    assert ask(server, "POST", "/held", {"held": ["left"], "tapped": ["left"]})[0] == 204
    until(lambda: world.log and world.log[-1][0] == Action("left"))
    until(lambda: world.log[-1][0] == Action())


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("GET", "/", None, {"Host": "evil.example"}, 403, "this is not evil.example; it is 127"),
        ("GET", "/state", None, {"Host": "127.0.0.1"}, 403, "this is not 127.0.0.1; it is 127"),
        ("GET", "/stream", None, {"Host": "evil.example:80"}, 403, "this is not"),
        ("POST", "/do", {"do": "mark"}, {"Host": "evil.example"}, 403, "this is not"),
        ("POST", "/do", {"do": "mark"}, {"Origin": "http://evil.example"}, 403, "may not play"),
        ("POST", "/do", {"do": "mark"}, {"Origin": "null"}, 403, "may not play here"),
        ("POST", "/do", {"do": "mark"}, {"Content_Type": "text/plain"}, 400, "application/json"),
        ("POST", "/do", {"do": "quit"}, {}, 400, "a page can do rewind, record, mark"),
        ("POST", "/do", b"[1]", {}, 400, "the body must be a JSON object"),
        ("POST", "/do", b"{", {}, 400, "Expecting property name"),
        ("POST", "/do", b"\xff", {}, 400, "utf-8"),
        ("POST", "/do", b" " * 5000, {}, 400, "a Content-Length of at most 4096, got '5000'"),
        ("POST", "/held", {"held": ["rihgt"]}, {}, 400, "the nearest is 'right'"),
        ("POST", "/held", {"held": "right"}, {}, 400, "held must be a list of buttons"),
        ("POST", "/", {}, {}, 404, "there is no /"),
        ("GET", "/etc/passwd", None, {}, 404, "there is no /etc/passwd"),
    ],
)
def test_what_a_page_may_not_do(bare, method, path, body, headers, status, words) -> None:
    found, reply, _ = ask(bare, method, path, body, **headers)
    assert found == status
    assert words in json.loads(reply)["error"]


@pytest.fixture(scope="module")
def bare(engine: sora.Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageServer]:
    """A server with a player that does not play."""
    with (
        engine.open_session(sora.SessionRequest(seed=5)) as world,
        PageServer(Player(world, tmp_path_factory.mktemp("out") / "play.mp4"), 0) as server,
    ):
        loop = threading.Thread(target=server.serve_forever, args=(0.05,))
        loop.start()
        yield server
        server.shutdown()
        loop.join(20)


def test_a_port_that_is_taken_is_told(bare) -> None:
    with pytest.raises(UsageError, match=rf"--page: port {bare.port} cannot be had: "):
        PageServer(bare.player, bare.port)


def test_it_listens_on_this_machine_alone(bare) -> None:
    assert bare.server_address[0] == "127.0.0.1"
    assert ask(bare, "GET", "/state", Host=f"localhost:{bare.port}")[0] == 200


def test_the_command_says_where_and_ends_with_ctrl_c(folder: Path, tmp_path: Path) -> None:
    program = subprocess.Popen(
        [sys.executable, "-m", "sora_engine", "play", "--page", "--model", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
            "OMP_NUM_THREADS": "1",
        },
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        for line in program.stdout:
            if found := re.match(r"http://127\.0\.0\.1:(\d+) has it; Ctrl-C ends it", line):
                break
        with contextlib.closing(
            http.client.HTTPConnection(page.HOST, int(found[1]), timeout=20)
        ) as connection:
            connection.request("GET", "/state")
            assert json.loads(connection.getresponse().read())["worlds"] == 1
        with socket.create_connection((page.HOST, int(found[1]))) as watcher:
            watcher.sendall(
                f"GET /stream HTTP/1.1\r\nHost: {page.HOST}:{found[1]}\r\n\r\n".encode()
            )
            assert b"200 OK" in watcher.recv(4096)
            program.send_signal(signal.SIGINT)  # while somebody watches
            out, err = program.communicate(timeout=60)
        assert program.returncode == 0, err
        assert " steps, seed " in out.splitlines()[-1]
    finally:
        program.kill()
        program.wait()
