"""What works on a video would take, works on uploads, and the same request again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from sora_engine.serve.menu import OF_CLIPS
from sora_engine.serve.models import _ladders
from sora_engine.serve.replicas.proxy import WORK
from tests.serve.serving import Service, served


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(tmp_path_factory.mktemp("data")) as service:
        yield service


@pytest.fixture(scope="module")
def made(service: Service) -> str:
    """A video that is done."""
    return str(service.ended(service.create(draft=True)["id"])["id"])


@pytest.fixture(scope="module")
def upload(service: Service, made: str) -> str:
    """The same frames as a file of the caller's."""
    film = service.http.get(f"/v1/videos/{made}/content").content
    return str(service.http.post("/v1/uploads", files={"file": ("a.mp4", film)}).json()["id"])


FEW: dict[str, Any] = {"num_inference_steps": 2, "size": "32x32", "prompt": "a blue star"}


def works(made: str, upload: str) -> dict[str, dict[str, Any]]:
    """Every work, by its path."""
    clip, own = {"upload": upload}, {"video_id": made}
    return {
        "": {**FEW, "num_frames": 5},
        "/edits": {**FEW, "video": clip},
        "/extensions": {**FEW, "video": own, "seconds": 0.5},
        "/connect": {**FEW, "first": clip, "second": own, "gap_s": 0.5},
        "/loop": {**FEW, "video": clip, "gap_s": 0.5},
        "/upscale": {"prompt": "a star", "video": clip, "scale": 2, "num_inference_steps": 4},
        f"/{made}/remix": FEW,
        f"/{made}/refine": {"num_inference_steps": 4},
        f"/{made}/loop": {**FEW, "gap_s": 0.5},
        f"/{made}/upscale": {"scale": 2, "num_inference_steps": 4},
        f"/{made}/again": {"seed": 8},
    }


def test_a_plan_is_what_the_job_then_takes(service: Service, made: str, upload: str) -> None:
    for path, body in works(made, upload).items():
        queued = len(service.http.get("/v1/videos?limit=100").json()["data"])
        plan = service.http.post(f"/v1/videos{path}/plan", json=body)
        assert plan.status_code == 200, (path, plan.text)
        assert len(service.http.get("/v1/videos?limit=100").json()["data"]) == queued
        job = service.http.post(f"/v1/videos{path}", json=body)
        assert job.status_code == 200, (path, job.text)
        ended = service.ended(job.json()["id"])
        assert ended["status"] == "completed", (path, ended)
        for name in ("size", "num_frames", "num_steps", "peak_memory_mb"):
            assert plan.json()[name] == ended[name], (path, name)


def test_the_same_again_is_the_same_frames(service: Service, made: str, upload: str) -> None:
    bodies = works(made, upload)
    for path in ("/extensions", f"/{made}/remix", "/loop"):
        first = service.ended(
            service.http.post(f"/v1/videos{path}", json=bodies[path]).json()["id"]
        )
        film = service.http.get(f"/v1/videos/{first['id']}/content").content
        told = service.http.post(f"/v1/videos/{first['id']}/again", json={}).json()
        again = service.ended(told["id"])
        assert (again["seed"], again["size"]) == (first["seed"], first["size"])
        assert service.http.get(f"/v1/videos/{again['id']}/content").content == film, path
        other = service.http.post(f"/v1/videos/{first['id']}/again", json={"seed": 9}).json()
        assert service.ended(other["id"])["status"] == "completed"
        assert service.http.get(f"/v1/videos/{other['id']}/content").content != film, path
        service.http.delete(f"/v1/videos/{first['id']}")
        assert service.http.post(f"/v1/videos/{first['id']}/again", json={}).status_code == 404


def test_a_cancelled_video_is_made_again(service: Service) -> None:
    name = service.create(num_inference_steps=200)["id"]
    service.http.post(f"/v1/videos/{name}/cancel")
    assert service.ended(name)["error"]["code"] == "cancelled"
    again = service.http.post(f"/v1/videos/{name}/again", json={"num_inference_steps": 2})
    assert service.ended(again.json()["id"])["status"] == "completed"


@pytest.mark.parametrize(
    "path", [f"{work}{end}" for work in ("remix", "again", "loop") for end in ("", "/plan")]
)
def test_works_on_what_there_is_not_are_refused(service: Service, path: str) -> None:
    answer = service.http.post(f"/v1/videos/video_0_{'0' * 26}/{path}", json={"prompt": "a star"})
    assert answer.status_code == 404


def test_the_proxy_knows_each_work() -> None:
    for name in OF_CLIPS:
        assert {f"/v1/videos/{name}", f"/v1/videos/{name}/plan"} <= WORK


def test_ladders_are_those_of_the_model_and_its_adapters(service: Service, tmp_path: Any) -> None:
    told = service.http.get("/v1/models").json()["data"][0]["sora"]
    assert told["ladders"] == []  # the sprites are distilled for none of their family's
    named = tmp_path / "wan2.1_lightx2v_4steps.safetensors"
    assert _ladders("causvid-9", [tmp_path / "ink.safetensors"]) == ["causvid-9"]
    assert _ladders("causvid-9", [named]) == ["causvid-9", "lightx2v-4"]
    assert _ladders(None, [named, named]) == ["lightx2v-4"]


def test_an_upload_tells_what_is_in_it(service: Service, upload: str) -> None:
    told = service.http.get(f"/v1/uploads/{upload}").json()
    assert (told["id"], told["media_type"]) == (upload, "video/mp4")
    assert (told["width"], told["height"], told["num_frames"], told["fps"]) == (16, 16, 5, 8)
    for name in ("upload_" + "0" * 64, "upload_..", upload[:-1], upload.upper()):
        assert service.http.get(f"/v1/uploads/{name}").status_code == 404
