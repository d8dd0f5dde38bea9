"""Results of a service that are signed and marked."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sora_engine.errors import CredentialsError
from sora_engine.io.certificates import CERTIFICATE, KEY, ROOT, make_certificates
from sora_engine.io.verification import verify
from sora_engine.io.video_reader import read_video
from sora_engine.io.watermark import Watermark
from sora_engine.serve import Settings
from sora_engine.serve.marks import Marks
from tests.serve.serving import served

pytest.importorskip("c2pa", reason="c2pa-python is not installed")


def test_results_are_signed_and_marked_and_their_receipts_say_so(tmp_path: Path) -> None:
    own = make_certificates(tmp_path / "own", "A Service")
    settings = {"sign_cert": own / CERTIFICATE, "sign_key": own / KEY, "watermark_payload": 0x00FF}
    with served(tmp_path / "data", **settings) as service:
        first = service.create(size="448x256", num_frames=1, num_inference_steps=1)["id"]
        told = service.ended(first)
        assert told["receipt"]["watermark"] == "00ff"
        small = service.create()["id"]
        assert service.ended(small)["receipt"]["watermark"] is None
        body = {"video": {"video_id": small}, "seconds": 0.5, "num_inference_steps": 1}
        second = service.http.post("/v1/videos/extensions", json=body).json()["id"]
        service.ended(second)
        for name, manifests in ((first, 1), (second, 2), (small, 1)):
            path = tmp_path / f"{name}.mp4"
            path.write_bytes(service.http.get(f"/v1/videos/{name}/content").content)
            verdict = verify(path, [own / ROOT])
            assert (verdict.state, verdict.signer) == ("trusted", "A Service")
            assert verdict.manifests == manifests
            assert str(tmp_path) not in str(verdict.ingredients)
            # The server reads the same out of its own file.
            told = service.http.get(f"/v1/videos/{name}/credentials").json()
            assert (told["id"], told["object"]) == (name, "video.credentials")
            assert (told["state"], told["signer"]) == ("unknown", "A Service")
            assert (told["manifests"], told["generation"]) == (manifests, verdict.generation)
            assert [one["title"] for one in told["ingredients"]] == [
                one.title for one in verdict.ingredients
            ]
            assert not told["problems"]
        file = tmp_path / "data" / "videos" / small / "video.mp4"
        whole = bytearray(file.read_bytes())
        whole[whole.index(b"mdat") + 40] ^= 1
        file.write_bytes(bytes(whole))
        told = service.http.get(f"/v1/videos/{small}/credentials").json()
        assert told["state"] == "invalid"
        assert told["problems"] == list(verify(file).problems)
        found = Watermark(0x00FF).read(read_video(tmp_path / f"{first}.mp4")[0])
        assert found.marked
        assert found.payload == "00ff"


def test_what_is_not_signed_and_not_made_is_said(tmp_path: Path) -> None:
    with served(tmp_path / "data") as service:
        name = service.create()["id"]
        service.ended(name)
        told = service.http.get(f"/v1/videos/{name}/credentials").json()
        assert (told["state"], told["signer"], told["manifests"]) == ("absent", None, 0)
        assert service.http.get("/v1/videos/video_none/credentials").status_code == 404
        waits = service.create(num_inference_steps=100, seconds="8")["id"]
        answer = service.http.get(f"/v1/videos/{waits}/credentials")
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "video_not_completed"
        service.http.post(f"/v1/videos/{waits}/cancel")


def test_half_a_certificate_and_one_that_is_none_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sign_cert and sign_key go together"):
        Settings(sign_cert=tmp_path / "a")
    with pytest.raises(ValueError, match="watermark 'yes': auto, on or off"):
        Settings(watermark="yes")
    with pytest.raises(CredentialsError, match="cannot be read"):
        Marks(Settings(sign_cert=tmp_path / "a", sign_key=tmp_path / "b"))
    command = [sys.executable, "-m", "sora_engine", "serve", "--sign-cert", "a", "--sign-key", "b"]
    done = subprocess.run(
        [*command, "--data-dir", str(tmp_path / "data")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    assert done.returncode == 2
    assert "--sign-cert: the certificate a cannot be read" in done.stderr
    assert not (tmp_path / "data").exists()
