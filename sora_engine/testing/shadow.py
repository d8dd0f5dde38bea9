"""Requests walked through on a shadow device, phase by phase: where the host waits for its GPU.

    python -m sora_engine.testing.shadow                            # the bundled checkpoint
    python -m sora_engine.testing.shadow --model DIR --task windows # any other
    python -m sora_engine.testing.shadow --kind t2v --task plain    # a tiny pipeline of the tests

prints every wait and every copy with its line.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sora_engine.config import NO_LIMIT, Limits
from sora_engine.models.loading import load_video_model
from sora_engine.models.video_model import VideoModel
from sora_engine.request import (
    Clip,
    Guidance,
    KnownMode,
    Shot,
    SparsePlan,
    VideoRequest,
    WindowPlan,
    check_for_mode,
    resolve_request,
)
from sora_engine.runtime.executor import LocalExecutor
from sora_engine.samplers import SOLVERS
from sora_engine.testing.crossings import Tally, table
from sora_engine.testing.device import shadow_device
from sora_engine.testing.state import Shadow
from sora_engine.testing.tensors import ShadowTensor
from sora_engine.vae.cuda_graph import GraphedVAE
from sora_engine.vae.fit import FittedCoder

STEPS, MOST_FRAMES = 4, 1000
KINDS = ("t2v", "i2v", "flf2v", "a14b-i2v", "ti2v-5b", "vace")
"""Tiny pipelines that the tests of a checkout can build."""

Make = Callable[["Sizes"], VideoRequest]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Small requests for a model, whatever its grid is."""

    model: VideoModel

    @property
    def side(self) -> int:
        grid = self.model.grid
        return 2 * grid.vae_spatial * grid.patch[1]

    def frames(self, latent_frames: int) -> int:
        return 1 + (latent_frames - 1) * self.model.grid.time

    def clip(self, latent_frames: int, at: int = 0, mask: np.ndarray | None = None) -> Clip:
        shape = (self.frames(latent_frames), self.side, self.side, 3)
        pixels = np.random.default_rng(at).integers(0, 256, shape, dtype=np.uint8)
        return Clip(pixels, at=at, mask=mask)

    def request(self, latent_frames: int = 3, **fields: object) -> VideoRequest:
        """A request with what its model cannot do without: a first frame, and a last one."""
        clips: list[Clip] = []
        if self.model.known_mode.animates:
            clips.append(self.clip(1))
            if self.model.takes_last_image:
                clips.append(self.clip(1, at=self.frames(latent_frames) - 1))
        values: dict[str, object] = {
            "prompt": "a red circle moves left",
            "negative_prompt": "blue cat",
            "height": self.side,
            "width": self.side,
            "num_frames": self.frames(latent_frames),
            "num_inference_steps": STEPS,
            "guidance_scale": 3.0,
            "seed": 1,
            "clips": clips,
        }
        return VideoRequest(**{**values, **fields})  # type: ignore[arg-type]

    def ends_known(self) -> np.ndarray:
        mask = np.ones(self.frames(3), bool)
        mask[1 : 1 + self.model.grid.time] = False
        return mask

    def half_known(self) -> np.ndarray:
        mask = np.zeros((self.frames(3), self.side, self.side), bool)
        mask[:, :, : self.side // 2] = True
        return mask


REQUESTS: Mapping[str, Make] = {
    "plain": lambda s: s.request(),
    "image": lambda s: s.request(1),
    "long": lambda s: s.request(7),
    "loop": lambda s: s.request(num_frames=4 * s.model.grid.time, loop=True),
    "shots": lambda s: s.request(
        shots=[Shot("a red circle", s.frames(1)), Shot("a blue cat", s.frames(3) - s.frames(1))]
    ),
    "windows": lambda s: s.request(9, window=WindowPlan(4, 2)),
    "moving loop": lambda s: s.request(
        num_frames=8 * s.model.grid.time, loop=True, window=WindowPlan(4, 2, schedule="moving")
    ),
    "chained": lambda s: s.request(
        9, window=WindowPlan(4, 2, schedule="chained", anchors=1), num_inference_steps=2
    ),
    "sparse": lambda s: s.request(9, window=SparsePlan(3)),
    "known": lambda s: s.request(clips=[s.clip(1)]),
    "extend": lambda s: s.request(clips=[s.clip(2)]),
    "inpaint": lambda s: s.request(clips=[s.clip(3, mask=s.half_known())]),
    "fill": lambda s: s.request(clips=[s.clip(3, mask=s.ends_known())]),
    "connect": lambda s: s.request(5, clips=[s.clip(2), s.clip(1, at=s.frames(5) - 1)]),
    "loop a clip": lambda s: s.request(
        num_frames=4 * s.model.grid.time, loop=True, clips=[s.clip(3)]
    ),
    "edit": lambda s: s.request(init=s.clip(3).frames, strength=0.6),
    "resample": lambda s: s.request(clips=[s.clip(2)], resample=2),
    "apg": lambda s: s.request(guidance=Guidance(kind="apg", momentum=-0.5)),
    "cfg-zero": lambda s: s.request(guidance=Guidance(kind="cfg_zero_star", zero_init_steps=1)),
    "unguided": lambda s: s.request(guidance_scale=1.0),
    "ddpm": lambda s: s.request(solver="ddpm"),
}
"""Requests by the name of what is particular about them."""


def suits(task: str, model: VideoModel) -> bool:
    """Whether a model can do what a request of `REQUESTS` asks for."""
    mode = model.known_mode
    if task == "chained":
        return mode is KnownMode.NOISE_LEVEL
    if task == "resample":
        return mode is KnownMode.REPLACEMENT
    if model.takes_last_image and task in ("known", "extend"):
        return False
    return not mode.animates or (task != "image" and "loop" not in task)


@dataclass(frozen=True, slots=True, eq=False)
class Walk:
    """What a request came to. latents: as `Video.latents`; frames: uint8 `[n, H, W, 3]`, none where
    they were not decoded; phases: by name, in order."""

    latents: Tensor
    frames: Tensor
    phases: dict[str, Tally]

    def summary(self) -> dict[str, Tally]:
        """The phases that a table has: of the steps behind the first, and of the latent frames
        behind the first, the one that waits and copies most."""
        summed = {}
        for name in ("encode", "first step", "step", "finish", "first frame", "frame"):
            of_kind = [t for at, t in self.phases.items() if at.rstrip("0123456789 ") == name]
            if of_kind:
                summed[name] = max(of_kind, key=lambda t: (t.waits, *t.figures().values()))
        return summed


def load(path: str | Path, shadow: Shadow, device: str = "cuda") -> VideoModel:
    """A checkpoint on the shadow device, in the dtype that it has on a GPU."""
    with shadow.trace.phase("load"):
        model = load_video_model(path, device=device, cuda_graphs="off")
        for expert in range(model.num_experts):
            model.transformer(expert).replay_passes(recorder=run_again)
    if model.vae.layers is not None:
        coder = GraphedVAE(model.vae.layers, recorder=run_again)
        model.vae = FittedCoder(coder, dtype=model.vae_dtype, device=model.device)
    model.vae.limit(NO_LIMIT)
    return model


def run_again(step: Callable[[], None], device: torch.device) -> tuple[Callable[[], None], int]:
    """A `recording.Recorder` whose graph is the step itself, on the same places in memory."""
    return step, 0


def walk(model: VideoModel, request: VideoRequest, shadow: Shadow, *, decode: bool = True) -> Walk:
    """What an engine's worker does for one request, turn after turn."""
    executor = LocalExecutor(model)
    resolved = resolve_request(request, model, Limits(), solvers=SOLVERS)
    check_for_mode(resolved, model.known_mode, model.takes_camera)
    if request.loras and model.adapters is not None:
        records, _held = model.adapters.take(request.loras)
        resolved = replace(resolved, loras=records)
    trace = shadow.trace
    phases: dict[str, Tally] = {}

    @contextmanager
    def phase(name: str) -> Iterator[None]:
        trace.phases.pop(name, None)
        with trace.phase(name) as tally:
            phases[name] = tally
            yield

    canvas = None
    with phase("encode"):
        stages = executor.preparing(resolved)
        while canvas is None:
            try:
                next(stages)
            except StopIteration as done:
                canvas = done.value
    assert canvas is not None
    while not canvas.finished:
        with phase("first step" if canvas.step == 0 else f"step {canvas.step + 1}"):
            failures = executor.step([canvas], NO_LIMIT)
        for error in failures.values():
            raise error
    canvas.keep_latents_alone()
    with phase("finish"):
        latents = model.vae.denormalise(canvas.latents[None])[0].float().cpu()
    if not decode:
        return Walk(latents, torch.empty(0, dtype=torch.uint8), phases)
    chunks, parts = executor.decoding(canvas, latents), []
    for i in range(MOST_FRAMES):
        try:
            with phase("first frame" if i == 0 else f"frame {i + 1}"):
                chunk = next(chunks)
        except StopIteration:
            break
        if chunk is not None:  # a loop's first laps give none
            assert not isinstance(chunk, ShadowTensor), "frames are the host's"
            parts.append(chunk)
    phases.popitem()  # the end of the decoder is no frame
    return Walk(latents, torch.cat(parts), phases)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what crosses and what waits for requests on a checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="sprites", help="a checkpoint; sprites is bundled")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="tiny pipelines of the tests")
    parser.add_argument("--task", nargs="+", choices=[*REQUESTS], default=["plain"])
    asked = parser.parse_args(arguments)
    for kind in asked.kind or [None]:
        with tempfile.TemporaryDirectory() as folder, shadow_device() as shadow:
            path = asked.model if kind is None else build(kind, Path(folder))
            model = load(path, shadow)
            print(*table({f"{kind or path}: load": shadow.trace.phases["load"]}), sep="\n")
            for task in asked.task:
                if not suits(task, model):
                    print(f"{kind or path}: {task} is not for this checkpoint", file=sys.stderr)
                    continue
                summary = walk(model, REQUESTS[task](Sizes(model)), shadow).summary()
                named = {f"{kind or path}: {task}: {name}": t for name, t in summary.items()}
                print(*table(named), sep="\n")
    return 0


def build(kind: str, folder: Path) -> Path:
    """A tiny pipeline of the tests in a folder. Raises SystemExit outside of a checkout."""
    try:
        oracles = importlib.import_module("tests.parity.oracles")
    except ImportError as error:
        raise SystemExit(f"--kind needs the tests of a checkout and diffusers: {error}") from error
    oracles.tiny_pipeline(kind, seed=3).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    raise SystemExit(main())
