"""The profile for one large GPU: a denoising step of published shapes, beside diffusers.

Each case is one step with guidance: two branches of the same video and of two texts. The engine
packs both into one batch and has the texts' keys at hand; diffusers runs one branch after the
other, as its pipelines do: eager, with its blocks compiled, with the best of its attention
backends, and with both. All of them share one set of random weights.

Where a model's blocks do not fit the time, two depths are measured and the step is scaled to the
published depth: `step(depth 2) + (blocks - depth 2) * (step(depth 2) - step(depth 1)) / (depth 2 -
depth 1)`. The figures say so.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sora_engine.bench.models import WAN_1_3B, WAN_5B, WAN_14B, WanShape
from sora_engine.bench.ops import packed
from sora_engine.bench.results import SUBJECT, Measurement
from sora_engine.bench.timing import interleaved, seconds
from sora_engine.models.wan.checkpoint import KEEP_FP32
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer

logger = logging.getLogger(__name__)

BUDGET_S = 9 * 60.0
ATTENTION_BACKENDS = ("_flash_3", "flash", "_native_cudnn", "_native_flash", "sage", "xformers")
TEXT_TOKENS = 512
NOISE_LEVEL = 500.0
RIVAL = "diffusers"


@dataclass(frozen=True, slots=True)
class Case:
    """A published model and size. depths: the numbers of blocks that are run; one, or two of which
    the second is scaled up. share_s: what it may take of the time."""

    name: str
    shape: WanShape
    grid: tuple[int, int, int]
    depths: tuple[int, ...]
    share_s: float

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]

    def flops(self) -> float:
        """Of one step: products and attention of both branches at the published depth."""
        n, d = self.tokens, self.shape.width
        block = 2 * n * d * (6 * d + 2 * self.shape.ffn_dim)  # the texts' keys are made once a run
        attention = 4 * n * n * d + 4 * n * TEXT_TOKENS * d
        return 2.0 * self.shape.layers * (block + attention)


# Grids in patches: 81 frames are 21 latents; 480p is 832x480, 720p 1280x720; the 5B's VAE takes
# 121 frames of 1280x704 to 31 latents of 80x44.
CASES = (
    Case("Wan 1.3B 480p", WAN_1_3B, (21, 30, 52), (30,), 110),
    Case("Wan 14B 480p", WAN_14B, (21, 30, 52), (2, 6), 110),
    Case("Wan 14B 720p", WAN_14B, (21, 45, 80), (1, 3), 140),
    Case("Wan 2.2 5B 704p", WAN_5B, (31, 22, 40), (4, 12), 90),
)


def tiny(case: Case) -> Case:
    """The same case small enough for a dry run on a CPU."""
    shape = WanShape(heads=2, head_dim=12, ffn_dim=32, text_dim=16, layers=len(case.depths) * 2)
    depths = (2,) if len(case.depths) == 1 else (1, 2)
    return replace(case, shape=shape, grid=(2, 2, 3), depths=depths)


def h200(
    *,
    device: str = "cuda",
    dry_run: bool = False,
    budget_s: float = BUDGET_S,
    say: Callable[[str], None] = logger.info,
) -> list[Measurement]:
    """All cases, as far as the time goes. dry_run: tiny sizes, eager instead of Inductor."""
    started = time.monotonic()
    target = torch.device(device)
    dtype = torch.float32 if target.type == "cpu" else torch.bfloat16
    gemm = gemm_flops(target, dtype, 128 if dry_run else 8192)
    say(f"GEMM of random data: {gemm / 1e12:.4g} TFLOP/s")
    found = [Measurement("h200: GEMM rate", "TFLOP/s", {SUBJECT: [gemm / 1e12]}, better="higher")]
    for case in CASES:
        left = budget_s - (time.monotonic() - started)
        if left < case.share_s / 2:
            say(f"{case.name}: left out, {left:.0f} s are left of {budget_s:.0f}")
            continue
        limit_s = min(left, case.share_s)
        found += measure(
            tiny(case) if dry_run else case, target, dtype, gemm, limit_s, dry_run=dry_run, say=say
        )
        if target.type == "cuda":
            torch.cuda.empty_cache()
    return found


@torch.inference_mode()
def gemm_flops(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP a second of a square product of random data, the median of 10."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = sorted(seconds(lambda: a @ b) for _ in range(13))[:10]
    return 2 * size**3 / times[5]


@torch.inference_mode()
def measure(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    gemm: float,
    limit_s: float,
    *,
    dry_run: bool,
    say: Callable[[str], None],
) -> list[Measurement]:
    """The step of one case by every rival that can run it within `limit_s`."""
    started = time.monotonic()
    torch.manual_seed(0)
    theirs, ours = build(case, device, dtype)
    shape, (T, H, W) = case.shape, case.grid
    latents = torch.randn(shape.channels, T, 2 * H, 2 * W, device=device, dtype=dtype)
    texts = [torch.randn(TEXT_TOKENS, shape.text_dim, device=device, dtype=dtype) for _ in range(2)]
    batch = packed(ours, [(latents, text) for text in texts], NOISE_LEVEL)
    level = torch.tensor([NOISE_LEVEL], device=device)

    def their_step() -> list[Tensor]:
        return [theirs(latents[None], level, t[None], return_dict=False)[0][0] for t in texts]

    figures: dict[str, float | str] = {"tokens of a branch": case.tokens, "dtype": str(dtype)}
    backend = best_attention(theirs, their_step, say)
    # (compiled, attention backend) of each rival
    rivals: dict[str, tuple[bool, str | None]] = {f"{RIVAL} eager": (False, None)}
    if backend is not None:
        figures["diffusers' best attention backend"] = backend
        rivals[f"{RIVAL}, best attention"] = (False, backend)
    rivals[f"{RIVAL} compiled"] = (True, None)
    if backend is not None:
        rivals[f"{RIVAL} compiled, best attention"] = (True, backend)
    samples: dict[str, dict[str, list[float]]] = {}
    for name, (compiled, attention) in rivals.items():
        if time.monotonic() - started > limit_s:
            say(f"{case.name}: {name} left out, its time is over")
            continue
        try:
            plain(theirs)
            if attention is not None:
                theirs.set_attention_backend(attention)
            if compiled:
                compile_blocks(theirs, dry_run)
            times = {
                depth: _paired(depth, ours, theirs, batch, their_step) for depth in case.depths
            }
        except Exception as error:  # what this machine or this diffusers cannot run
            why = f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
            say(f"{case.name}: {name} left out, {why}")
            continue
        both = scale(times, shape.layers)
        samples[name] = {SUBJECT: both[SUBJECT], name: both[RIVAL]}
    plain(theirs)
    figures["relative difference"] = difference(ours, batch, their_step, shape)
    figures["blocks run"] = " and ".join(map(str, case.depths))
    if len(case.depths) > 1:
        figures["scaled to blocks"] = shape.layers
    found = []
    for name, rounds in samples.items():
        rate = case.flops() / statistics.median(rounds[SUBJECT])
        rates = {"TFLOP/s": rate / 1e12, "share of the GEMM rate": rate / gemm}
        title = f"h200: step with guidance, {case.name}, beside {name}"
        found.append(Measurement(title, "s", rounds, figures={**figures, **rates}))
    return found


def _paired(
    depth: int,
    ours: WanTransformer,
    theirs: Any,
    batch: Any,
    their_step: Callable[[], list[Tensor]],
) -> dict[str, list[float]]:
    """Seconds of both with `depth` blocks, in turns."""
    all_ours, all_theirs = ours.blocks, theirs.blocks
    try:
        ours.blocks, theirs.blocks = all_ours[:depth], all_theirs[:depth]
        return interleaved({SUBJECT: lambda: ours(batch), RIVAL: their_step}, rounds=5, warmup=2)
    finally:
        ours.blocks, theirs.blocks = all_ours, all_theirs


def scale(
    times: Mapping[int, Mapping[str, Sequence[float]]], blocks: int
) -> dict[str, list[float]]:
    """Samples of a step with `blocks` blocks, from those at one depth or two."""
    depths = sorted(times)
    if len(depths) == 1:
        return {name: list(values) for name, values in times[depths[0]].items()}
    low, high = depths
    return {
        name: [
            deep + (blocks - high) * (deep - shallow) / (high - low)
            for shallow, deep in zip(times[low][name], times[high][name], strict=True)
        ]
        for name in times[high]
    }


def build(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Any, WanTransformer]:
    """diffusers' transformer with random weights, and ours on the very same tensors, but for those
    that a GPU has joined."""
    from diffusers import WanTransformer3DModel

    config = {**case.shape.transformer_config(), "num_layers": max(case.depths)}
    with torch.device(device):
        theirs = WanTransformer3DModel(**config).eval().requires_grad_(False)
    for name, parameter in theirs.named_parameters():
        if not any(part in KEEP_FP32 for part in name.split(".")):
            parameter.data = parameter.data.to(dtype)
    with torch.device("meta"):
        ours = WanTransformer(WanConfig(**config))
    ours.load_state_dict(theirs.state_dict(), assign=True)
    ours.eval().requires_grad_(False)
    return theirs, ours.prepare() if device.type == "cuda" else ours


def plain(theirs: Any) -> None:
    """Back to eager blocks and the default attention."""
    for block in theirs.blocks:
        block._compiled_call_impl = None
    theirs.reset_attention_backend()


def compile_blocks(theirs: Any, dry_run: bool) -> None:
    torch._dynamo.reset()
    theirs.compile_repeated_blocks(fullgraph=True, backend="eager" if dry_run else "inductor")


def best_attention(
    theirs: Any, step: Callable[[], object], say: Callable[[str], None]
) -> str | None:
    """The fastest of diffusers' attention backends on one block; None for the default one."""
    every = theirs.blocks
    times: dict[str, float] = {}
    theirs.blocks = every[:1]
    try:
        for name in ("native", *ATTENTION_BACKENDS):
            try:
                theirs.set_attention_backend(name)
                step()
                times[name] = min(seconds(step) for _ in range(3))
            except Exception as error:
                say(f"diffusers' attention {name!r}: {type(error).__name__}")
    finally:
        theirs.blocks = every
        theirs.reset_attention_backend()
    best = min(times, key=lambda name: times[name], default="native")
    return None if best == "native" else best


def difference(
    ours: WanTransformer, batch: Any, their_step: Callable[[], list[Tensor]], shape: WanShape
) -> float:
    """Largest difference of the two predictions, relative to the largest value."""
    from sora_engine.denoise.packing import Packer

    packer = Packer(ours.config.patch_size, batch.video.tokens.device)
    actual = packer.unpack(ours(batch), batch, shape.channels)
    pairs = zip(actual, their_step(), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
