"""Every route of the document, through the proxy of two servers, with jobs of each of them."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from typing import Any

import av
import httpx
import pytest
from PIL import Image

from sora_engine.serve.__main__ import document
from tests.serve.clusters import Cluster, home_of
from tests.serve.servers import SMALL, Nursery

ROUTES = {
    (method.upper(), path): re.compile(
        re.sub(r"{model_id}", ".+", re.sub(r"{\w+_id}", "[^/]+", path))
    )
    for path, methods in json.loads(document())["paths"].items()
    for method in methods
}
FEW = {"num_inference_steps": 2, "seed": 5}
KEY = "a-key-of-16-chars"


def route_of(method: str, path: str) -> tuple[str, str] | None:
    """The one whose fixed parts reach furthest: /v1/videos/sync is no video's name."""
    fits = [found for found, like in ROUTES.items() if found[0] == method and like.fullmatch(path)]
    return min(fits, key=lambda found: found[1].count("{"), default=None)


@pytest.fixture(scope="module")
def two(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    data = tmp_path_factory.mktemp("routes") / "data"
    with Cluster(nursery, data, 2, api_key=KEY, max_priority=3, max_running=1) as made:
        made.http.headers["Authorization"] = f"Bearer {KEY}"
        yield made


def test_every_route_passes_through(two: Cluster) -> None:
    asked: set[tuple[str, str] | None] = set()

    def note(answer: httpx.Response) -> None:
        if answer.is_success:
            asked.add(route_of(answer.request.method, answer.request.url.path))

    two.http.event_hooks["response"] = [note]
    homes: dict[str, str] = {}
    while len(homes) < 2:
        name = two.create()["id"]
        two.completed(name)
        homes.setdefault(home_of(name), name)
    for name in homes.values():
        what_concerns_a_video_goes_to_its_server(two, name)
    drafts_are_refined_where_they_are(two)
    clips_of_either_server_are_worked_on(two, homes)
    videos_at_once_pictures_and_uploads(two)
    jobs_that_wait_and_run_are_turned_seen_and_cancelled(two)
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/v1/videos"):
        assert two.http.get(path).status_code == 200
    assert two.http.get("/v1/models/sprites").json()["sora"]["max_priority"] == 3
    assert two.http.post("/session", json={"key": KEY}).status_code == 204
    assert two.http.delete("/session").status_code == 204
    assert set(ROUTES) - asked == set()


def ask(two: Cluster, path: str, **body: Any) -> dict[str, Any]:
    """What a job of this route comes to, of whose plan the same was told before."""
    fields = {**FEW, **body}
    plan = two.http.post(f"/v1/videos/{path}/plan", json=fields)
    assert plan.status_code == 200, plan.text
    made = two.http.post(f"/v1/videos/{path}", json=fields)
    assert made.status_code == 200, made.text
    told = two.completed(made.json()["id"])
    assert [told[name] for name in ("size", "num_frames", "fps")] == [
        plan.json()[name] for name in ("size", "num_frames", "fps")
    ]
    return told


def what_concerns_a_video_goes_to_its_server(two: Cluster, name: str) -> None:
    video = f"/v1/videos/{name}"
    assert two.http.get(f"{video}/request").json()["fields"]["prompt"] == "a red circle"
    assert two.http.get(f"{video}/credentials").json()["state"] in ("absent", "unread")
    with two.http.stream("GET", f"{video}/events") as stream:
        assert [line for line in stream.iter_lines() if line.startswith("event:")] == [
            "event: done"
        ]
    again = ask(two, f"{name}/again", seed=SMALL["seed"])
    looped = ask(two, f"{name}/loop", gap_s=0.5)
    larger = ask(two, f"{name}/upscale", scale=2, strength=0.6)
    remix = ask(two, f"{name}/remix", prompt="a blue square")
    assert {home_of(one["id"]) for one in (again, looped, larger, remix)} == {home_of(name)}
    contents = [two.http.get(f"/v1/videos/{one}/content").content for one in (name, again["id"])]
    assert frames(contents[0]) == frames(contents[1])
    assert (looped["task"], looped["num_frames"] % 4) == ("loop", 0)
    assert (larger["task"], larger["size"]) == ("upscale", "64x64")
    assert remix["remixed_from_video_id"] == name
    assert two.http.delete(f"/v1/videos/{remix['id']}").json()["deleted"] is True
    assert two.http.get(f"/v1/videos/{remix['id']}").status_code == 404


def frames(content: bytes) -> list[bytes]:
    with av.open(io.BytesIO(content)) as container:
        return [frame.to_ndarray().tobytes() for frame in container.decode(video=0)]


def drafts_are_refined_where_they_are(two: Cluster) -> None:
    refined = set()
    while len(refined) < 2:
        draft = two.completed(two.create(size="64x64", draft=True)["id"])
        whole = ask(two, f"{draft['id']}/refine")
        assert (draft["size"], whole["size"]) == ("32x32", "64x64")
        assert home_of(whole["id"]) == home_of(draft["id"])
        refined.add(home_of(draft["id"]))


def clips_of_either_server_are_worked_on(two: Cluster, homes: dict[str, str]) -> None:
    for name in homes.values():
        clip = {"video_id": name}
        assert ask(two, "extensions", video=clip, seconds=0.5)["num_frames"] == 9
        assert ask(two, "edits", video=clip, strength=0.5, prompt="a")["task"] == "edit"
        assert ask(two, "loop", video=clip, gap_s=0.5)["num_frames"] == 12
        assert ask(two, "upscale", video=clip, scale=2, strength=0.6)["size"] == "64x64"
    first, second = ({"video_id": name} for name in homes.values())
    assert ask(two, "connect", first=first, second=second, gap_s=0.5)["num_frames"] == 14


def videos_at_once_pictures_and_uploads(two: Cluster) -> None:
    plan = two.http.post("/v1/videos/plan", json={"prompt": "a", **SMALL}).json()
    assert (plan["size"], plan["num_frames"], plan["num_steps"]) == ("32x32", 5, 2)
    at_once = two.http.post("/v1/videos/sync", json={"prompt": "a", **SMALL})
    assert len(frames(at_once.content)) == 5
    picture = Image.new("RGB", (40, 24), "navy")
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    for _ in range(2):
        upload = two.http.post("/v1/uploads", files={"file": ("a.png", buffer.getvalue())}).json()
        for _ in range(4):  # of whichever server it is asked
            told = two.http.get(f"/v1/uploads/{upload['id']}").json()
            assert (told["width"], told["height"], told["num_frames"]) == (40, 24, 1)
    body = {"prompt": "a", "size": "32x32", "response_format": "url", "num_inference_steps": 2}
    for _ in range(2):
        url = two.http.post("/v1/images/generations", json=body).json()["data"][0]["url"]
        assert url.startswith(two.url)
        assert Image.open(io.BytesIO(two.http.get(url).content)).size == (32, 32)


def jobs_that_wait_and_run_are_turned_seen_and_cancelled(two: Cluster) -> None:
    long = [two.create(size="64x64", num_inference_steps=200, seed=i)["id"] for i in range(6)]
    running: dict[str, str] = {}
    two.until(lambda: any_runs(two, long, running))
    waiting = next(name for name in long[::-1] if two.get(name)["status"] == "queued")
    turned = two.http.post(f"/v1/videos/{waiting}/priority", json={"priority": 2}).json()
    assert (turned["id"], turned["priority"], turned["queue_position"]) == (waiting, 2, 0)
    assert two.get(waiting)["priority"] == 2
    for name in running.values():
        told = two.http.get(
            f"/v1/videos/{name}/preview", params={"step": two.get(name)["steps_done"]}
        )
        assert told.headers["content-type"].startswith("image/")
    for name in long:
        assert two.http.post(f"/v1/videos/{name}/cancel").status_code == 200
        assert two.done(name)["error"]["code"] == "cancelled"


def any_runs(two: Cluster, names: list[str], running: dict[str, str]) -> bool:
    """Whether each server is at the steps of one."""
    for name in names:
        if two.get(name)["steps_done"]:
            running.setdefault(home_of(name), name)
    return len(running) == 2
