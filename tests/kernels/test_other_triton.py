"""The emulator and the launchers under another version of Triton than the one installed.

pip install --no-deps --target /tmp/triton-3.6 triton==3.6.0
SORA_OTHER_TRITON=/tmp/triton-3.6 pytest -m slow tests/kernels/test_other_triton.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import launch_bugs
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = os.environ.get("SORA_OTHER_TRITON", "")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDER, reason="SORA_OTHER_TRITON names no folder with another Triton"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A Python process that finds the other Triton first, with a cache of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    environment["PYTHONPATH"] = os.pathsep.join([FOLDER, str(ROOT / "kernels"), str(ROOT)])

    def run(*arguments):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    where = run("-c", "import triton; print(triton.__file__)").strip()
    assert Path(FOLDER).resolve() in Path(where).resolve().parents, f"{where} is imported"
    return run


@pytest.mark.parametrize("kernel", ["gluon", "blackwell"])
def test_the_gluon_kernels_are_right(run, kernel):
    out = run("-m", "sora_kernels.testing.gluon", "--cases", "60", "--kernel", kernel)
    assert "60 of 60 cases right" in out


@pytest.mark.parametrize("arch", [80, 90, 100, 120])
def test_every_call_launches(run, arch):
    assert ", 0 faults" in run("-m", "sora_kernels.testing.launches", "--arch", str(arch))


def test_few_variants_serve_all_requests(run):
    out = run("-m", "sora_kernels.testing.launches", "--arch", "90", "--requests", "60")
    assert int(out.split(" variants")[0].split()[-1]) <= launch_bugs.MOST_VARIANTS


def test_calls_are_launched_again(run):
    found = json.loads(run(str(HERE / "replays.py")).splitlines()[-1])
    assert found["rope: replays"] == found["cross-attention: replays"] == 1
    assert all(value for name, value in found.items() if name.endswith(": the same launch"))


def test_planted_bugs_are_caught(run):
    told = dict(map(json.loads, run(str(HERE / "launch_bugs.py")).splitlines()))
    assert list(told) == list(launch_bugs.NAMES)
    assert [name for name, fault in told.items() if fault is None] == []
