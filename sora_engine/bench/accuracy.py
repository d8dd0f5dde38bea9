"""How far bfloat16 and int8 are from float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sora_engine.bench.models import WanShape
from sora_engine.bench.precision import StepTask
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.request import VideoRequest
from sora_engine.runtime.engine import Engine
from sora_kernels.quant import int8

DEEP = WanShape(heads=4, head_dim=64, ffn_dim=1024, layers=30, text_dim=256)


def errors(
    shape: WanShape = DEEP, requests: tuple[VideoRequest, ...] | None = None
) -> list[Measurement]:
    """What bfloat16 and int8 change: one pass through 30 random blocks; and videos of the bundled
    checkpoint by a bfloat16 transformer, by a bfloat16 autoencoder, by both, and by int8 products.
    Each is left out where the machine has none.
    """
    found = deep_errors(shape)
    wanted = requests or tuple(
        VideoRequest(f"a {colour} {form} moves {way}", seed=i)
        for i, (colour, form, way) in enumerate(
            [("red", "circle", "left"), ("blue", "square", "up"), ("green", "triangle", "right")]
        )
    )
    made = {}
    pairs = [(d, v) for d in ("float32", "bfloat16") for v in ("float32", "bfloat16")]
    if int8.problem() is None:
        pairs.append(("int8:float32", "float32"))
    for dtype, vae_dtype in pairs:
        with Engine.from_pretrained(
            "sprites", device="cpu", dtype=dtype, vae_dtype=vae_dtype
        ) as engine:
            made[dtype, vae_dtype] = [engine.generate(request) for request in wanted]
    exact = made["float32", "float32"]
    for dtype, vae_dtype in pairs[1:]:
        name = f"transformer {dtype}, autoencoder {vae_dtype}"
        videos = made[dtype, vae_dtype]
        latents, levels, largest, noise = [], [], [], []
        for video, due in zip(videos, exact, strict=True):
            latents.append(_relative(video.latents, due.latents))
            away = np.abs(video.frames.astype(np.float64) - due.frames)
            levels.append(float(away.mean()))
            largest.append(float(away.max()))
            noise.append(10 * np.log10(255**2 / max(float((away**2).mean()), 1e-9)))
        for what, unit, values, better in (
            ("relative error of latents", "", latents, "lower"),
            ("mean difference of frames", "levels", levels, "lower"),
            ("largest difference of frames", "levels", largest, "lower"),
            ("PSNR of frames", "dB", noise, "higher"),
        ):
            found.append(
                Measurement(
                    f"errors: {what}, sprites, {name}",
                    unit,
                    {SUBJECT: [float(value) for value in values]},
                    better=better,
                )
            )
    return found


@torch.inference_mode()
def deep_errors(shape: WanShape) -> list[Measurement]:
    """Of one pass through random blocks, relative to float32; three seeds each."""
    names = ["bf16"] if int8.problem() else ["bf16", "int8"]
    samples: dict[str, list[float]] = {name: [] for name in names}
    for seed in range(3):
        task = StepTask(shape, (3, 12, 12), text_tokens=64, seed=seed)
        exact = task.step_of(task.ours("fp32"))()
        for name in names:
            samples[name].append(_relative(task.step_of(task.ours(name))(), exact))
    return [
        Measurement(
            f"errors: relative error of a pass, {shape.layers} random blocks of width "
            f"{shape.width}, {NAMES[name]}",
            "",
            {SUBJECT: values},
        )
        for name, values in samples.items()
    ]


NAMES = {"bf16": "bfloat16", "int8": "int8 products in a bfloat16 pass"}


def _relative(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).norm() / due.double().norm())
