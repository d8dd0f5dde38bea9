"""Addresses that clients name: refused unless the operator allows them, and never a private one."""

from __future__ import annotations

import contextlib
import datetime
import io
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.serve import fetching
from sora_engine.serve.fetching import Fetcher, is_public
from tests.serve.serving import served

LOOPBACK = [(socket.AF_INET, "127.0.0.1")]


def picture() -> bytes:
    out = io.BytesIO()
    ramp = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3) % 251
    Image.fromarray(ramp.astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


PICTURE = picture()


class Bait(BaseHTTPRequestHandler):
    """Answers by the path; the server's `asked` has all paths."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
        elif self.path == "/drops":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif self.path == "/none":
            self.send_error(404)
        else:
            length = len(PICTURE) + (100 if self.path == "/short" else 0)
            self.send_response(200)
            self.send_header("Content-Length", str(length))
            self.end_headers()
            self.wfile.write(PICTURE)
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def bait(monkeypatch: pytest.MonkeyPatch, context: ssl.SSLContext | None = None) -> Iterator[list]:
    """A server on this machine that stands for one of the Internet; what was asked of it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Bait)
    server.asked = []  # type: ignore[attr-defined]
    if context is not None:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    port = server.server_address[1]
    monkeypatch.setattr(fetching, "PORTS", {"http": port, "https": port})
    try:
        yield server.asked  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def open_fetcher(most: int = 1 << 20, seconds: float = 5.0) -> Fetcher:
    """One for which this machine is the Internet."""
    return Fetcher(
        most, seconds=seconds, resolve=lambda *_: LOOPBACK, allowed=lambda a: a == "127.0.0.1"
    )


def fetched(fetcher: Fetcher, url: str) -> bytes:
    out = io.BytesIO()
    fetcher.fetch(url, out)
    return out.getvalue()


# Of the IANA registries of special-purpose addresses (RFC 6890), an address of each.
PRIVATE = (
    *("0.0.0.0", "10.1.2.3", "100.64.0.1", "127.0.0.1", "127.255.0.9", "169.254.169.254"),
    *("172.16.0.1", "192.0.2.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.7"),
    *("224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%lo", "fc00::1"),
    *("fd12::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
    *("64:ff9b::7f00:1", "2002:7f00:1::", "2001:0:7f00:1::", "no address"),
)
PUBLIC = ("8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "::ffff:8.8.8.8")


def test_private_addresses_are_none_of_the_internet() -> None:
    assert [address for address in PRIVATE if is_public(address)] == []
    assert [address for address in PUBLIC if not is_public(address)] == []


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/",
        "http://localhost/",
        "http://localhost./",
        "http://[::1]/",
        "http://0x7f.1/",
        "http://2130706433/",
        "http://127.1/",
        "http://0/",
        "http://[::ffff:127.0.0.1]/",
        "http://169.254.169.254/latest/meta-data/",
        "http://10.0.0.1/",
        "file:///etc/hostname",
        "ftp://8.8.8.8/a.png",
        "gopher://8.8.8.8/",
        "//8.8.8.8/a.png",
        "http:///a.png",
        "http://8.8.8.8:22/a.png",
        "https://8.8.8.8:80/a.png",
        "http://8.8.8.8:99999/a.png",
        "http://user:word@8.8.8.8/a.png",
        "http://8.8.8.8/a\r\nHost: 127.0.0.1\r\n",
        "http://8.8.8.8 /a",
        "http://[::1/",
        "http://b\u00fccher.example/",
        "http://8.8.8.8/" + "a" * 3000,
    ],
)
def test_nobody_is_asked_for_what_is_not_public(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _self, where: reached.append(where))
    with pytest.raises(MediaError, match="the address"):
        fetched(Fetcher(1000), url)
    assert reached == []


def test_what_was_checked_is_what_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that means another machine the second time, or two machines at once."""
    reached: list[object] = []

    def connect(_self: socket.socket, where: object) -> None:
        reached.append(where)
        raise ConnectionRefusedError("told nobody")

    monkeypatch.setattr(socket.socket, "connect", connect)
    answers = [[(socket.AF_INET, "93.184.216.34")], LOOPBACK]
    fetcher = Fetcher(1000, resolve=lambda *_: answers.pop(0))
    with pytest.raises(MediaError, match=r"^the address gives no file$"):
        fetched(fetcher, "http://rebind.example/a.png")
    assert reached == [("93.184.216.34", 80)]
    assert len(answers) == 1
    answers = [[(socket.AF_INET, "93.184.216.34"), *LOOPBACK]]
    with pytest.raises(MediaError, match="none of the public Internet"):
        fetched(fetcher, "http://both.example/a.png")
    assert len(reached) == 1


def test_a_file_comes_whole_within_its_bounds_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with bait(monkeypatch) as asked:
        assert fetched(open_fetcher(), "http://a.example/a.png?b=c") == PICTURE
        assert fetched(open_fetcher(len(PICTURE)), "http://a.example/") == PICTURE
        for fetcher, path, told in (
            (open_fetcher(len(PICTURE) - 1), "/a", f"over {len(PICTURE) - 1} bytes"),
            (open_fetcher(), "/short", "no whole file|no file"),
            (open_fetcher(), "/none", "answers 404"),
            (open_fetcher(), "/to/secret", "redirect, which is not followed"),
        ):
            with pytest.raises(MediaError, match=told):
                fetched(fetcher, f"http://a.example{path}")
        begun = time.monotonic()
        with pytest.raises(MediaError, match=r"over 0\.3 s"):
            fetched(open_fetcher(seconds=0.3), "http://a.example/drops")
        assert time.monotonic() - begun < 1.5
        assert asked == ["/a.png?b=c", "/", "/a", "/short", "/none", "/to/secret", "/drops"]


def test_certificates_are_checked_and_slow_ones_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = own_certificate(tmp_path, "a.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(own)
    with bait(monkeypatch, context) as asked:
        with pytest.raises(MediaError, match="no file"):
            fetched(open_fetcher(), "https://a.example/a.png")
        monkeypatch.setenv("SSL_CERT_FILE", str(own))
        assert fetched(open_fetcher(), "https://a.example/a.png") == PICTURE
        with pytest.raises(MediaError, match="no file"):
            fetched(open_fetcher(), "https://other.example/a.png")
        begun = time.monotonic()
        with pytest.raises(MediaError, match=r"over 0\.5 s|no file"):
            fetched(open_fetcher(seconds=0.5), "https://a.example/drops")
        assert time.monotonic() - begun < 2.5  # all drops together take five seconds
        assert asked == ["/a.png", "/drops"]


def own_certificate(folder: Path, name: str) -> Path:
    """A certificate that nobody has signed, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = folder / "own.pem"
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path


def test_a_request_by_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(tmp_path / "data", allow_urls=True) as service, bait(monkeypatch) as asked:
        by = {"input_reference": {"image_url": "http://127.0.0.1/a.png"}}
        answer = service.http.post("/v1/videos", json={"prompt": "a", **by})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "input_reference"
        assert "none of the public Internet" in answer.json()["error"]["message"]
        assert asked == []
        service.app.state.service.fetcher = open_fetcher()
        by = {"input_reference": {"image_url": "http://a.example/a.png"}}
        name = service.create(**by)["id"]
        assert service.ended(name)["status"] == "completed"
        (upload,) = (tmp_path / "data" / "uploads").iterdir()
        assert upload.read_bytes() == PICTURE
        assert "a.example" not in service.http.get(f"/v1/videos/{name}/request").text
        service.app.state.service.fetcher = None  # as it is where the operator says nothing
        answer = service.http.post("/v1/videos", json={"prompt": "a", **by})
        assert (answer.status_code, asked) == (400, ["/a.png"])
        assert list((tmp_path / "data" / "tmp").iterdir()) == []
