"""What clients speak: the pinned `openai` client as it is, and plain HTTP."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.clusters import Cluster
from tests.serve.ray_cluster import RayCluster
from tests.serve.servers import SMALL, Nursery, Server

BODY: dict[str, Any] = {"size": "32x32", "seconds": "1"}
EXTRA = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(
    scope="module", params=["one", "replicas", pytest.param("ray", marks=pytest.mark.slow)]
)
def server(request, nursery: Nursery, tmp_path_factory) -> Iterator[Server | Cluster]:
    """One server, two behind a proxy, and two of Ray Serve: clients see no difference."""
    data = tmp_path_factory.mktemp("serve") / "data"
    if request.param == "ray":
        pytest.importorskip("ray")
    made = {
        "one": lambda: Server(nursery, data),
        "replicas": lambda: Cluster(nursery, data, 2),
        "ray": lambda: RayCluster(data, 2),
    }[request.param]()
    with made:
        yield made


@pytest.fixture(scope="module")
def client(server: Server | Cluster) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def frames_of(data: bytes) -> np.ndarray:
    with av.open(io.BytesIO(data)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def test_the_openai_client_makes_a_video_and_its_kin(client, server, tmp_path):
    video = client.videos.create(prompt="a red circle", model="sora-2", **BODY, extra_body=EXTRA)
    assert (video.object, video.model) == ("video", "sora-2")
    assert video.status in ("queued", "in_progress")  # an idle server has begun it
    assert (video.size, video.seconds, video.progress) == ("32x32", "1", 0)
    video = client.videos.create_and_poll(
        prompt="a red circle", **BODY, extra_body=EXTRA, poll_interval_ms=50
    )
    assert (video.status, video.progress, video.error) == ("completed", 100, None)
    again = client.videos.retrieve(video.id)
    assert again.completed_at >= again.created_at
    assert again.expires_at > again.completed_at

    made = frames_of(client.videos.download_content(video.id).read())
    assert made.shape == (8, 32, 32, 3)
    pictures = {
        variant: Image.open(
            io.BytesIO(client.videos.download_content(video.id, variant=variant).read())
        )
        for variant in ("thumbnail", "spritesheet")
    }
    assert pictures["thumbnail"].format == pictures["spritesheet"].format == "WEBP"
    assert pictures["thumbnail"].size == (32, 32)
    assert pictures["spritesheet"].size == (4 * 32, 2 * 32)
    first = np.asarray(pictures["thumbnail"].convert("RGB")).astype(int)
    assert np.abs(first - made[0]).mean() < 8  # both are lossy

    remix = client.videos.remix(video.id, prompt="a blue square")
    assert remix.remixed_from_video_id == video.id
    assert server.completed(remix.id)["seed"] == 3

    clip = tmp_path / "clip.mp4"
    clip.write_bytes(client.videos.download_content(video.id).read())
    longer = client.videos.extend(prompt="on", seconds="1", video=clip, extra_body=EXTRA)
    longer = server.completed(longer.id)
    assert (longer["num_frames"], longer["seconds"]) == (16, "2")
    edited = client.videos.edit(prompt="a blue square", video=clip, extra_body=EXTRA)
    assert server.completed(edited.id)["size"] == "32x32"

    image = tmp_path / "first.png"
    Image.fromarray(made[0]).save(image)
    moved = client.videos.create(prompt="it moves", input_reference=image, **BODY, extra_body=EXTRA)
    server.completed(moved.id)
    start = frames_of(client.videos.download_content(moved.id).read())[0].astype(int)
    assert np.abs(start - made[0]).mean() < 20

    gone = client.videos.delete(remix.id)
    assert (gone.id, gone.deleted, gone.object) == (remix.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError) as caught:
        client.videos.retrieve(remix.id)
    assert caught.value.code == "not_found"


def test_the_openai_client_lists_pages_models_and_images(client, server):
    made = [client.videos.create(prompt=f"{i}", **BODY, extra_body=EXTRA).id for i in range(5)]
    for name in made:
        server.completed(name)
    page = client.videos.list(limit=2)
    assert [video.id for video in page.data] == made[:2:-1]
    assert page.has_more
    listed = [video.id for video in client.videos.list(limit=2)]  # all pages
    assert listed[:5] == made[::-1]
    assert [video.id for video in client.videos.list(limit=100, order="asc")] == listed[::-1]

    names = [model.id for model in client.models.list()]
    assert names == ["sprites", "sora-2", "sora-2-pro"]
    assert client.models.retrieve("sora-2").owned_by == "sora_engine"

    images = client.images.generate(
        prompt="a red circle", n=2, size="32x32", extra_body=EXTRA, output_format="webp"
    )
    read = [Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in images.data]
    assert [(one.format, one.size) for one in read] == [("WEBP", (32, 32))] * 2
    linked = client.images.generate(
        prompt="a red circle", size="32x32", extra_body=EXTRA, response_format="url"
    )
    assert Image.open(io.BytesIO(server.http.get(linked.data[0].url).content)).format == "PNG"
    assert [video.id for video in client.videos.list(limit=100)] == listed  # pictures are none


def test_the_openai_client_is_told_what_is_wrong(client, server):
    for fields, param, code in (
        ({"prompt": ""}, "prompt", "invalid_value"),
        ({"prompt": "a", "size": "32"}, "size", "invalid_value"),
        ({"prompt": "a", "seconds": "long"}, "seconds", "invalid_value"),
        ({"prompt": "a", "model": "gpt-2"}, "model", "model_not_found"),
        ({"prompt": "a", "extra_body": {"steps": 3}}, "steps", "invalid_value"),
        ({"prompt": "a", "extra_body": {"num_inference_steps": 201}}, None, "invalid_value"),
        ({"prompt": "a", "extra_body": {"loras": [{"name": "/etc/x"}]}}, "loras", "invalid_value"),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            client.videos.create(**fields)
        assert caught.value.code == code
        assert param is None or caught.value.param == param
        assert caught.value.type == "invalid_request_error"
        assert caught.value.request_id.startswith("req_")
    queued = client.videos.create(
        prompt="a", size="64x64", seconds="4", extra_body={"num_inference_steps": 100}
    )
    with pytest.raises(openai.BadRequestError) as caught:
        client.videos.download_content(queued.id)
    assert caught.value.code == "video_not_completed"
    client.videos.delete(queued.id)


def test_the_same_over_plain_http(server):
    """JSON in place of a form, and an answer field by field."""
    http = server.http
    answer = http.post("/v1/videos", json={"prompt": "a red circle", **SMALL})
    assert answer.headers["content-type"] == "application/json"
    video = answer.json()
    assert set(video) >= {
        *("id", "object", "model", "status", "progress", "created_at", "completed_at"),
        *("expires_at", "prompt", "size", "seconds", "remixed_from_video_id", "error"),
    }
    poll = http.get(f"/v1/videos/{video['id']}")
    assert poll.json()["status"] == "completed" or poll.headers["openai-poll-after-ms"].isdigit()
    done = server.completed(video["id"])
    assert done["stage_durations"].keys() >= {"encoding", "denoising", "decoding", "writing"}
    assert done["inference_time_s"] > 0

    whole = http.get(done["url"])
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["content-disposition"].startswith("inline; filename=")
    size = len(whole.content)
    part = http.get(done["url"], headers={"Range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    assert part.headers["content-range"] == f"bytes 10-19/{size}"
    assert http.get(done["url"], headers={"Range": "bytes=-5"}).content == whole.content[-5:]
    assert http.get(done["url"], headers={"Range": f"bytes={size}-"}).status_code == 416
    head = http.head(done["url"])
    assert (int(head.headers["content-length"]), head.content) == (size, b"")
    same = http.get(done["url"], headers={"If-None-Match": whole.headers["etag"]})
    assert same.status_code == 304

    asked = http.get(f"/v1/videos/{video['id']}/request").json()
    assert (asked["task"], asked["fields"]["seed"]) == ("create", 3)
    plan = http.post("/v1/videos/plan", json={"prompt": "a", **SMALL}).json()
    assert (plan["num_frames"], plan["num_steps"]) == (5, 2)
    assert plan["peak_memory_mb"] > 0
    synced = http.post("/v1/videos/sync", json={"prompt": "a red circle", **SMALL})
    assert frames_of(synced.content).tolist() == frames_of(whole.content).tolist()
    assert http.delete(f"/v1/videos/{video['id']}").json() == {
        "id": video["id"],
        "deleted": True,
        "object": "video.deleted",
    }
    assert http.get(f"/v1/videos/{video['id']}").status_code == 404
    assert http.get(done["url"]).status_code == 404


def test_what_a_form_says_json_says_too(server):
    """Numbers, booleans, brackets and lists as texts: the stored requests are the same."""
    fields = {"prompt": "a", "size": "32x32", "num_frames": 8, "loop": True, "seed": 7}
    nested = {
        "guidance": {"kind": "cfg", "scale": 2.0},
        "shots": [{"prompt": "x", "num_frames": 4}, {"prompt": "y", "num_frames": 4}],
    }
    plain = server.create(**fields, **nested, num_inference_steps=2)
    form = {name: (None, json.dumps(value)) for name, value in nested.items()}
    form |= {
        name: (None, "true" if value is True else str(value)) for name, value in fields.items()
    }
    form |= {"num_inference_steps": (None, "2")}
    first = server.http.post("/v1/videos", files=form).json()
    del form["guidance"]
    form |= {"guidance[kind]": (None, "cfg"), "guidance[scale]": (None, "2.0")}
    second = server.http.post("/v1/videos", files=form).json()
    bodies = [
        server.http.get(f"/v1/videos/{video['id']}/request").json()["fields"]
        for video in (plain, first, second)
    ]
    assert bodies[0] == bodies[1] == bodies[2]
    lost = {**form, "shots[][prompt]": (None, "x")}
    answer = server.http.post("/v1/videos", files=lost)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "shots")


def test_bytes_of_a_text_kind_are_refused(server):
    answer = server.http.post("/v1/videos", content=b"x", headers={"Content-Type": "text/plain"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    for body in (b"{", b"[]", b'{"prompt": NaN}', b"\xff", b"[" * 100_000):
        answer = server.http.post(
            "/v1/videos", content=body, headers={"Content-Type": "application/json"}
        )
        assert (answer.status_code, answer.json()["error"]["type"]) == (
            400,
            "invalid_request_error",
        )


def test_results_are_whole_files(server, tmp_path: Path):
    video = server.completed(server.create()["id"])
    data = server.data_of(video["id"])
    folder = data / "videos" / video["id"]
    assert {path.name for path in folder.iterdir()} == {
        *("video.mp4", "receipt.json", "latents.safetensors"),
    }
    assert not (data / "saved" / f"{video['id']}.safetensors").exists()
    assert not any((data / "tmp").iterdir())
