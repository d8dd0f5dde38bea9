"""Tasks and their refusals over HTTP, what is told of the server, and what it is told."""

from __future__ import annotations

import base64
import io
import os
import socket
import subprocess
import sys
from typing import Any

import httpx
import pytest
from PIL import Image

from sora_engine.serve import wire
from sora_engine.serve.failures import ApiError
from sora_engine.serve.orders import checked
from tests.serve.servers import ROOT, Nursery, Server
from tests.serve.test_fields import moving


def test_derived_videos_over_http(server: Server):
    """Loop, connect, upscale, extension and remix by id, a draft and its refinement."""
    http = server.http
    first = server.completed(server.create()["id"])
    second = server.completed(server.create(seed=4)["id"])
    few = {"num_inference_steps": 2, "seed": 5}

    def ask(path: str, **body: Any) -> dict[str, Any]:
        answer = http.post(f"/v1/videos/{path}", json={**few, **body})
        assert answer.status_code == 200, answer.text
        return server.completed(answer.json()["id"])

    looped = ask(f"{first['id']}/loop", gap_s=0.5)
    assert (looped["num_frames"], looped["prompt"]) == (12, first["prompt"])
    joined = ask("connect", first={"id": first["id"]}, second={"id": second["id"]}, gap_s=0.5)
    assert joined["num_frames"] == 14
    assert ask(f"{first['id']}/upscale", scale=2, strength=0.6)["size"] == "64x64"
    assert ask("extensions", video={"id": first["id"]}, seconds=1, prompt="b")["num_frames"] == 13
    remix = ask(f"{looped['id']}/remix", prompt="blue")
    assert remix["remixed_from_video_id"] == looped["id"]
    draft = server.completed(server.create(size="64x64", draft=True)["id"])
    assert draft["size"] == "32x32"
    whole = ask(f"{draft['id']}/refine")
    assert whole["size"] == "64x64"
    answer = http.post(f"/v1/videos/{first['id']}/refine", json={})
    assert answer.status_code == 400
    # A source that is deleted is there as long as a job needs it.
    late = http.post(f"/v1/videos/{second['id']}/loop", json={**few, "gap_s": 0.5}).json()
    http.delete(f"/v1/videos/{second['id']}")
    server.completed(late["id"])


def test_a_file_that_is_no_picture_is_refused(server: Server):
    files = {"input_reference": ("../../x.png", b"no picture", "image/png")}
    answer = server.http.post("/v1/videos", data={"prompt": "a"}, files=files)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference")
    picture = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    server.completed(server.create(input_reference={"image_url": url})["id"])


def test_nothing_of_the_server_is_told(nursery: Nursery, tmp_path):
    """No path, host name or key in answers, headers, files and logs."""
    data = tmp_path / "very-private-data"
    key = "a-key-that-nobody-may-see"
    with Server(nursery, data, api_key=key) as server:
        server.http.headers["Authorization"] = f"Bearer {key}"
        seen: list[bytes] = []

        def note(answer: httpx.Response) -> None:
            answer.read()
            seen.append(answer.content)
            seen.append(str(answer.headers).encode())

        server.http.event_hooks["response"] = [note]
        http = server.http
        first = server.completed(server.create()["id"])
        clip = http.get(first["url"]).content
        answer = http.post(
            "/v1/videos/extensions",
            data={"prompt": "b", "seconds": "1", "num_inference_steps": "2"},
            files={"video": ("my-clip.mp4", clip, "video/mp4")},
        )
        longer = server.completed(answer.json()["id"])
        for name in (first["id"], longer["id"]):
            for variant in ("video", "thumbnail", "spritesheet"):
                http.get(f"/v1/videos/{name}/content?variant={variant}")
            http.get(f"/v1/videos/{name}/request")
        for body in (b"", clip[:200], clip[: len(clip) // 2]):
            http.post(
                "/v1/videos/edits",
                data={"prompt": "b"},
                files={"video": ("x.mp4", body, "video/mp4")},
            )
        mask = io.BytesIO()  # of another size, which the engine tells by the mask's path
        Image.fromarray(moving(1, 16)[0]).save(mask, "PNG")
        answer = http.post(
            "/v1/videos/edits",
            data={"prompt": "b"},
            files={
                "video": ("x.mp4", clip, "video/mp4"),
                "mask": ("m.png", mask.getvalue(), "image/png"),
            },
        )
        assert answer.status_code == 400
        assert "the mask upload_" in answer.json()["error"]["message"]
        http.get("/v1/videos/nothing")
        http.get("/v1/models")
        http.get("/health")
        http.get("/v1/videos", headers={"Authorization": "Bearer wrong"})
        server.http.event_hooks["response"] = []
        log = server.text().encode()
        names = [str(data), "very-private-data", str(tmp_path), key, str(ROOT)]
        names += [socket.gethostname(), os.path.expanduser("~")]
        for secret in (name for name in names if len(name) > 5):  # shorter ones come by chance
            for told in seen:
                assert secret.encode() not in told, (secret, told[:2000])
        assert key.encode() not in log
        assert b"a red circle" not in log  # prompts are not logged
        assert b"Traceback" not in log


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"fastapi", "uvicorn", "prometheus_client", "starlette"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from sora_engine.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_the_extra_all_else_works(tmp_path):
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", BLOCKED, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
        )

    done = call("serve")
    assert done.returncode == 2
    assert done.stderr.startswith("sora: error: sora serve needs ")
    assert 'pip install "sora_engine[serve]"' in done.stderr
    made = call("generate", "a", "--size", "16x16", "--frames", "1", "--steps", "1", "-o", "a.png")
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "a.png").is_file()


def test_the_settings_say_what_is_wrong():
    from sora_engine.serve.settings import settings_from

    for flags, environment, config, said in (
        ({"port": 70000}, {}, {}, "port must be"),
        ({}, {"SORA_MAX_QUEUE": "many"}, {}, "max_queue: 'many' is no whole number"),
        ({}, {}, {"max-qeue": 3}, "max-qeue: there is no such setting"),
        ({}, {}, {"keep": "a week"}, "keep_s: 'a week' is no length of time"),
        ({"host": "0.0.0.0"}, {}, {}, "host 0.0.0.0 can be reached by others"),
        ({"loras": ["x"]}, {}, {}, "loras: 'x' is not NAME=FILE"),
    ):
        with pytest.raises(ValueError, match=said.replace(".", r"\.")):
            settings_from(flags, environment, config)
    config = {"port": 3, "keep": "1h", "metrics": False}
    by_all = settings_from({"port": 1}, {"SORA_PORT": "2", "SORA_KEEP": "2h"}, config)
    assert (by_all.port, by_all.keep_s, by_all.metrics) == (1, 7200.0, False)
    with pytest.raises(ApiError):
        checked(wire.Media, {})
