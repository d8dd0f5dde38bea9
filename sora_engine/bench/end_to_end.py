"""Whole runs, prompt to frames, beside diffusers on the same weights and the same noise.

Both runs go through their public interfaces, in two threads of which only one is ever at work: the
baton passes at every denoising step, so that the ratio of each step is paired.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from sora_engine.bench.models import WanShape, long_prompt, random_pipeline
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.timing import Turns
from sora_engine.request import VideoRequest
from sora_engine.runtime.engine import Engine

RIVAL = "diffusers"


@dataclass(frozen=True, slots=True)
class Run:
    """What is made. text_tokens: of the prompt and of the negative prompt, none of them padding."""

    width: int
    height: int
    num_frames: int
    steps: int
    text_tokens: int = 512
    guidance: float = 5.0
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Video tokens of one guidance branch, in Wan 2.1's grid."""
        return ((self.num_frames - 1) // 4 + 1) * (self.height // 16) * (self.width // 16)

    def request(self) -> VideoRequest:
        return VideoRequest(**self._shared(), seed=self.seed)

    def arguments(self) -> dict[str, Any]:
        """The same for diffusers' pipeline."""
        return {**self._shared(), "generator": torch.Generator().manual_seed(self.seed)}

    def _shared(self) -> dict[str, Any]:
        prompt = long_prompt(self.text_tokens)
        return {
            "prompt": prompt,
            "negative_prompt": " ".join(reversed(prompt.split())),
            "height": self.height,
            "width": self.width,
            "num_frames": self.num_frames,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
        }


def end_to_end(shape: WanShape, run: Run, *, group: str = "end to end") -> list[Measurement]:
    """Encoding, each step, decoding and the whole of one run.

    The relative difference of the final latents stands beside the whole: both did the same work.
    Raises ImportError without diffusers.
    """
    name = f"width {shape.width}, {shape.layers} layers, {run.tokens} tokens"
    with saved_pipeline(shape) as (pipe, folder):
        with Engine.from_pretrained(folder, device="cpu") as engine:
            # Threads and layers start up at any size.
            warm = replace(run, width=min(run.width, 64), height=min(run.height, 64), steps=2)
            pipe(**warm.arguments())
            engine.generate(warm.request())
            turns, difference = alternate(pipe, engine, run)
            stretches = turns.stretches
        return [
            Measurement(
                f"{group}: whole run, {name}, {run.steps} steps",
                "s",
                {side: [sum(times)] for side, times in stretches.items()},
                figures={"relative difference of latents": difference, **asdict(run)},
            ),
            Measurement(
                f"{group}: step with guidance, {name}",
                "s",
                {side: times[1:-1] for side, times in stretches.items()},
            ),
            Measurement(
                f"{group}: CPU time of a step with guidance, {name}",
                "s",
                {side: times[1:-1] for side, times in turns.cpu.items()},
            ),
            Measurement(
                f"{group}: text and preparation, {name}",
                "s",
                {side: times[:1] for side, times in stretches.items()},
            ),
            Measurement(
                f"{group}: decode, {run.num_frames} frames {run.width}x{run.height}",
                "s",
                {side: times[-1:] for side, times in stretches.items()},
            ),
        ]


def peak_memory(shape: WanShape, run: Run) -> list[Measurement]:
    """How far loading a pipeline and one run raise the resident memory (`VmHWM`), weights included.

    Each side runs in a process of its own. Raises ImportError without diffusers, RuntimeError where
    the system does not tell.
    """
    with saved_pipeline(shape) as (_, folder):
        peaks = {side: [peak_gib(side, folder, run)] for side in (RIVAL, SUBJECT)}
    name = f"width {shape.width}, {shape.layers} layers, {run.tokens} tokens"
    return [
        Measurement(
            f"memory: peak of a run, weights included, {name}",
            "GiB",
            peaks,
            figures=asdict(run),
            paired=False,
        )
    ]


@contextmanager
def saved_pipeline(shape: WanShape) -> Iterator[tuple[Any, Path]]:
    """A random pipeline of diffusers, and the folder that it was saved to."""
    pipe = random_pipeline(shape)
    with TemporaryDirectory(prefix="sora-bench-") as folder:
        pipe.save_pretrained(folder)
        yield pipe, Path(folder)


def alternate(pipe: Any, engine: Engine, run: Run) -> tuple[Turns, float]:
    """Times of each stretch (preparation, the steps, decoding) of both; and how much the final
    latents differ, relative to the largest."""
    turns = Turns(RIVAL, SUBJECT)
    latents: dict[str, torch.Tensor] = {}
    errors: list[BaseException] = []

    def diffusers() -> None:
        def before_first(*_: object) -> None:
            hook.remove()
            turns.boundary(RIVAL)

        def after_step(_pipe: object, _i: int, _t: object, kept: dict[str, Any]) -> dict[str, Any]:
            latents[RIVAL] = kept["latents"]
            turns.boundary(RIVAL)
            return {}

        hook = pipe.transformer.register_forward_pre_hook(before_first)
        pipe(**run.arguments(), callback_on_step_end=after_step)

    def sora() -> None:
        def before_step(*_: object) -> None:
            turns.boundary(SUBJECT)

        hook = engine.loaded_model.transformer(0).register_forward_pre_hook(before_step)
        try:
            job = engine.submit(run.request(), on_latents=lambda _: turns.boundary(SUBJECT))
            latents[SUBJECT] = engine.loaded_model.vae.normalise(job.result().latents[None])
        finally:
            hook.remove()

    def whole(name: str, body: Callable[[], None]) -> None:
        turns.start(name)
        try:
            body()
        except BaseException as error:
            errors.append(error)
        finally:
            turns.end(name)

    threads = [
        threading.Thread(target=whole, args=(name, body))
        for name, body in ((RIVAL, diffusers), (SUBJECT, sora))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    counts = {name: len(times) for name, times in turns.stretches.items()}
    if set(counts.values()) != {run.steps + 2}:
        raise RuntimeError(
            f"a run of {run.steps} steps has {run.steps + 2} stretches, got {counts}"
        )
    theirs, ours = latents[RIVAL].double(), latents[SUBJECT].double()
    return turns, float((theirs - ours).abs().max() / theirs.abs().max())


def peak_gib(side: str, folder: Path, run: Run) -> float:
    """How far one run raises the resident memory above that of the imports: in its own process."""
    # Freed blocks go back to the system at once, so that the resident size is what is in use.
    paths = [str(Path(module.__path__[0]).parent) for module in _packages()]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "sora_engine.bench.peak", side, str(folder)]
    command += [str(torch.get_num_threads()), repr(asdict(run))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"the memory of {side} cannot be measured: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1]) / 2**30


def _packages() -> list[Any]:
    import sora_engine
    import sora_kernels

    return [sora_engine, sora_kernels]
