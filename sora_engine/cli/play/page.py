"""A world on a page of one's own machine: pictures one way, the keys that are down the other."""

from __future__ import annotations

import io
import json
import socketserver
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from sora_engine.cli.app import UsageError
from sora_engine.cli.play.hands import bindings
from sora_engine.cli.play.player import COMMANDS, Player
from sora_engine.errors import ActionError
from sora_engine.request import Action

HOST = "127.0.0.1"
BOUNDARY = "frame"
MOST_BODY = 4096
"""Bytes of what a page may say."""
SILENT_S = 2.0
"""A page says twice a second which keys are down. One that says nothing for so long has gone."""
PAGE = Path(__file__).with_name("page.html")
_SAFE = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": (
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
        "script-src 'unsafe-inline'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    ),
}


class PageServer(ThreadingHTTPServer):
    """Serves one player to pages of this machine, and to nobody else.

    GET `/`, `/stream` (PNGs, one after the other), `/state` (JSON); POST `/held` with `{"held":
    [...], "tapped": [...]}`, and `/do` with `{"do": "rewind"}`.
    """

    daemon_threads = True

    def __init__(self, player: Player, port: int) -> None:
        self.player = player
        self._held: frozenset[str] = frozenset()
        self._heard_at = time.monotonic()
        self._lock = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UsageError(f"--page: port {port} cannot be had: {error}") from error

    def server_bind(self) -> None:
        """Without the look-up of a name that the library's own does, which may take long."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.port

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a page of this machine calls it. Another site's name that leads here is no such."""
        return f"{HOST}:{self.port}", f"localhost:{self.port}"

    def hold(self, held: frozenset[str], tapped: frozenset[str]) -> None:
        """These buttons are down now, those were pressed in the meantime. ActionError."""
        self.player.world.actions.check(Action(held | tapped))
        with self._lock:
            keys = self.player.keys
            keys.release(*(self._held - held))
            keys.press(*(held - self._held))
            keys.tap(*tapped)
            self._held, self._heard_at = held, time.monotonic()

    def service_actions(self) -> None:
        """Twice a second: let go of the keys of a page that has gone, and end with the player."""
        with self._lock:
            if self._held and time.monotonic() - self._heard_at > SILENT_S:
                self.player.keys.release(*self._held)
                self._held = frozenset()
        if self.player.over:
            # From another thread, as it waits for the loop that calls this.
            threading.Thread(target=self.shutdown, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer
    timeout = 30

    def do_GET(self) -> None:
        if not self._from_here():
            return
        if self.path == "/":
            self._send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif self.path == "/state":
            self._send_json(self._state())
        elif self.path == "/stream":
            self._stream()
        else:
            self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path}")

    def do_POST(self) -> None:
        if not self._from_here():
            return
        try:
            said = self._said()
            if self.path == "/held":
                held, tapped = (_names(said, key) for key in ("held", "tapped"))
                self.server.hold(held, tapped)
            elif self.path == "/do":
                self._do(said.get("do"))
            else:
                return self._refuse(HTTPStatus.NOT_FOUND, f"there is no {self.path}")
        except (ActionError, ValueError) as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        self._send(b"", "text/plain", HTTPStatus.NO_CONTENT)

    def log_message(self, format: str, *args: Any) -> None:
        """The terminal is not for requests."""

    def _from_here(self) -> bool:
        """Whether a page of this server asks. Refuses others: a site that had its name lead here
        would read along, and one that posts here would play."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host not in self.server.hosts:
            self._refuse(
                HTTPStatus.FORBIDDEN,
                f"this is not {host or 'a host without a name'}; it is {self.server.hosts[0]}",
            )
        elif origin is not None and origin not in {f"http://{name}" for name in self.server.hosts}:
            self._refuse(HTTPStatus.FORBIDDEN, f"a page of {origin} may not play here")
        else:
            return True
        return False

    def _said(self) -> dict[str, Any]:
        """The body of a POST. ValueError for what is no JSON object."""
        length = self.headers.get("Content-Length", "")
        if not length.isdigit() or int(length) > MOST_BODY:
            self.close_connection = True
            raise ValueError(f"a body has a Content-Length of at most {MOST_BODY}, got {length!r}")
        body = self.rfile.read(int(length))
        # No other site's page may send this type unasked.
        if self.headers.get_content_type() != "application/json":
            raise ValueError("the Content-Type must be application/json")
        said = json.loads(body)
        if not isinstance(said, dict):
            raise ValueError("the body must be a JSON object")
        return said

    def _do(self, command: object) -> None:
        known = [name for name in COMMANDS.values() if name != "quit"]
        if command not in known:
            raise ValueError(f"a page can do {', '.join(known)}, not {command!r}")
        self.server.player.do(str(command))

    def _state(self) -> dict[str, Any]:
        player = self.server.player
        return {
            **player.status.values,
            "message": player.status.message,
            "keys": bindings(player.world.actions.buttons),
            "commands": {k: v for k, v in COMMANDS.items() if v != "quit"},
            "over": player.over,
        }

    def _stream(self) -> None:
        """Frames as they are due, until the page has gone or the world is over."""
        from sora_engine.io.images import write_png

        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.send_header("Connection", "close")
        self._safe_headers()
        self.close_connection = True
        try:
            self.wfile.write(f"--{BOUNDARY}\r\n".encode())
            number, player = 0, self.server.player
            while not player.over:
                seen = player.next(number, 1.0)
                if seen is None:
                    continue
                number = seen.number
                picture = io.BytesIO()
                write_png(picture, seen.frame)
                data = picture.getvalue()
                head = f"Content-Type: image/png\r\nContent-Length: {len(data)}\r\n\r\n"
                # The boundary comes with the picture: browsers show one when they see its end.
                self.wfile.write(head.encode() + data + f"\r\n--{BOUNDARY}\r\n".encode())
        except OSError:  # nobody watches any more
            return

    def _send_json(self, values: dict[str, Any]) -> None:
        self._send(json.dumps(values).encode(), "application/json")

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self.close_connection = True  # what else it sent is not read
        self._send(json.dumps({"error": why}).encode(), "application/json", status)

    def _send(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status is not HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(body)))
        self._safe_headers()
        self.wfile.write(body)

    def _safe_headers(self) -> None:
        for name, value in _SAFE.items():
            self.send_header(name, value)
        self.end_headers()


def _names(said: dict[str, Any], key: str) -> frozenset[str]:
    names = said.get(key, [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{key} must be a list of buttons")
    return frozenset(names)
