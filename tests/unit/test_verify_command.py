"""`sora certificate`, `--sign` and `sora verify`, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sora_engine.io.certificates import CERTIFICATE, KEY, ROOT
from sora_engine.io.credentials import Credentials
from sora_engine.io.video_writer import write_video

pytest.importorskip("c2pa", reason="c2pa-python is not installed")

FRAMES = np.zeros((2, 32, 32, 3), np.uint8)


def sora(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, for a user whose settings lie in a folder."""
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder / "config")}
    command = [sys.executable, "-m", "sora_engine", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_exit_codes_tell_the_four_states(tmp_path: Path) -> None:
    code, told, _ = sora(tmp_path, "certificate", "--name", "Jane Doe")
    folder = tmp_path / "config" / "sora_engine" / "credentials"
    assert code == 0
    assert str(folder / ROOT) in told
    own = Credentials.read(folder / CERTIFICATE, folder / KEY)
    signed = write_video(tmp_path / "signed.mp4", FRAMES, 8, credentials=own)
    code, told, _ = sora(tmp_path, "verify", "signed.mp4")
    assert (code, told.splitlines()[0]) == (
        0,
        "signed.mp4: signed by Jane Doe, and unaltered since",
    )
    write_video(tmp_path / "plain.mp4", FRAMES, 8)
    code, told, _ = sora(tmp_path, "verify", "plain.mp4")
    assert (code, told.splitlines()[0]) == (3, "plain.mp4: it is not signed")
    assert "a watermark needs 40x24 pixels and more" in told
    altered = bytearray(signed.read_bytes())
    altered[-20] ^= 1
    (tmp_path / "altered.mp4").write_bytes(altered)
    code, told, _ = sora(tmp_path, "verify", "altered.mp4")
    assert code == 1
    assert "ALTERED since it was signed as Jane Doe" in told
    assert "bmffHash.mismatch" in told
    sora(tmp_path, "certificate", "-o", "other")
    code, told, _ = sora(tmp_path, "verify", "signed.mp4", "--trust", f"other/{ROOT}")
    assert code == 4
    assert "nobody whom you trust" in told


def test_a_result_is_signed_by_the_command_and_an_extension_names_it(tmp_path: Path) -> None:
    short = ("--steps", "1", "--seed", "1", "--sign")
    code, _, error = sora(tmp_path, "generate", "a", "--frames", "1", "-o", "a.mp4", *short)
    assert code == 2
    assert "`sora certificate` makes one" in error
    sora(tmp_path, "certificate")
    folder = tmp_path / "config" / "sora_engine" / "credentials"
    own = Credentials.read(folder / CERTIFICATE, folder / KEY)
    clip = np.full((5, 64, 64, 3), 200, np.uint8)
    write_video(tmp_path / "a.mp4", clip, 8, credentials=own)
    code, _, error = sora(tmp_path, "extend", "a.mp4", "--after", "0.5", "-o", "b.mp4", *short)
    assert code == 0, error
    code, told, _ = sora(tmp_path, "verify", "b.mp4")
    assert code == 0
    assert "made from: a.mp4 (componentOf), signed by sora_engine user" in told


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--sign-cert", "a.pem"), "--sign-cert: it needs --sign-key beside it"),
        (("--sign-key", "a.key"), "--sign-key: it needs --sign-cert beside it"),
        (("--sign-cert", "a", "--sign-key", "b"), "--sign-cert: the certificate a cannot be read"),
    ],
)
def test_half_a_certificate_is_refused_before_the_model_loads(
    options: tuple[str, ...], why: str, tmp_path: Path
) -> None:
    code, told, error = sora(tmp_path, "generate", "a", *options)
    assert (code, told) == (2, "")
    assert why in error
