"""Pictures and clips by their addresses, where the operator allows that: of the Internet alone.

A server that fetches what strangers name can be made to ask what only it can reach (server-side
request forgery). So a name is resolved once, each of its addresses must be a public one, and the
connection goes to an address that was checked: a name that means another machine a moment later
(DNS rebinding) gains nothing. Redirects are not followed, the environment's proxies are not asked,
and the port is that of the scheme.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import IO
from urllib.parse import SplitResult, urlsplit

from sora_engine.errors import MediaError

PORTS = {"http": 80, "https": 443}
FETCH_S = 20.0
"""How long an address may take in all."""
AT_ONCE = 8
"""Addresses that are being fetched; further ones wait, for as long as one may take."""
MOST_CHARS = 2000
_CHUNK = 256 << 10
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = tuple[socket.AddressFamily, str]


def resolved(host: str, port: int) -> list[Address]:
    """The addresses of a name; raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(socket.AddressFamily(family), str(where[0])) for family, _, _, _, where in found]


def is_public(address: str) -> bool:
    """Whether an address is one of the public Internet, and hides none that is not."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # with a zone, which public addresses do not have
        return False
    if isinstance(found, ipaddress.IPv6Address):
        # These carry an IPv4 address, which a gateway on the way may go on to.
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        if found.sixtofour is not None or found.teredo is not None or found in _NAT64:
            return False
    return found.is_global and not found.is_multicast and not found.is_reserved


class Fetcher:
    """Fetches what clients name. Safe to use from any thread; a fetch may take `seconds`."""

    def __init__(
        self,
        most_bytes: int,
        *,
        seconds: float = FETCH_S,
        resolve: Callable[[str, int], list[Address]] = resolved,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        """most_bytes: of a file. resolve, allowed: of tests."""
        self._most, self._seconds = most_bytes, seconds
        self._resolve, self._allowed = resolve, allowed
        self._places = threading.BoundedSemaphore(AT_ONCE)

    def fetch(self, url: str, out: IO[bytes]) -> None:
        """Write what an address holds; MediaError, which tells nothing of whom it reached."""
        parts = _checked(url)
        if not self._places.acquire(timeout=self._seconds):
            raise MediaError("the server fetches as many addresses as it may; ask again")
        try:
            self._fetch(parts, out)
        except MediaError:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise MediaError("the address gives no file") from error
        finally:
            self._places.release()

    def _fetch(self, parts: SplitResult, out: IO[bytes]) -> None:
        host, port = parts.hostname or "", PORTS[parts.scheme]
        until = time.monotonic() + self._seconds
        addresses = self._resolve(host, port)
        if not addresses or not all(self._allowed(address) for _, address in addresses):
            raise MediaError("the address is none of the public Internet")
        with self._connected(parts.scheme, host, port, addresses[0], until) as connection:
            path = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
            headers = {"Accept": "image/*, video/*", "Accept-Encoding": "identity"}
            connection.request("GET", path, headers={**headers, "Connection": "close"})
            answer = connection.getresponse()
            if answer.status != 200:
                told = "a redirect, which is not followed" if 300 <= answer.status < 400 else ""
                raise MediaError(f"the address answers {told or answer.status}")
            size = 0
            while chunk := answer.read1(_CHUNK):
                size += len(chunk)
                if size > self._most:
                    raise MediaError(f"the address holds over {self._most} bytes")
                out.write(chunk)
            if time.monotonic() >= until:
                raise MediaError(f"the address takes over {self._seconds:g} s")
            if answer.length:  # what was announced did not all come
                raise MediaError("the address gives no whole file")

    @contextlib.contextmanager
    def _connected(
        self, scheme: str, host: str, port: int, address: Address, until: float
    ) -> Iterator[http.client.HTTPConnection]:
        """A connection to this address, which is cut when its time is over."""
        family, where = address
        raw = socket.socket(family, socket.SOCK_STREAM)
        # Time-outs of a socket are for one call, and drops may come for ever. A copy, as TLS takes
        # the first one away.
        handle = raw.dup()
        cut = threading.Timer(max(0.0, until - time.monotonic()), _cut, (handle,))
        cut.daemon = True
        cut.start()
        try:
            raw.settimeout(self._seconds)
            raw.connect((where, port))
            made = raw
            if scheme == "https":
                made = ssl.create_default_context().wrap_socket(raw, server_hostname=host)
            connection = http.client.HTTPConnection(host, port)
            connection.sock = made
            with contextlib.closing(made):
                yield connection
        finally:
            cut.cancel()
            handle.close()
            raw.close()


def _cut(handle: socket.socket) -> None:
    with contextlib.suppress(OSError):
        handle.shutdown(socket.SHUT_RDWR)


def _checked(url: str) -> SplitResult:
    """The parts of an address that may be asked."""
    try:
        if len(url) > MOST_CHARS or not url.isascii() or not url.isprintable() or " " in url:
            raise ValueError
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise MediaError("the address is none: https://HOST/PATH would work") from None
    if parts.scheme not in PORTS or not parts.hostname:
        raise MediaError("the address is neither http:// nor https://")
    if parts.username is not None or parts.password is not None:
        raise MediaError("the address has a user's name in it; leave that out")
    if port is not None and port != PORTS[parts.scheme]:
        raise MediaError(f"the address has a port that is not asked; {PORTS[parts.scheme]} is")
    return parts
