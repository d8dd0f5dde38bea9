"""What the peak memory of a run on a CPU is made of, line by line, and its page faults by step.

    python benchmarks/cpu_memory.py --dtype bfloat16 --steps 10

The run is that of `sora bench --profile cpu-long --only memory`, in a process of its own: 4 blocks
of Wan 1.3B's width, 1056 video tokens a branch, 512 of text, and 5 frames decoded by an autoencoder
of Wan's own width. It is made twice. Once what is freed goes back to the system at once, so that
the resident size is what is in use; once it is kept for the next step, as the `sora` command does.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import resource
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from sora_engine.bench.peak import resident
from sora_engine.io.system import keep_memory

MIB = 2**20


class Stages:
    """Peaks and page faults between the steps of a job; called with its `Progress`."""

    def __init__(self) -> None:
        self.peaks: list[tuple[str, int]] = []
        self.faults: list[int] = []
        self._done = 0
        self._faults = 0
        _begin_peak()

    def __call__(self, progress: Any) -> None:
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if progress.steps_done > self._done:
            self.faults.append(faults - self._faults)
            self._done = progress.steps_done
        stage = "decoding" if progress.frames_decoded else "denoising"
        if not progress.frames_decoded and not progress.steps_done:
            stage = "encoding the texts"
        self.peaks.append((stage, resident("VmHWM")))
        _begin_peak()
        self._faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    def peak(self, stage: str) -> int:
        return max((size for name, size in self.peaks if name == stage), default=0)


def _begin_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(folder: str, settings: dict[str, Any]) -> dict[str, Any]:
    """One run in this process; sizes in bytes."""
    if settings["keep"]:
        keep_memory()
    import torch

    from sora_engine.bench.end_to_end import Run
    from sora_engine.models.quantised import held_bytes
    from sora_engine.runtime.engine import Engine

    torch.set_num_threads(settings["threads"])
    libraries = resident("VmRSS")
    request = Run(**settings["run"]).request()
    _begin_peak()
    with Engine.from_pretrained(folder, device="cpu", dtype=settings["dtype"]) as engine:
        loading, loaded = resident("VmHWM"), resident("VmRSS")
        model = engine.loaded_model
        texts = sum(held_bytes(module) for module in model.prompt_encoder.modules)
        plan = engine.plan(request)
        idle = resident("VmRSS")
        stages = Stages()
        engine.submit(request, on_progress=stages).result()
        stages.peaks.append(("decoding", resident("VmHWM")))
        return {
            "libraries": libraries,
            "transformer": held_bytes(model.loaded_transformer),
            "texts": texts,
            "vae": held_bytes(model.vae.coder),
            "loading": loading,
            "loaded": loaded,
            "idle": idle,
            "planned": {"denoising": plan.denoise, "decoding": plan.decode},
            "peaks": {name: stages.peak(name) for name, _ in stages.peaks},
            "faults": stages.faults,
        }


def run(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """`child` in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    if not settings["keep"]:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, __file__, "--child", str(folder), repr(settings)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the run failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def lines(found: dict[str, Any]) -> list[tuple[str, int]]:
    """What the peak is made of, from the start of the process to its largest stage."""
    weights = ("transformer", "texts", "vae")
    rest = found["loaded"] - found["libraries"] - sum(found[name] for name in weights)
    peak = max(found["peaks"].values())
    stage = max(found["peaks"], key=found["peaks"].__getitem__)
    return [
        ("Python and its libraries", found["libraries"]),
        ("transformer's weights, in the layout that runs", found["transformer"]),
        ("text encoder's weights", found["texts"]),
        ("autoencoder's weights", found["vae"]),
        ("loading, above or below these", rest),
        ("planning: the rehearsal's modules", found["idle"] - found["loaded"]),
        (f"{stage}: activations, texts' keys, work space", peak - found["idle"]),
        ("peak", peak),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dtype", default="float32", help="as `sora generate --dtype`")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        folder, settings = args.child
        print(json.dumps(child(folder, ast.literal_eval(settings))))
        return
    from sora_engine.bench.end_to_end import Run, saved_pipeline
    from sora_engine.bench.models import WAN_1_3B

    wanted = Run(384, 352, 5, args.steps)
    settings = {"dtype": args.dtype, "threads": args.threads, "run": asdict(wanted)}
    with saved_pipeline(replace(WAN_1_3B, layers=args.layers)) as (pipe, folder):
        del pipe
        given, kept = (run(folder, {**settings, "keep": keep}) for keep in (False, True))
    print("| MiB | freed goes back | freed is kept |\n|---|---|---|")
    for (name, size), (_, other) in zip(lines(given), lines(kept), strict=True):
        print(f"| {name} | {size / MIB:.0f} | {other / MIB:.0f} |")
    for stage, size in given["peaks"].items():
        planned = given["planned"].get(stage)
        told = f", planned {planned / MIB:.0f}" if planned else ""
        print(
            f"{stage}: peak {size / MIB:.0f} MiB, {(size - given['idle']) / MIB:.0f} above the "
            f"idle engine{told}; kept {kept['peaks'][stage] / MIB:.0f}"
        )
    print(f"loading: peak {given['loading'] / MIB:.0f} MiB")
    print(f"page faults by step, freed is kept: {kept['faults']}")


if __name__ == "__main__":
    main()
