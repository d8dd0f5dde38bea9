"""Kernels that a block of a transformer launches on a GPU: a fusion that comes apart shows here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]

COUNT = """
import json
from host_passes import WAN_1_3B, launches_a_block
from sora_kernels.testing.launches.host import as_card

with as_card("meta", 90) as driver:
    print(json.dumps([launches_a_block(WAN_1_3B, driver, tokens) for tokens in (512, 40)]))
"""


def test_a_block_has_thirteen_launches(tmp_path):
    """Six products (q, k and v in one; GELU in another's epilogue), two attentions, three gated
    norms, and two rotations (q and k in one; cross-attention's q). Padding of a text adds none."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    roots = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    done = subprocess.run(
        [sys.executable, "-c", COUNT],
        env={**environment, "PYTHONPATH": os.pathsep.join(roots)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    full, padded = json.loads(done.stdout)
    assert padded == full
    assert full == {
        "aten::addmm": 5,
        "aten::_addmm_activation": 1,
        "packed_attention_kernel": 2,
        "norm_rows": 3,
        "norm_rope_rows": 2,
    }
