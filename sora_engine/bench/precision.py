"""float32 and bfloat16 on a CPU: a step and a decode in both, beside diffusers in both; and how far
bfloat16 is from float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sora_engine.bench.models import WAN_1_3B, WanShape
from sora_engine.bench.ops import packed
from sora_engine.bench.results import SUBJECT, Measurement, Spread
from sora_engine.bench.timing import interleaved
from sora_engine.models.machine import has_bfloat16, measure_rates
from sora_engine.models.wan.checkpoint import KEEP_FP32
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.request import VideoRequest
from sora_engine.runtime.engine import Engine
from sora_engine.vae.registry import build_vae, read_vae_config

Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_TOKENS = 512


def precision(
    shape: WanShape | None = None,
    grid: tuple[int, int, int] = (2, 22, 24),
    latents: tuple[int, int, int] = (2, 22, 24),
    rounds: int = 5,
) -> list[Measurement]:
    """A step with guidance of 4 Wan-shaped blocks, and the decoding of a few frames.

    grid: of the step's tokens, in patches. latents: frames, height and width of what is decoded.
    bf16 is left out where oneDNN has none. Raises ImportError without diffusers.
    """
    names = [name for name in DTYPES if name == "fp32" or has_bfloat16()]
    return [
        step(shape or replace(WAN_1_3B, layers=4), grid, names, rounds),
        decode((shape or WAN_1_3B).vae_base_dim, latents, names, max(1, rounds - 2)),
    ]


@torch.inference_mode()
def step(shape: WanShape, grid: tuple[int, int, int], names: list[str], rounds: int) -> Measurement:
    """Both branches of a step: one packed pass here, two passes there, the texts' keys at hand
    here and made each time there, as both do from step to step."""
    from diffusers import WanTransformer3DModel

    config = shape.transformer_config()
    torch.manual_seed(0)
    plain = WanTransformer3DModel(**config).eval().requires_grad_(False)
    sample = torch.randn(shape.channels, grid[0], 2 * grid[1], 2 * grid[2])
    texts = [torch.randn(TEXT_TOKENS, shape.text_dim) for _ in range(2)]
    rivals: dict[str, Callable[[], Any]] = {}

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        model = WanTransformer(WanConfig(**config))
        model.load_state_dict(plain.state_dict())
        model = _cast(model, dtype, KEEP_FP32).eval().requires_grad_(False).prepare()
        batch = packed(model, [(sample, text) for text in texts])
        return lambda: model(batch)

    def theirs(dtype: torch.dtype) -> Callable[[], None]:
        model = WanTransformer3DModel(**config).eval().requires_grad_(False)
        model.load_state_dict(plain.state_dict())
        _cast(model, dtype, KEEP_FP32)

        def run() -> None:
            for text in texts:
                model(sample[None].to(dtype), torch.tensor([500.0]), text[None].to(dtype))

        return run

    for name in names:
        rivals[_subject(name, names)] = ours(DTYPES[name])
        rivals[f"diffusers {name}"] = theirs(DTYPES[name])
    times = interleaved(rivals, rounds)
    faults = {
        f"page faults of a later step, {name}": float(_faults(rivals[_subject(name, names)]))
        for name in names
    }
    tokens = grid[0] * grid[1] * grid[2]
    measured = Measurement(
        f"precision: step with guidance, width {shape.width}, {shape.layers} layers, "
        f"{tokens} tokens",
        "s",
        times,
        figures={"GFLOP": step_work(shape, tokens) / 1e9, **faults},
    )
    return replace(
        measured, figures={**measured.figures, **_shares(measured, shape, tokens, names)}
    )


def _faults(step: Callable[[], Any]) -> int:
    """Pages that the system had to find for the last of three steps in a row."""
    import resource  # not on Windows

    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def step_work(shape: WanShape, tokens: int) -> float:
    """Operations of both branches' products and attention, without the texts' keys."""
    products, attention = _work(shape, tokens)
    return products + attention


def _work(shape: WanShape, tokens: int) -> tuple[float, float]:
    width = shape.width
    products = 2 * tokens * width * (6 * width + 2 * shape.ffn_dim)
    attention = 4 * tokens * (tokens + TEXT_TOKENS) * width
    return 2.0 * shape.layers * products, 2.0 * shape.layers * attention


def _shares(
    measured: Measurement, shape: WanShape, tokens: int, names: list[str]
) -> dict[str, float]:
    """Of each of our medians, what products and attention alone would take at this machine's
    rates."""
    rates, threads = measure_rates(), torch.get_num_threads()
    products, attention = _work(shape, tokens)
    found = {}
    for name in names:
        dtype = str(DTYPES[name]).removeprefix("torch.")
        best = max(rates.attention[dtype].values())
        least = (products / rates.linear[dtype] + attention / best) / threads / 1e9
        median = Spread.of(measured.samples[_subject(name, names)]).median
        found[f"share of measured limit, {name}"] = least / median
    return found


@torch.inference_mode()
def decode(base: int, latents: tuple[int, int, int], names: list[str], rounds: int) -> Measurement:
    """Latents to frames: a latent frame at a time here, as diffusers has it there."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    plain = AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)
    weights = plain.state_dict()
    given = {**plain.config, "_class_name": "AutoencoderKLWan"}
    config = read_vae_config({k: v for k, v in given.items() if k in _VAE_KEYS}, path=None)
    z = torch.randn(1, config.z_dim, *latents)
    rivals: dict[str, Callable[[], Any]] = {}

    def ours(dtype: torch.dtype) -> Callable[[], Tensor]:
        vae = build_vae(config)
        vae.load_state_dict(weights)
        vae = _cast(vae, dtype).eval().requires_grad_(False).prepare()
        return lambda: vae.decode(z.to(dtype))

    def theirs(dtype: torch.dtype) -> Callable[[], Any]:
        vae = AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)
        vae.load_state_dict(weights)
        _cast(vae, dtype)
        return lambda: vae.decode(z.to(dtype), return_dict=False)

    for name in names:
        rivals[_subject(name, names)] = ours(DTYPES[name])
        rivals[f"diffusers {name}"] = theirs(DTYPES[name])
    frames = 1 + 4 * (latents[0] - 1)
    size = f"{8 * latents[2]}x{8 * latents[1]}"
    return Measurement(
        f"precision: decode, {frames} frames {size}, VAE of width {base}",
        "s",
        interleaved(rivals, rounds),
    )


_VAE_KEYS = (
    "_class_name",
    "base_dim",
    "z_dim",
    "dim_mult",
    "num_res_blocks",
    "attn_scales",
    "temperal_downsample",
    "latents_mean",
    "latents_std",
)


def _cast(module: Module, dtype: torch.dtype, but: tuple[str, ...] = ()) -> Module:
    """Its parameters in `dtype`, but for those with such parts in their names, which both sides
    keep in float32."""
    for name, parameter in module.named_parameters():
        if not any(part in name for part in but):
            parameter.data = parameter.data.to(dtype)
    return module


def _subject(name: str, names: list[str]) -> str:
    """The fastest of ours is what all are compared with."""
    return SUBJECT if name == names[-1] else f"{SUBJECT} {name}"


# How far bfloat16 is from float32.

DEEP = WanShape(heads=4, head_dim=64, ffn_dim=1024, layers=30, text_dim=256)


def errors(
    shape: WanShape = DEEP, requests: tuple[VideoRequest, ...] | None = None
) -> list[Measurement]:
    """What bfloat16 changes: one pass through 30 random blocks; and videos of the bundled
    checkpoint by a bfloat16 transformer, by a bfloat16 autoencoder, and by both."""
    found = [_deep(shape)]
    wanted = requests or tuple(
        VideoRequest(f"a {colour} {form} moves {way}", seed=i)
        for i, (colour, form, way) in enumerate(
            [("red", "circle", "left"), ("blue", "square", "up"), ("green", "triangle", "right")]
        )
    )
    made = {}
    pairs = [(d, v) for d in ("float32", "bfloat16") for v in ("float32", "bfloat16")]
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
def _deep(shape: WanShape) -> Measurement:
    config = WanConfig(**shape.transformer_config())
    samples = []
    for seed in range(3):
        torch.manual_seed(seed)
        model = WanTransformer(config).eval().requires_grad_(False)
        sample, text = torch.randn(shape.channels, 3, 24, 24), torch.randn(64, shape.text_dim)
        outs = []
        for dtype in DTYPES.values():
            twin = model.rebuild()
            twin.load_state_dict(model.state_dict())
            twin = _cast(twin, dtype, KEEP_FP32).eval().requires_grad_(False).prepare()
            outs.append(twin(packed(twin, [(sample, text)])).float())
        samples.append(_relative(outs[1], outs[0]))
    return Measurement(
        f"errors: relative error of a pass, {shape.layers} random blocks of width {shape.width}, "
        "bfloat16",
        "",
        {SUBJECT: samples},
    )


def _relative(found: Tensor, due: Tensor) -> float:
    return float((found.double() - due.double()).norm() / due.double().norm())
