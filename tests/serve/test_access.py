"""Keys, cookies, Host and Origin: who gets in, and that everything else is shut."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI, Request
from starlette.testclient import TestClient

from sora_engine.serve import keys as keys_module
from sora_engine.serve.access import Access, AccessRules, Sessions, host_name, same_owner
from sora_engine.serve.failures import ApiError
from sora_engine.serve.keys import KeyFileError, Keys, hash_of, new_key
from sora_engine.serve.session import router
from sora_engine.serve.settings import Settings

ALICE, BOB = new_key(), new_key()
OPEN = {
    *[("GET", path) for path in ("/health", "/ready", "/v1/models", "/v1/models/sprites", "/")],
    *[("GET", "/page/app.js"), ("GET", "/favicon.ico"), ("GET", "/metrics"), ("POST", "/session")],
}
PATHS = [
    *("/health", "/ready", "/metrics", "/v1/models", "/v1/models/sprites", "/v1/videos"),
    *("/v1/videos/video_0_a", "/v1/uploads", "/v1/images/generations", "/session", "/", "/nothing"),
    *("/page/app.js", "/page", "//health", "/health/", "/HEALTH", "/v1/models/../videos"),
    *("/metrics/", "/favicon.ico", "/v1/modelsx", "/page/../v1/videos"),
]
METHODS = ("GET", "HEAD", "POST", "DELETE", "PUT", "PATCH", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.write_text(
        f"# who may make videos\n\nalice {hash_of(ALICE)} max_jobs=2 max_priority=3\n"
        f"bob {hash_of(BOB)}  # another\n"
    )
    path.chmod(0o600)
    return Keys.read(path)


def served(rules: AccessRules) -> FastAPI:
    """Every method and path answers with the owner that it was let in as."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.state.keys, app.state.sessions = rules.keys, Sessions()
    app.include_router(router)

    @app.api_route("/{path:path}", methods=list(METHODS))
    async def anything(request: Request) -> dict[str, object]:
        caller = request.state.caller
        return {"owner": caller.owner, "cookie": caller.by_cookie}

    @app.exception_handler(ApiError)
    async def refused(_request: Request, error: ApiError) -> object:
        from fastapi.responses import JSONResponse

        return JSONResponse(error.envelope(), error.status)

    app.add_middleware(Access, rules=rules, sessions=app.state.sessions)
    return app


def client(rules: AccessRules, host: str = "127.0.0.1:8000") -> TestClient:
    return TestClient(served(rules), base_url=f"http://{host}")


@pytest.fixture
def shut(keys: Keys) -> Iterator[TestClient]:
    with client(AccessRules(keys=keys)) as made:
        yield made


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.mark.parametrize("path", PATHS)
def test_every_route_needs_a_key_but_those_of_a_closed_list(shut: TestClient, path: str) -> None:
    for method in METHODS:
        url = shut.base_url.copy_with(raw_path=path.encode())
        is_open = (("GET" if method == "HEAD" else method), path) in OPEN
        basic = {"Authorization": f"Basic {ALICE}"}
        wrong = {"none": {}, "wrong": bearer(ALICE[:-1] + "_"), "basic": basic}
        for name, given in wrong.items():
            answer = shut.request(method, url, headers=given)
            assert (answer.status_code != 401) is is_open, (method, name)
            if not is_open and method != "HEAD":
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert answer.headers["www-authenticate"] == "Bearer"
        assert shut.request(method, url, headers=bearer(ALICE)).status_code != 401, method


def test_a_key_is_its_owner(shut: TestClient) -> None:
    for key, owner in ((ALICE, "alice"), (BOB, "bob")):
        told = shut.get("/v1/videos", headers=bearer(key)).json()
        assert told == {"owner": owner, "cookie": False}
    with client(AccessRules()) as made:
        assert made.get("/v1/videos").json() == {"owner": "", "cookie": False}


def test_metrics_can_be_shut(keys: Keys) -> None:
    with client(AccessRules(keys=keys, open_metrics=False)) as made:
        assert made.get("/metrics").status_code == 401
        assert made.get("/metrics", headers=bearer(BOB)).status_code == 200


def test_a_session_is_a_cookie_that_ends(shut: TestClient) -> None:
    assert shut.post("/session", json={"key": "x" * 43}).status_code == 401
    assert shut.post("/session", json={"key": ALICE, "more": 1}).status_code == 422
    begun = shut.post("/session", json={"key": ALICE})
    assert begun.status_code == 204
    cookie = begun.headers["set-cookie"]
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} <= set(cookie.split("; "))
    assert "Secure" not in cookie
    assert ALICE not in cookie
    assert shut.get("/v1/videos").json() == {"owner": "alice", "cookie": True}
    # A header counts, and not the cookie beside it.
    assert shut.get("/v1/videos", headers=bearer(BOB)).json()["owner"] == "bob"
    assert shut.get("/v1/videos", headers=bearer("x" * 43)).status_code == 401
    shut.cookies.clear()
    stolen = cookie.split(";")[0].partition("=")[2]
    held = {"Cookie": f"other=1; sora_session={stolen}"}
    assert shut.get("/v1/videos", headers=held).json()["owner"] == "alice"
    assert shut.delete("/session", headers=held).status_code == 204
    assert shut.get("/v1/videos", headers=held).status_code == 401
    for odd in ("sora_session=", "sora_session=é", "=;=", "sora_session=" + "a" * 5000):
        answer = shut.get("/v1/videos", headers={"Cookie": odd.encode()})  # type: ignore[dict-item]
        assert answer.status_code == 401


def test_sessions_end_after_their_time_and_are_few(keys: Keys, monkeypatch) -> None:
    from sora_engine.serve import access

    key = keys.key_for(ALICE)
    assert key is not None
    now = [100.0]
    monkeypatch.setattr(access.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(access, "MAX_SESSIONS", 3)
    sessions = Sessions()
    tokens = [sessions.begin(key) for _ in range(4)]
    assert [sessions.key_for(token) for token in tokens] == [None, key, key, key]
    now[0] += access.SESSION_S - 1
    assert sessions.key_for(tokens[-1]) is key
    now[0] += 2
    assert sessions.key_for(tokens[-1]) is None
    sessions.begin(key)
    assert len(sessions._live) == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(h, 200) for h in ("127.0.0.1", "127.0.0.1:8000", "localhost:8000", "[::1]:8000")],
        *[
            (h, 200)
            for h in ("LOCALHOST", "localhost.", "10.1.2.3:80", "[2001:db8::1]", "mine.lan")
        ],
        *[(h, 421) for h in ("evil", "evil.example:8000", "localhost.evil", "a@localhost", "")],
        *[(h, 421) for h in ("localhost/evil", "127.0.0.1.nip.io", "localhost:port", "[::1")],
        *[(h, 421) for h in ("other.mine.lan", "localhost evil", "127.1", "0x7f000001")],
    ],
)
def test_a_host_that_is_not_ours_is_misdirected(host: str, status: int) -> None:
    with client(AccessRules(hosts=("mine.lan",))) as made:
        for path in ("/health", "/v1/videos"):
            answer = made.get(path, headers={"Host": host})
            assert answer.status_code == status
            if status == 421:
                assert answer.json()["error"]["code"] == "misdirected"
    with client(AccessRules(hosts=("*",))) as made:
        named = host_name(host)
        assert made.get("/health", headers={"Host": host}).status_code == 200 or not named


def test_two_hosts_are_none(shut: TestClient) -> None:
    twice = [("Host", "localhost"), ("Host", "evil")]
    assert shut.get("/health", headers=twice).status_code == 421


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://127.0.0.1:8000", 200),
        ("https://127.0.0.1:8000", 200),
        ("https://friend.example", 200),
        ("http://127.0.0.1:8001", 403),
        ("http://evil.example", 403),
        ("http://127.0.0.1:8000.evil.example", 403),
        ("null", 403),
        ("", 403),
        ("http://[", 403),
    ],
)
def test_pages_of_other_sites_may_not_post(origin: str | None, status: int) -> None:
    given = {} if origin is None else {"Origin": origin}
    with client(AccessRules(origins=("https://friend.example",))) as made:
        for method in ("POST", "DELETE", "PUT", "PATCH"):
            answer = made.request(method, "/v1/videos", headers=given)
            assert answer.status_code == status
            if status == 403:
                assert answer.json()["error"]["code"] == "foreign_origin"
        answer = made.get("/v1/videos", headers=given)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no key"),
        ("alice", "line 1: after the owner"),
        ("# x\nalice secret", "line 2: after the owner"),
        (f"Alice {hash_of(ALICE)}", "line 1: the owner"),
        (f"alice {hash_of(ALICE)[:-1]}", "line 1: after the owner"),
        (f"alice {hash_of(ALICE)} jobs=3", "'jobs=3'; max_jobs=N"),
        (f"alice {hash_of(ALICE)} max_jobs=0", "max_jobs must be from 1"),
        (f"alice {hash_of(ALICE)} max_priority=9", "max_priority must be from -8 to 8"),
        (f"alice {hash_of(ALICE)}\nbob {hash_of(ALICE)}", "a key twice"),
        (f"alice {hash_of(ALICE)}\nalice {hash_of(BOB)}", "an owner twice"),
        (f"alice {ALICE}", "line 1: after the owner"),
    ],
    ids=range(11),  # keys are new in each process, and names of tests the same in all
)
def test_a_key_file_that_is_wrong_says_where(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "keys"
    path.write_text(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match=message) as caught:
        Keys.read(path)
    assert ALICE not in str(caught.value)


def test_a_key_file_that_others_write_or_that_is_missing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    with pytest.raises(KeyFileError, match="No such file"):
        Keys.read(path)
    path.write_text(f"alice {hash_of(ALICE)}")
    path.chmod(0o602)
    with pytest.raises(KeyFileError, match="chmod 600"):
        Keys.read(path)


def test_keys_are_hashed_and_compared_in_constant_time(keys: Keys, monkeypatch) -> None:
    key = keys.key_for(ALICE)
    assert key is not None
    assert (key.owner, key.max_jobs, key.max_priority) == ("alice", 2, 3)
    assert key.digest == hashlib.sha256(ALICE.encode()).digest()
    assert keys.of_owner("bob") == keys.key_for(BOB)
    compared: list[bytes] = []

    def watched(one: bytes, other: bytes) -> bool:
        compared.append(one)
        return hmac.compare_digest(one, other)

    class Watched:
        compare_digest = staticmethod(watched)

    monkeypatch.setattr(keys_module, "hmac", Watched)
    for presented in (ALICE, BOB, "", "\udcff"):
        compared.clear()
        keys.key_for(presented)
        assert len(compared) == 2, "every key is compared, whichever matches"
    with pytest.raises(KeyFileError, match="at least 16"):
        Keys.of_one("short")
    assert Keys.of_one("a-long-enough-key").key_for("a-long-enough-key") is not None


def test_the_command_makes_a_key_and_its_line(tmp_path: Path, capsys) -> None:
    from sora_engine.cli import main

    assert main(["serve", "--new-key", "carol"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    path = tmp_path / "keys"
    path.write_text(second.partition(": ")[2] + " max_jobs=3\n")
    path.chmod(0o600)
    found = Keys.read(path).key_for(first.partition(": ")[2])
    assert found is not None
    assert (found.owner, found.max_jobs) == ("carol", 3)
    assert main(["serve", "--new-key", "Carol Smith"]) == 1
    told = capsys.readouterr()
    assert "the owner 'Carol Smith' must be 1 to 32" in told.err
    assert told.out == ""


def test_another_owners_job_is_not_the_callers(keys: Keys) -> None:
    from sora_engine.serve.access import Caller

    assert same_owner("alice", Caller(owner="alice"))
    assert not same_owner("alice", Caller(owner="bob"))
    assert not same_owner("alice", Caller())
    assert same_owner("", Caller())


def test_an_address_that_others_reach_needs_a_key() -> None:
    for open_to_this_machine in ("127.0.0.1", "::1", "localhost"):
        Settings(host=open_to_this_machine)
    for host in ("0.0.0.0", "::", "192.168.1.7", "example.org"):
        with pytest.raises(ValueError, match="can be reached by others"):
            Settings(host=host)
        Settings(host=host, api_key="a-long-enough-key")
        Settings(host=host, api_keys=Path("keys"))
        Settings(host=host, insecure_no_key=True)
