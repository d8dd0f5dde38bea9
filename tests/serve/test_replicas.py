"""Two servers behind one address: who has what, what passes through, and the loss of one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import av
import pytest

from tests.serve.clusters import Cluster, home_of
from tests.serve.raw import connected
from tests.serve.servers import SMALL, Nursery


@pytest.fixture(scope="module")
def two(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(nursery, tmp_path_factory.mktemp("replicas") / "data", 2) as made:
        yield made


def names(cluster: Cluster, order: str = "desc", limit: int = 100) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    after: dict[str, str] = {}
    while True:
        asked = {"order": order, "limit": limit, **after}
        page = cluster.http.get("/v1/videos", params=asked)
        assert page.status_code == 200, page.text
        told = page.json()
        found += [video["id"] for video in told["data"]]
        if not told["has_more"]:
            return found
        after = {"after": told["last_id"]}


def test_jobs_are_shared_out_and_listed_as_one(two: Cluster):
    made = [two.create(seed=i)["id"] for i in range(10)]
    for name in made:
        two.completed(name)
    assert {home_of(name) for name in made} == {"0", "1"}
    assert [name for name in names(two) if name in made] == made[::-1]
    assert names(two, limit=3) == names(two)
    assert names(two, "asc", 4) == names(two)[::-1]
    two.http.delete(f"/v1/videos/{made[4]}")
    page = two.http.get("/v1/videos", params={"after": made[4], "limit": 4}).json()
    assert [video["id"] for video in page["data"]] == made[3::-1]  # behind one that is gone
    two.new_proxy()  # it has no memory that could be lost
    assert [name for name in names(two) if name in made] == [n for n in made[::-1] if n != made[4]]
    assert two.get(made[0])["status"] == "completed"


def test_a_video_of_each_server_and_an_upload_make_one(two: Cluster):
    """What is elsewhere is read there: the jobs' folders lie beside each other."""
    homes: dict[str, str] = {}
    while len(homes) < 2:
        name = two.create()["id"]
        two.completed(name)
        homes.setdefault(home_of(name), name)
    for _ in range(4):  # wherever it is sent
        body = {"first": {"id": homes["0"]}, "second": {"id": homes["1"]}, "gap_s": 0.5}
        joined = two.http.post("/v1/videos/connect", json={**body, "num_inference_steps": 2})
        assert joined.status_code == 200, joined.text
        assert two.completed(joined.json()["id"])["num_frames"] == 5 + 4 + 5
    picture = two.http.get(f"/v1/videos/{homes['0']}/content?variant=thumbnail").content
    upload = two.http.post("/v1/uploads", files={"file": ("a.webp", picture)}).json()["id"]
    ran = set()
    for i in range(6):
        timeline = {"clips": [{"upload": upload, "at": 0}]}
        ran.add(home_of(two.completed(two.create(timeline=timeline, seed=i)["id"])["id"]))
    assert ran == {"0", "1"}
    remix = two.http.post(f"/v1/videos/{homes['1']}/remix", json={"prompt": "a blue square"})
    assert home_of(remix.json()["id"]) == "1"
    assert two.completed(remix.json()["id"])["remixed_from_video_id"] == homes["1"]


def test_streams_ranges_and_errors_pass_through(two: Cluster):
    name = two.create(num_frames=9, num_inference_steps=8)["id"]
    with two.http.stream("GET", f"/v1/videos/{name}/events") as stream:
        events = [line for line in stream.iter_lines() if line.startswith("event:")]
    assert events[-1] == "event: done"
    whole = two.http.get(f"/v1/videos/{name}/content")
    part = two.http.get(f"/v1/videos/{name}/content", headers={"Range": "bytes=5-9"})
    assert (part.status_code, part.content) == (206, whole.content[5:10])
    assert len(whole.headers.get_list("date")) == 1
    assert two.get(name)["url"] == f"{two.url}/v1/videos/{name}/content"
    with av.open(io.BytesIO(whole.content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    head = two.http.head(f"/v1/videos/{name}/content")
    assert (int(head.headers["content-length"]), head.content) == (len(whole.content), b"")
    for answer, status, code in (
        (two.http.get("/v1/videos/video_7_" + "a" * 26), 404, "not_found"),
        (two.http.get("/v1/videos?limit=1000"), 400, "invalid_value"),
        (two.http.post("/v1/videos", json={"prompt": ""}), 400, "invalid_value"),
        (two.http.get("/v1/videos", headers={"Host": "evil.example"}), 421, "misdirected"),
        (two.http.post("/v1/uploads", content=b"x" * (65 << 20)), 413, "body_too_large"),
    ):
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert answer.headers["x-request-id"].startswith("req_")
    assert two.http.get("/").headers["content-type"].startswith("text/html")


def test_one_key_makes_one_job_wherever_it_goes(two: Cluster):
    body = {"prompt": "a", **SMALL}
    for i in range(4):
        headers = {"Idempotency-Key": f"key-{i}"}
        made = {
            two.http.post("/v1/videos", json=body, headers=headers).json()["id"] for _ in range(4)
        }
        assert len(made) == 1


def test_a_client_that_leaves_a_sync_cancels_it(two: Cluster):
    before = set(names(two))
    body = json.dumps({"prompt": "a", "seconds": 8, "num_inference_steps": 200}).encode()
    lines = [
        b"POST /v1/videos/sync HTTP/1.1",
        b"Host: 127.0.0.1",
        b"Content-Type: application/json",
    ]
    lines += [b"Content-Length: %d" % len(body), b"", body]
    with connected(two.proxy.port) as sock:
        sock.sendall(b"\r\n".join(lines))
        two.until(lambda: len(names(two)) == len(before) + 1)  # it is accepted
    two.until(lambda: set(names(two)) == before, 10)


def test_state_and_figures_are_those_of_all(two: Cluster):
    ready = two.http.get("/ready").json()
    assert (ready["status"], ready["replicas"]) == ("ready", {"0": "ready", "1": "ready"})
    assert (
        ready["load"]["room"] == 2 * (64 + 16) - ready["load"]["waiting"] - ready["load"]["running"]
    )
    assert two.http.get("/health").json()["status"] == "ok"
    text = two.http.get("/metrics").text
    assert 'sora_replica_up{replica="1"} 1.0' in text
    for name in ("0", "1"):
        assert (
            f'sora_jobs_total{{code="none",model="sprites",outcome="completed",replica="{name}"}}'
            in text
        )


def test_cookies_are_known_to_every_server(nursery: Nursery, tmp_path):
    key = "a-key-of-16-chars"
    with Cluster(nursery, tmp_path / "data", 2, api_key=key) as cluster:
        assert cluster.http.get("/v1/videos").status_code == 401
        assert cluster.http.post("/session", json={"key": key}).status_code == 204
        for _ in range(6):
            assert cluster.http.get("/v1/models").status_code == 200
            assert cluster.http.get("/v1/videos").status_code == 200
        video = cluster.create()
        cluster.completed(video["id"])
        kept = [file.read_text() for file in (tmp_path / "data" / "sessions").iterdir()]
        assert len(kept) == 1
        assert key not in kept[0]
        assert cluster.http.delete("/session").status_code == 204
        assert cluster.http.get("/v1/videos").status_code == 401


def test_a_server_that_is_killed_comes_back_with_its_jobs(two: Cluster):
    made = [two.create(seed=i, num_inference_steps=20)["id"] for i in range(6)]
    two.kill("0")
    for name in made:  # its ids answer once it is back
        assert two.get(name)["id"] == name
    assert set(made) <= set(names(two))
    for name in made:
        two.completed(name)
    assert two.children.restarts["0"] >= 1
