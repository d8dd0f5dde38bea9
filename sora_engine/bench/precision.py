"""float32, bfloat16 and int8 on a CPU: a step in each, and a decode, beside diffusers, and beside
the step's products and attention alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sora_engine.bench.models import WAN_1_3B, WanShape
from sora_engine.bench.ops import packed
from sora_engine.bench.results import SUBJECT, Measurement, Spread
from sora_engine.bench.timing import cpu_seconds, interleaved
from sora_engine.models.linear import linear_gelu
from sora_engine.models.machine import has_bfloat16
from sora_engine.models.quantised import Int8Linear
from sora_engine.models.wan.checkpoint import KEEP_FP32
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.vae.registry import build_vae, read_vae_config
from sora_kernels import packed_attention
from sora_kernels.quant import int8

Module = TypeVar("Module", bound=nn.Module)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXT_TOKENS = 512


Rivals = dict[str, Callable[[], Any]]


def precision(
    shape: WanShape | None = None,
    grid: tuple[int, int, int] = (2, 22, 24),
    latents: tuple[int, int, int] = (2, 22, 24),
    rounds: int = 5,
) -> list[Measurement]:
    """A step with guidance of 4 Wan-shaped blocks, and the decoding of a few frames.

    grid: of the step's tokens, in patches. latents: frames, height and width of what is decoded.
    bf16 is left out where oneDNN has none, int8 where PyTorch has none. Raises ImportError without
    diffusers.
    """
    names = [name for name in DTYPES if name == "fp32" or has_bfloat16()]
    return [
        step(shape or replace(WAN_1_3B, layers=4), grid, names, rounds),
        decode((shape or WAN_1_3B).vae_base_dim, latents, names, rounds),
    ]


@torch.inference_mode()
def step(shape: WanShape, grid: tuple[int, int, int], names: list[str], rounds: int) -> Measurement:
    """Both branches of a step: one packed pass here, two passes there, the texts' keys at hand
    here and made each time there, as both do from step to step."""
    task = StepTask(shape, grid)
    rivals: Rivals = {}
    for name in names:
        ours = task.ours(name)
        rivals[_subject(name, names)] = task.step_of(ours)
        if name == names[-1]:
            rivals[ALONE] = task.alone(ours, name)
        rivals[f"diffusers {name}"] = task.theirs(name)
    if int8.problem() is None:
        rivals[f"{SUBJECT} int8"] = task.step_of(task.ours("int8"))
    cpu: dict[str, list[float]] = {side: [] for side in rivals}
    times = interleaved({side: _noting(rivals[side], cpu[side]) for side in rivals}, rounds)
    # Each has run so often; so the last of the steps that follow is its tenth.
    more = max(3, 9 - rounds)
    figures: dict[str, float | str] = {
        f"page faults of the tenth step, {side}": float(_faults(rivals[side], more))
        for side in rivals
        if side.startswith(SUBJECT)
    }
    pairs = zip(times[SUBJECT], times[ALONE], strict=True)
    figures[f"times of {ALONE}, {names[-1]}"] = Spread.of(
        [ours / bare for ours, bare in pairs]
    ).median
    for side, walls in times.items():
        spent = zip(cpu[side][-rounds:], walls, strict=True)
        figures[f"cores busy, {side}"] = Spread.of([own / wall for own, wall in spent]).median
    figures["GFLOP"] = step_work(shape, task.tokens) / 1e9
    return Measurement(
        f"precision: step with guidance, width {shape.width}, {shape.layers} layers, "
        f"{task.tokens} tokens",
        "s",
        times,
        figures=figures,
    )


ALONE = "products and attention alone"


class StepTask:
    """One step with guidance, the same weights and inputs for all who take it.

    shape: the transformer's. grid: of its tokens, in patches.
    """

    def __init__(
        self,
        shape: WanShape,
        grid: tuple[int, int, int],
        text_tokens: int = TEXT_TOKENS,
        seed: int = 0,
    ) -> None:
        from diffusers import WanTransformer3DModel

        self.shape, self.tokens = shape, grid[0] * grid[1] * grid[2]
        torch.manual_seed(seed)
        self.plain = WanTransformer3DModel(**shape.transformer_config())
        self.plain.eval().requires_grad_(False)
        self.sample = torch.randn(shape.channels, grid[0], 2 * grid[1], 2 * grid[2])
        self.texts = [torch.randn(text_tokens, shape.text_dim) for _ in range(2)]

    def ours(self, name: str) -> WanTransformer:
        """The engine's transformer, prepared: in one of `DTYPES`, or "int8", what is not of blocks'
        layers then in bf16 where oneDNN has it."""
        model = WanTransformer(WanConfig(**self.shape.transformer_config()))
        model.load_state_dict(self.plain.state_dict())
        if name == "int8":
            for block in model.blocks:
                _make_int8(block)
            name = "bf16" if has_bfloat16() else "fp32"
        return cast_weights(model, DTYPES[name], KEEP_FP32).eval().requires_grad_(False).prepare()

    def step_of(self, model: WanTransformer) -> Callable[[], Tensor]:
        """Both branches, packed."""
        batch = packed(model, [(self.sample, text) for text in self.texts])
        return lambda: model(batch)

    def alone(self, model: WanTransformer, name: str) -> Callable[[], None]:
        """The products and the attention of such a step, by the same layers, and nothing else."""
        width, dtype = self.shape.width, DTYPES[name]
        rows = torch.randn(2 * self.tokens, width).to(dtype)
        wide = torch.randn(2 * self.tokens, self.shape.ffn_dim).to(dtype)
        heads = rows.view(len(rows), self.shape.heads, -1)
        keys = torch.randn(2 * TEXT_TOKENS, *heads.shape[1:]).to(dtype)
        own, text = (
            torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (self.tokens, TEXT_TOKENS)
        )

        def run() -> None:
            for block in model.blocks:
                one, other, ffn = block.attn1, block.attn2, block.ffn.net
                for layer in (one.to_q, one.to_k, one.to_v, one.to_out[0]):
                    layer(rows)
                for layer in (other.to_q, other.to_out[0]):
                    layer(rows)
                linear_gelu(cast(nn.Module, ffn[0].proj), rows, "tanh")
                ffn[2](wide)
                for keyed, cu in ((heads, own), (keys, text)):
                    packed_attention(
                        heads, keyed, keyed, own, cu, max_seqlen_q=self.tokens,
                        max_seqlen_k=len(keyed) // 2,
                    )  # fmt: skip

        return run

    def theirs(self, name: str) -> Callable[[], None]:
        """diffusers: a pass for each branch."""
        dtype = DTYPES[name]
        model = type(self.plain)(**self.shape.transformer_config()).eval().requires_grad_(False)
        model.load_state_dict(self.plain.state_dict())
        cast_weights(model, dtype, KEEP_FP32)
        sample, texts = self.sample[None].to(dtype), [text[None].to(dtype) for text in self.texts]

        def run() -> None:
            for text in texts:
                model(sample, torch.tensor([500.0]), text)

        return run


def _make_int8(module: nn.Module) -> None:
    """Give each linear layer within `module` the int8 layer that `dtype="int8"` makes of it."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(*int8.quantise_weight(child.weight), child.bias))
        else:
            _make_int8(child)


def _noting(step: Callable[[], Any], spent: list[float]) -> Callable[[], None]:
    """The step, which notes the CPU time of each run, all threads."""

    def run() -> None:
        spent.append(cpu_seconds(step))

    return run


def _faults(step: Callable[[], Any], steps: int) -> int:
    """Pages that the system had to find for the last of so many steps in a row."""
    import resource  # not on Windows

    for _ in range(steps):
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
        vae = cast_weights(vae, dtype).eval().requires_grad_(False).prepare()
        return lambda: vae.decode(z.to(dtype))

    def theirs(dtype: torch.dtype) -> Callable[[], Any]:
        vae = AutoencoderKLWan(base_dim=base).eval().requires_grad_(False)
        vae.load_state_dict(weights)
        cast_weights(vae, dtype)
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


def cast_weights(module: Module, dtype: torch.dtype, but: tuple[str, ...] = ()) -> Module:
    """Its parameters in `dtype`, but for those with such parts in their names, which both sides
    keep in float32."""
    for name, parameter in module.named_parameters():
        if not any(part in name for part in but):
            parameter.data = parameter.data.to(dtype)
    return module


def _subject(name: str, names: list[str]) -> str:
    """The fastest of ours is what all are compared with."""
    return SUBJECT if name == names[-1] else f"{SUBJECT} {name}"
