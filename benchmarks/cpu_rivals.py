"""A step on a CPU beside OpenVINO's and stable-diffusion.cpp's: the same weights, in turns.

    pip install openvino
    python benchmarks/cpu_rivals.py -o benchmarks/results/cpu-rivals.json
    python benchmarks/cpu_rivals.py --sd build/bin/sd-cli --types f32 q8_0

The work is that of `sora bench --only cpu`. OpenVINO runs diffusers' transformer, converted at
fixed shapes, a pass for each branch. stable-diffusion.cpp runs its own program: what it says of
sampling is taken, without loading, and its process ends before it decodes (`--decode` lets it, once
a type, for its peak memory). It has no text encoder here, and gives a branch 256 tokens of text
where the others have 512. Build it
with `-DGGML_LLAMAFILE=ON`, its faster products. It knows Wan by 30 or 40 layers: to run 4, take the
condition `num_layers == 30` of its `src/wan.hpp` for all but 40.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sora_engine.bench.models import WAN_1_3B, WanShape
from sora_engine.bench.precision import Rivals, StepTask
from sora_engine.bench.profiles import describe
from sora_engine.bench.results import SUBJECT, Measurement, Result
from sora_engine.bench.timing import interleaved
from sora_engine.io.system import keep_memory
from sora_engine.models.machine import has_bfloat16
from sora_engine.models.wan.names import to_wan_name
from sora_engine.vae.registry import build_vae
from sora_engine.vae.wan_checkpoint import original_names
from sora_engine.vae.wan_config import WanVAEConfig
from sora_kernels.quant import int8

GRID = (2, 22, 24)
STEPS = 1
"""Of one run of stable-diffusion.cpp."""


def openvino_step(task: StepTask, precision: str) -> Callable[[], None]:
    """diffusers' transformer in OpenVINO at that inference precision; raises ImportError."""
    import openvino

    class Predict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.plain

        def forward(self, sample: Tensor, at: Tensor, text: Tensor) -> Tensor:
            out: Tensor = self.model(sample, at, text, return_dict=False)[0]
            return out

    given = [(task.sample[None], torch.tensor([500.0]), text[None]) for text in task.texts]
    converted = openvino.convert_model(Predict().eval(), example_input=given[0])
    converted.reshape({i: list(value.shape) for i, value in enumerate(given[0])})
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(converted, "CPU", settings)
    arrays = [[value.numpy() for value in inputs] for inputs in given]

    def run() -> None:
        for inputs in arrays:
            compiled(inputs)

    return run


def write_model(task: StepTask, folder: Path) -> None:
    """The transformer and an autoencoder under Wan's own names, for stable-diffusion.cpp."""
    weights = {to_wan_name(name): value for name, value in task.plain.state_dict().items()}
    save_file(weights, folder / "wan.safetensors")
    config = WanVAEConfig()
    torch.manual_seed(0)
    names = original_names(config)
    vae = build_vae(config).state_dict()
    save_file({names[name]: value for name, value in vae.items()}, folder / "vae.safetensors")


class StableDiffusionCpp:
    """Its program, on the files of `write_model`, at one type of weights. peak: the largest
    resident size of its runs, in bytes."""

    def __init__(self, program: Path, folder: Path, form: str) -> None:
        height, width = (16 * side for side in GRID[1:])
        self.command = [
            str(program), "-M", "vid_gen", "--diffusion-model", str(folder / "wan.safetensors"),
            "--vae", str(folder / "vae.safetensors"), "-p", "a red circle", "-n", "a",
            "--cfg-scale", "5", "--sampling-method", "euler", "--steps", str(STEPS),
            "-H", str(height), "-W", str(width), "--video-frames", str(4 * GRID[0] - 3),
            "--flow-shift", "3", "--type", form, "-t", str(torch.get_num_threads()),
            "-o", str(folder / "out.avi"), "-v",
        ]  # fmt: skip
        self.peak = 0

    def run(self, *, decode: bool = False) -> float:
        """Seconds a step. Raises RuntimeError where the program does not come to sampling."""
        said, found = [], None
        with subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            assert process.stdout is not None
            for line in process.stdout:
                said.append(line)
                self.peak = max(self.peak, _peak(process.pid))
                if match := re.search(r"sampling completed, taking ([\d.]+)s", line):
                    found = float(match[1]) / STEPS
                    if not decode:
                        process.kill()
        if found is None:
            raise RuntimeError(f"stable-diffusion.cpp did not sample: {''.join(said)[-2000:]}")
        return found


def _peak(pid: int) -> int:
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def clock(call: Callable[[], Any]) -> float:
    """Seconds of a call, or what it says itself."""
    begun = time.perf_counter()
    told = call()
    return told if isinstance(told, float) else time.perf_counter() - begun


@torch.inference_mode()
def measure(
    shape: WanShape, rounds: int, sd: Path | None, types: list[str], decode: bool, folder: Path
) -> Measurement:
    task = StepTask(shape, GRID)
    best = "bf16" if has_bfloat16() else "fp32"
    sides: Rivals = {SUBJECT: task.step_of(task.ours(best))}
    if best != "fp32":
        sides[f"{SUBJECT} fp32"] = task.step_of(task.ours("fp32"))
    if int8.problem() is None:
        sides[f"{SUBJECT} int8"] = task.step_of(task.ours("int8"))
    figures: dict[str, float | str] = {f"dtype of {SUBJECT}": best}
    programs: dict[str, StableDiffusionCpp] = {}
    if sd is None:
        for precision in ("f32", "bf16"):
            sides[f"OpenVINO {precision}"] = openvino_step(task, precision)
    else:
        write_model(task, folder)
        for form in types:
            programs[form] = StableDiffusionCpp(sd, folder, form)
            sides[f"stable-diffusion.cpp {form}"] = programs[form].run
    times = interleaved(sides, rounds, clock=clock)
    for form, program in programs.items():
        figures[f"peak of stable-diffusion.cpp {form} at sampling, GiB"] = program.peak / 2**30
        if decode:
            program.run(decode=True)
            figures[f"peak of stable-diffusion.cpp {form}, GiB"] = program.peak / 2**30
    return Measurement(
        f"beside {'OpenVINO' if sd is None else 'stable-diffusion.cpp'}: step with guidance, width "
        f"{shape.width}, {shape.layers} layers, {task.tokens} tokens",
        "s",
        times,
        figures=figures,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-o", "--output", type=Path, help="added to, where it is there")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--sd", type=Path, help="sd-cli, in OpenVINO's place")
    parser.add_argument("--types", nargs="+", default=["f32"], help="of its weights")
    parser.add_argument("--decode", action="store_true")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_memory()
    with tempfile.TemporaryDirectory() as folder:
        shape = replace(WAN_1_3B, layers=args.layers)
        found = measure(shape, args.rounds, args.sd, args.types, args.decode, Path(folder))
    print(describe(found))
    print(*(f"{name}: {value}" for name, value in found.figures.items()), sep="\n")
    if args.output is not None:
        before = Result.read(args.output).measurements if args.output.exists() else ()
        others = [one for one in before if one.name != found.name]
        Result.here("cpu-rivals", [*others, found]).write(args.output)


if __name__ == "__main__":
    main()
