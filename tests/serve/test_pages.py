"""What docs/serving.md says: each line is run, and the document is the code's."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import av
import pytest

from sora_engine.serve import failures
from sora_engine.serve.__main__ import document
from tests.serve.servers import ROOT, Nursery, Server

PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_every_line_of_the_page_does_what_it_says(nursery: Nursery, tmp_path):
    lines = "\n".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    script = f'set -eo pipefail\ncurl() {{ command curl --fail-with-body "$@"; }}\n{lines}'
    with Server(nursery, tmp_path / "data", save_every_s=0) as server:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "S": server.url},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-2000:]}"
        listed = server.http.get("/v1/videos?limit=100").json()["data"]
        for video in listed:
            server.completed(video["id"])
    for name, num_frames in (("circle", 16), ("at-once", 9), ("timeline", 25)):
        with av.open(str(tmp_path / f"{name}.mp4")) as file:
            assert sum(1 for _ in file.decode(video=0)) == num_frames
    assert (tmp_path / "first-100-bytes").read_bytes() == (
        (tmp_path / "circle.mp4").read_bytes()[:100]
    )


def test_every_route_stands_in_the_page_and_is_called():
    called = "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    for path, methods in json.loads(document())["paths"].items():
        if path.startswith(("/session", "/v1/images/{", "/v1/models/{")):
            continue  # for the browser, and by addresses that answers give
        assert re.sub(r"{(video|upload)_id}", "{id}", path) in PAGE, path
        pattern = re.sub(r"\\{(video|upload)_id\\}", r"\\$[A-Z]", re.escape(path))
        if path != "/v1/videos/{video_id}/preview":  # it is there only while a job is made
            assert re.search(rf"\$S{pattern}", called), (path, methods)
    for code in {code for _, code in failures._CODES}:
        assert f"`{code}`" in PAGE, code


def test_the_kept_document_is_the_codes():
    kept = (ROOT / "docs" / "openapi.json").read_text(encoding="utf-8")
    assert kept == document(), "python -m sora_engine.serve > docs/openapi.json"
