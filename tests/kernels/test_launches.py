"""The launchers of the Triton and Gluon kernels, executed up to a driver that stands for a card.

Kernels are compiled for the card, so all of it runs in processes of its own. What was compiled is
kept in one folder for the session.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import launch_bugs
import pytest

from sora_kernels.aot import ARCHITECTURES
from sora_kernels.testing.launches.driver import kind_of, tensor_map_faults

pytest.importorskip("triton")

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


def run(compiled, *arguments):
    """A Python process with the kernels' cache in a folder."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={
            **environment,
            "TRITON_CACHE_DIR": str(compiled),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "kernels"), *sys.path]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return done


def launched(compiled, *arguments):
    done = run(compiled, "-m", "sora_kernels.testing.launches", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_block_of_wan_launches_on_hopper(compiled):
    """14B at 720p by Triton, and its attention by Gluon; 16 small requests in one batch."""
    (line,) = launched(compiled, "--arch", "90", "--only", "^Wan 14B/(720p|16 small)(/gluon)?:")
    found = re.search(r"(\d+) calls, (\d+) launches of (\d+) kernels, (\d+) tensor maps", line)
    assert found is not None, line
    calls, launches, _, maps = map(int, found.groups())
    # Eight calls a block, each one launch (q and k are rotated by the same one); two by Gluon.
    assert (calls, launches) == (2 * (8 + 2), 2 * (8 + 2))
    assert maps == 3 * 2 * (2 + 2)


def test_each_card_has_its_own_limit_of_shared_memory(compiled):
    """In one process: Blackwell's kernel takes more than sm_80 has, and sm_120 has less."""
    only = "^Wan 5B/5B 720p(/blackwell)?: self"
    lines = launched(compiled, "--arch", "80", "100", "120", "--only", only)
    assert [re.findall(r"\d+ calls|\d+ faults", line) for line in lines] == [
        ["1 calls", "0 faults"],
        ["2 calls", "0 faults"],
        ["1 calls", "0 faults"],
    ]


def test_attention_launches_on_blackwell(compiled):
    """By Gluon: 5B at 720p, whose text is one token, and rows that lie apart."""
    only = "^Wan 5B/(5B 720p|strided)/blackwell"
    (line,) = launched(compiled, "--arch", "100", "--only", only)
    assert "5 calls, 5 launches" in line
    assert "15 tensor maps, 0 faults" in line


def test_adapters_of_a_batch_are_two_launches_whatever_their_number(compiled):
    (line,) = launched(compiled, "--arch", "90", "--only", "^Wan 14B/(480p|16 small)/adapters")
    found = re.search(r"(\d+) calls, (\d+) launches of 2 kernels", line)
    assert found is not None, line
    assert (int(found[1]), int(found[2])) == (2 * 3, 2 * 3 * 2)


@pytest.mark.parametrize("arch", [a for a in ARCHITECTURES if a != 90])
def test_the_autoencoder_and_windows_launch_everywhere(compiled, arch):
    only = "autoencoder/1080p|small fp32/windowed: windowed"
    (line,) = launched(compiled, "--arch", str(arch), "--only", only)
    assert "7 calls, 7 launches" in line


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_call_launches(compiled, arch):
    """Every model, size and kind of attention of the table."""
    (line,) = launched(compiled, "--arch", str(arch))
    assert ", 0 faults" in line


def test_few_variants_serve_all_requests(compiled):
    """60 mixed requests: at most 14 variants, and none that is new after the third request."""
    (line,) = launched(compiled, "--arch", "90", "--requests", "60")
    found = re.search(r"(\d+) variants over 60 requests, the last new one in request (\d+)", line)
    assert found is not None, line
    assert int(found[1]) <= launch_bugs.MOST_VARIANTS
    assert int(found[2]) <= 3


def test_planted_bugs_are_caught(compiled):
    """Each edit of a launcher in `launch_bugs` is told by its kind."""
    done = run(compiled, str(HERE / "launch_bugs.py"))
    assert done.returncode == 0, done.stderr[-3000:]
    told = dict(map(json.loads, done.stdout.splitlines()))
    assert list(told) == list(launch_bugs.NAMES)
    assert len(told) >= 10
    assert [name for name, fault in told.items() if fault is None] == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, None),
        ({"address": 8}, "address"),
        ({"box": (512, 1, 64)}, "a box of 512"),
        ({"box": (128, 1, 128)}, "256 bytes a row, swizzled over 128"),
        ({"shape": (0, 40, 128)}, "an extent of 0"),
        ({"shape": (1 << 33, 40, 128)}, "an extent of"),
        ({"strides": (5124, 128, 1)}, "no multiple of 16"),
        ({"strides": (1 << 40, 128, 1)}, "a stride of"),
        ({"strides": (5120, 128, 2)}, "a last stride of 2"),
        ({"box": (1,) * 5 + (64,), "shape": (2,) * 6, "strides": (64,) * 5 + (1,)}, "6 dimensions"),
    ],
)
def test_tensor_maps_have_the_limits_of_the_driver(change, told):
    """Those that CUDA's driver API gives for cuTensorMapEncodeTiled."""
    fits = {
        "address": 1 << 20, "swizzle": 3, "element_bytes": 2, "box": (128, 1, 64),
        "shape": (75_600, 40, 128), "strides": (5120, 128, 1),
    }  # fmt: skip
    faults = tensor_map_faults(**{**fits, **change})
    if told is None:
        assert faults == []
    else:
        assert any(told in fault for fault in faults), faults


def test_every_parameter_of_a_kernel_has_a_type_by_its_name():
    """The habit that the driver holds launches to is that of the kernels compiled ahead of time."""
    from sora_kernels import aot

    for build in aot.builds(90):
        for name, kind in build.types.items():
            assert kind.startswith(kind_of(name)), (build.key, name, kind)
