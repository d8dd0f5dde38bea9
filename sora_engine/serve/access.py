"""Who may call what: keys and cookies, and what keeps a user's browser from being turned on them.

The rules hold without a key too. A page of another site that a browser shows can send requests to
a loopback server: its `Host` is not ours where a name was rebound (RFC 9110, 7.4), and its `Origin`
is its own where it posts.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from hashlib import sha256
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from sora_engine.serve.failures import ApiError
from sora_engine.serve.keys import LOOPBACK, Key, Keys
from sora_engine.serve.refusal import header, headers, refuse

COOKIE = "sora_session"
SESSION_S = 12 * 3600.0
MAX_SESSIONS = 1000
NOBODY = ""
"""The owner of jobs on a server without keys."""

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OPEN = frozenset(
    {
        *(("GET", path) for path in ("/health", "/ready", "/v1/models", "/", "/favicon.ico")),
        ("POST", "/session"),
    }
)
_OPEN_BELOW = ("/v1/models/", "/page/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Who calls. by_cookie: the page's, whose key the server does not see again."""

    owner: str = NOBODY
    key: Key | None = None
    by_cookie: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRules:
    """keys: None lets everybody in. hosts: names by which the server may be called beside
    loopback's and addresses, without ports; "*" for any. origins: of other sites whose pages may
    call. open_metrics: `/metrics` needs no key."""

    keys: Keys | None = None
    hosts: Collection[str] = ()
    origins: Collection[str] = ()
    open_metrics: bool = True


class Sessions:
    """Cookies of pages: random, kept as hashes, in memory alone."""

    def __init__(self) -> None:
        self._live: dict[bytes, tuple[float, Key]] = {}

    def begin(self, key: Key) -> str:
        """A new cookie's value."""
        now = time.monotonic()
        self._live = {digest: live for digest, live in self._live.items() if live[0] > now}
        while len(self._live) >= MAX_SESSIONS:
            del self._live[next(iter(self._live))]
        token = secrets.token_urlsafe(32)
        self._live[_digest(token)] = now + SESSION_S, key
        return token

    def key_for(self, token: str) -> Key | None:
        """Looked up by hash: what the time of a lookup tells is of no use."""
        until, key = self._live.get(_digest(token), (0.0, None))
        return key if until > time.monotonic() else None

    def end(self, token: str) -> None:
        self._live.pop(_digest(token), None)


def set_cookie(token: str, *, secure: bool, max_age_s: float = SESSION_S) -> str:
    """The header's value. Not readable by scripts, and never sent along from another site."""
    parts = [f"{COOKIE}={token}", "Path=/", "HttpOnly", "SameSite=Strict"]
    parts += [f"Max-Age={max_age_s:.0f}"] + ["Secure"] * secure
    return "; ".join(parts)


@dataclass(slots=True)
class Access:
    """ASGI middleware. It puts the `Caller` into `scope["state"]["caller"]`, or refuses."""

    app: ASGIApp
    rules: AccessRules = field(default_factory=AccessRules)
    sessions: Sessions = field(default_factory=Sessions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # no other protocol is served
        refused = self._of_site(scope)
        if refused is not None:
            await refuse(send, refused)
            return
        caller = self._caller(scope)
        if caller is None and not self._is_open(scope):
            told = "a key is needed, as Authorization: Bearer KEY"
            if header(scope, b"authorization"):
                told = "the key is not known; " + told
            challenge = {"www-authenticate": "Bearer"}
            await refuse(send, ApiError(401, "invalid_api_key", told, headers=challenge))
            return
        state = scope.setdefault("state", {})
        state["caller"] = caller = caller or Caller()
        if caller.key is not None:
            state["owner"] = caller.owner
        await self.app(scope, receive, send)

    def _of_site(self, scope: Scope) -> ApiError | None:
        named = headers(scope, b"host")
        host = host_name(named[0]) if len(named) == 1 else ""
        known = host in LOOPBACK or host in self.rules.hosts or "*" in self.rules.hosts
        if not (known or is_address(host)):
            return ApiError(
                421, "misdirected", "this server is not called so; --allow-host NAME lets it be"
            )
        origin = header(scope, b"origin")
        if (
            origin is not None
            and scope["method"] not in _SAFE
            and origin not in self.rules.origins
            and place_of(origin) != named[0].lower()
        ):
            return ApiError(403, "foreign_origin", "pages of other sites may not call this server")
        return None

    def _is_open(self, scope: Scope) -> bool:
        method, path = scope["method"], scope["path"]
        method = "GET" if method == "HEAD" else method
        if path == "/metrics":
            return self.rules.open_metrics and method == "GET"
        below = method == "GET" and path.startswith(_OPEN_BELOW)
        return (method, path) in _OPEN or below

    def _caller(self, scope: Scope) -> Caller | None:
        """None: whom nobody knows."""
        keys = self.rules.keys
        if keys is None:
            return Caller()
        given = header(scope, b"authorization")
        if given is not None:  # it counts, and not a cookie beside it
            scheme, _, presented = given.partition(" ")
            key = keys.key_for(presented.strip())
            return _of_key(key) if key and scheme.lower() == "bearer" else None
        token = session_token(scope)
        session = None if token is None else self.sessions.key_for(token)
        return None if session is None else _of_key(session, by_cookie=True)


def _of_key(key: Key, *, by_cookie: bool = False) -> Caller:
    return Caller(owner=key.owner, key=key, by_cookie=by_cookie)


def session_token(scope: Scope) -> str | None:
    """The cookie that a request brings."""
    for value in headers(scope, b"cookie"):
        try:
            morsel = SimpleCookie(value).get(COOKIE)
        except CookieError:
            continue
        if morsel is not None:
            return morsel.value
    return None


def host_name(host: str) -> str:
    """The name in a `Host` header, without its port and the brackets of IPv6; "" for nonsense."""
    try:
        parts = urlsplit(f"//{host}")
        _ = parts.port
    except ValueError:
        return ""
    odd = parts.path or parts.query or parts.fragment or parts.username is not None
    return "" if odd else (parts.hostname or "").rstrip(".")


def is_address(host: str) -> bool:
    """Whether it is an IP address: no name server had a say in it, so nothing was rebound."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def place_of(origin: str) -> str:
    """Name and port of an origin; "" for `null` and nonsense."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def same_owner(row_owner: str, caller: Caller) -> bool:
    """Whether a job is the caller's. Another's is answered as one that is not there."""
    return hmac.compare_digest(row_owner.encode(), caller.owner.encode())


def _digest(token: str) -> bytes:
    return sha256(token.encode("utf-8", "surrogateescape")).digest()
