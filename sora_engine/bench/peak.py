"""`python -m sora_engine.bench.peak SIDE FOLDER THREADS RUN`: the peak memory of one run.

Prints by how many bytes loading a pipeline and making one video raise the resident size.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import torch

from sora_engine.bench.end_to_end import SUBJECT, Run
from sora_engine.runtime.engine import Engine


def resident(kind: str) -> int:
    """`VmRSS` or `VmHWM` in bytes."""
    found = re.search(kind + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(side: str, folder: str, threads: str, run: str) -> None:
    torch.set_num_threads(int(threads))
    what = Run(**ast.literal_eval(run))
    from diffusers import WanPipeline  # of both sides: its import is in neither's figure

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    if side == SUBJECT:
        with Engine.from_pretrained(folder, device="cpu") as engine:
            engine.generate(what.request())
    else:
        pipe = WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        pipe(**what.arguments())
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
