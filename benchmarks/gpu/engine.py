"""Part 2: the engine end to end, a step of the published sizes, decoding, company, memory."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from shapes import DEVICE, DTYPE

import sora_engine as sora
from gpu.timing import DRY, figure, milliseconds, tflops
from sora_engine.bench.h200 import CASES, NOISE_LEVEL, TEXT_TOKENS, Case, gemm_flops, tiny
from sora_engine.bench.ops import packed
from sora_engine.models.cuda_graph import EAGER_PASSES
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer

ROOT = Path(__file__).parents[2]
Figures = Iterator[dict[str, Any]]
SMALL = {"height": 64, "width": 64, "num_frames": 9, "seed": 7}


def sprites() -> Figures:
    """The bundled checkpoint on this device beside the same request on the CPU."""
    steps = 2 if DRY else 20
    request = sora.VideoRequest("a red circle moves right", num_inference_steps=steps, **SMALL)
    videos = {}
    for device in ("cpu", DEVICE.type):
        with sora.Engine.from_pretrained("sprites", device=device, dtype="float32") as engine:
            engine.generate(request)
            began = time.monotonic()
            videos[device] = engine.generate(request)
            took = time.monotonic() - began
            yield figure(f"{steps} steps on {device}, fp32", f"{took:.3g}", "s")
    one, two = (videos[device].latents.double() for device in ("cpu", DEVICE.type))
    yield figure("relative difference of latents", f"{float((one - two).norm() / one.norm()):.2g}")


def gpu_tests() -> Figures:
    """The tests that need a GPU, compiled kernels and all."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    if DRY:
        command.append("--collect-only")
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = run.stdout.strip().splitlines() or run.stderr.strip().splitlines()
    yield figure("pytest -m gpu", lines[-1] if lines else f"exit code {run.returncode}")
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield figure("failed", line[:300])


def step_small_model() -> Figures:
    """A whole step with guidance."""
    yield from _step(CASES[0])


def step_large_model() -> Figures:
    """Two depths, as the model does not fit the time: a block is their difference."""
    yield from _step(CASES[2])


@torch.inference_mode()
def _step(published: Case) -> Figures:
    case = tiny(published) if DRY else published
    shape, (T, H, W) = case.shape, case.grid
    model = _transformer(case, max(case.depths))
    latents = torch.randn(shape.channels, T, 2 * H, 2 * W, device=DEVICE, dtype=DTYPE)
    texts = [torch.randn(TEXT_TOKENS, shape.text_dim, device=DEVICE, dtype=DTYPE) for _ in range(2)]
    batch = packed(model, [(latents, text) for text in texts], NOISE_LEVEL)
    every, times = model.blocks, {}
    for depth in case.depths:
        model.blocks = every[:depth]
        times[depth] = milliseconds(lambda: model(batch))
        yield figure(
            f"step of {depth} blocks, {case.tokens} tokens a branch", f"{times[depth]:.4g}", "ms"
        )
    low, high = min(times), max(times)
    took = times[high]
    if low != high:
        block = (times[high] - times[low]) / (high - low)
        took += (shape.layers - high) * block
        yield figure("a block", f"{block:.4g}", "ms")
        yield figure(f"step of {shape.layers} blocks, scaled", f"{took:.4g}", "ms")
    gemm = gemm_flops(DEVICE, DTYPE, 128 if DRY else 8192)
    yield figure("rate", tflops(case.flops(), took))
    yield figure("share of the GEMM rate", f"{case.flops() / took * 1e3 / gemm:.1%}")
    yield from _profile(model, every, batch, low)


def _transformer(case: Case, depth: int) -> WanTransformer:
    """Random weights, drawn on the device."""
    config = WanConfig(**{**case.shape.transformer_config(), "num_layers": depth})
    torch.manual_seed(0)
    with torch.device("meta"):
        model = WanTransformer(config)
    model = model.to(DTYPE).to_empty(device=DEVICE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model.eval().requires_grad_(False).prepare()


def _profile(model: WanTransformer, every: Any, batch: Any, depth: int) -> Figures:
    """Launches, and the time in which the device does nothing."""
    if DEVICE.type == "cpu":
        yield figure("launches", "needs a GPU")
        return
    from torch.profiler import ProfilerActivity, profile

    model.blocks = every[:depth]
    model(batch)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        model(batch)
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in events)
    span = max(e.time_range.end for e in events) - min(e.time_range.start for e in events)
    yield figure("launches a block", f"{len(events) / depth:.0f}")
    yield figure("device idle within a pass", f"{1 - busy / span:.1%}")
    by_name: dict[str, float] = {}
    for event in events:
        by_name[event.name] = by_name.get(event.name, 0.0) + event.time_range.elapsed_us()
    for name, took in sorted(by_name.items(), key=lambda item: -item[1])[:8]:
        yield figure(f"kernel {name[:60]}", f"{took / busy:.1%}")


@torch.inference_mode()
def sixteen_small() -> Figures:
    """Sixteen clips of 9 frames at 256x256 in one batch of Wan 1.3B, beside one after the other."""
    case = tiny(CASES[0]) if DRY else CASES[0]
    model = _transformer(case, min(case.shape.layers, 2 if DRY else 30))
    side, count = (2, 2) if DRY else (32, 16)
    text = torch.randn(64, case.shape.text_dim, device=DEVICE, dtype=DTYPE)
    latents = torch.randn(case.shape.channels, 3, side, side, device=DEVICE, dtype=DTYPE)
    one = packed(model, [(latents, text)], NOISE_LEVEL)
    all_of_them = packed(model, [(latents, text)] * count, NOISE_LEVEL)
    together, alone = milliseconds(lambda: model(all_of_them)), milliseconds(lambda: model(one))
    yield figure(f"a step of {count} together", f"{together:.4g}", "ms")
    yield figure("a step of one", f"{alone:.4g}", "ms")
    yield figure("together beside one after the other", f"{count * alone / together:.2f}", "times")


@torch.inference_mode()
def small_passes() -> Figures:
    """Passes that wait for the host, as they are and as CUDA graphs."""
    for published in (CASES[0], CASES[2]):
        case = tiny(published) if DRY else published
        model = _transformer(case, min(case.shape.layers, 2 if DRY else 10))
        size = (2, 2, 2) if DRY else (5, 30, 26)
        text = torch.randn(40, case.shape.text_dim, device=DEVICE, dtype=DTYPE)
        latents = torch.randn(case.shape.channels, *size, device=DEVICE, dtype=DTYPE)
        batch = packed(model, [(latents, text)] * 2, NOISE_LEVEL)
        name = (
            f"{case.shape.width} wide, {len(model.blocks)} blocks, {len(batch.video.tokens)} tokens"
        )
        yield figure(f"{name}: a pass", f"{milliseconds(partial(model, batch)):.4g}", "ms")
        if DEVICE.type == "cpu":
            yield figure(f"{name}: as a CUDA graph", "needs a GPU")
            continue
        torch.cuda.synchronize()
        began = time.perf_counter()
        model(batch)
        yield figure(f"{name}: the host's part", f"{(time.perf_counter() - began) * 1e3:.4g}", "ms")
        model.replay_passes(required=True)
        for _ in range(EAGER_PASSES + 1):
            model(batch)
        yield figure(f"{name}: as a CUDA graph", f"{milliseconds(partial(model, batch)):.4g}", "ms")


def company() -> Figures:
    """How far a request's latents move where others share its batches."""
    steps = 2 if DRY else 20
    dtypes = ("float32",) if DRY else ("bfloat16", "float32")
    request = sora.VideoRequest("a red circle", num_inference_steps=steps, **SMALL)
    others = [sora.VideoRequest("a blue square", num_inference_steps=steps, num_frames=5,
                                height=64 + 16 * i, width=64) for i in range(6)]  # fmt: skip
    for dtype, exact in [(dtype, exact) for dtype in dtypes for exact in (False, True)]:
        with sora.Engine.from_pretrained(
            "sprites", device=DEVICE.type, dtype=dtype, exact=exact
        ) as engine:
            alone = engine.generate(request).latents.double()
            again = engine.generate(request).latents.double()
            packed_in = engine.generate([request, *others])[0].latents.double()
        what = f"{dtype}, exact" if exact else dtype
        yield figure(f"a second run, {what}", f"{float((again - alone).abs().max()):.2g}")
        apart = float((packed_in - alone).norm() / alone.norm())
        yield figure(f"in company of six, {what}, relative", f"{apart:.2g}")


def memory_plan() -> Figures:
    """The promise beside what the allocator saw."""
    request = sora.VideoRequest("a red circle", num_inference_steps=2, height=128, width=128,
                                num_frames=9 if DRY else 33)  # fmt: skip
    with sora.Engine.from_pretrained("sprites", device=DEVICE.type) as engine:
        engine.generate(request)
        began = time.monotonic()
        plan = engine.plan(sora.VideoRequest("a", height=160, width=160, num_frames=9))
        yield figure("plan of a new size", f"{(time.monotonic() - began) * 1e3:.0f}", "ms")
        yield figure("promised there", str(plan))
        if DEVICE.type == "cpu":
            yield figure("measured peak", "needs a GPU")
            return
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        promised = engine.generate(request).receipt.promised_bytes
        peak = torch.cuda.max_memory_allocated() - held
        yield figure("promised", f"{(promised or 0) / 2**20:.1f}", "MiB")
        yield figure("measured peak", f"{peak / 2**20:.1f}", "MiB")


def _decoded(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    from sora_engine.vae import stream_decode

    return torch.cat([frames.float() for frames in stream_decode(vae, latents)], dim=2)


def _by_graph(vae: Any, latents: torch.Tensor, name: str) -> Figures:
    """A steady latent frame replayed, with cuDNN's algorithms by its rules and by their time."""
    from sora_engine.vae.cuda_graph import EAGER_LATENTS, GraphedVAE

    if DEVICE.type == "cpu":
        yield figure(f"{name}, a steady latent frame by CUDA graph", "needs a GPU")
        return
    for by_time in (False, True):
        coder = GraphedVAE(vae, required=True, by_time=by_time)
        states: list[Any] = [None]

        def step(coder: Any = coder, states: list[Any] = states) -> None:
            states[0] = coder.decode_chunk(latents[:, :, :1], states[0], consume=True)[1]

        for _ in range(EAGER_LATENTS + 1):
            step()
        how = "by time" if by_time else "by rule"
        took = milliseconds(step)
        yield figure(f"{name}, a steady latent frame by graph, cuDNN {how}", f"{took:.4g}", "ms")


@torch.inference_mode()
def decode() -> Figures:
    """The VAE in bf16 beside fp32: time, peak, and how far frames are apart."""
    from sora_engine.vae.wan import WanVAE
    from sora_engine.vae.wan_config import WanVAEConfig

    torch.manual_seed(0)
    exact = WanVAE(WanVAEConfig(base_dim=8 if DRY else 96)).eval().requires_grad_(False)
    sizes = [(4, 6)] if DRY else [(60, 104), (90, 160)]
    for height, width in sizes:
        latents = torch.randn(1, 16, 3 if DRY else 5, height, width, device=DEVICE)
        frames = {}
        for dtype in (torch.float32,) if DRY else (torch.float32, torch.bfloat16):
            vae = WanVAE(exact.config).to(DEVICE).eval().requires_grad_(False)
            vae.load_state_dict(exact.state_dict())
            vae = vae.to(dtype).prepare()
            run = partial(_decoded, vae, latents.to(dtype))
            frames[dtype] = run()
            took = milliseconds(run) / latents.shape[2]
            yield figure(f"{8 * width}x{8 * height}, {dtype}, a latent frame", f"{took:.4g}", "ms")
            yield from _by_graph(vae, latents.to(dtype), f"{8 * width}x{8 * height}, {dtype}")
        if len(frames) == 2:
            one, two = frames.values()
            error = float(((one - two) ** 2).mean())
            yield figure(f"{8 * width}x{8 * height}, bf16 beside fp32",
                         f"{10 * torch.tensor(4 / error).log10():.1f}", "dB")  # fmt: skip
