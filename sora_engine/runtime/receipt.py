"""How a video was computed: enough to compute it again, or to see why two computers differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from sora_engine.models.video_model import VideoModel
from sora_engine.request.request import ResolvedRequest
from sora_engine.vae.fit import FittedCoder
from sora_kernels.dispatch import OPS


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What `Video.receipt` tells.

    ops: which backends served each op of `sora_kernels`.
    most_in_company: the most jobs that shared a batch with this one, itself included.
    largest_batch_tokens: tokens of the largest pass that it took part in, others' included.
    noise: `"seed"`, or `"given"` where the request brought its own.
    vae_tiles: the tiles in which frames were coded because they did not fit whole, by "decode" and
        "encode"; empty where they did. Frames in tiles are an approximation: edges are blended.
    resumed_at: the step at which it was taken up from a file; None where it ran in one go.
    promised_bytes: the peak of memory that was computed before work began.
    lossy: options that trade accuracy, each with its measured relative error; empty unless asked
        for.
    """

    device: str
    dtype: str
    vae: str
    vae_dtype: str
    ops: dict[str, list[str]]
    solver: str
    seed: int
    noise: str
    most_in_company: int
    largest_batch_tokens: int
    vae_tiles: dict[str, str] = field(default_factory=dict)
    resumed_at: int | None = None
    promised_bytes: int | None = None
    lossy: dict[str, float] = field(default_factory=dict)

    @property
    def packed(self) -> bool:
        """Whether any of its steps shared a batch with other jobs."""
        return self.most_in_company > 1

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "packed": self.packed}


def write_receipt(
    request: ResolvedRequest,
    model: VideoModel,
    *,
    ops: dict[str, list[str]],
    solver: str,
    most_in_company: int,
    largest_batch_tokens: int,
    resumed_at: int | None,
    promised_bytes: int | None,
) -> Receipt:
    """The receipt of a finished request."""
    unit = model.grid.vae_spatial
    fitted = model.vae if isinstance(model.vae, FittedCoder) else None
    return Receipt(
        device=str(model.device),
        dtype=_name(model.dtype),
        vae=type(fitted.coder if fitted else model.vae).__name__,
        vae_dtype=_name(model.vae_dtype),
        ops=ops,
        solver=solver,
        seed=request.seed,
        noise="seed" if request.latents is None else "given",
        most_in_company=most_in_company,
        largest_batch_tokens=largest_batch_tokens,
        vae_tiles=fitted.tiles_used(request.height // unit, request.width // unit)
        if fitted
        else {},
        resumed_at=resumed_at,
        promised_bytes=promised_bytes,
    )


def backends_of(model: VideoModel) -> dict[str, list[str]]:
    """The backends that have served this model's transformer, by op."""
    transformer = model.loaded_transformer
    config = transformer.config
    widths = {config.inner_dim, config.attention_head_dim}
    found: dict[str, list[str]] = {}
    for name, op in OPS.items():
        wanted = transformer.backends.attention if "attention" in name else None
        served = {
            backend
            for asked, case, backend in op.served()
            if asked == (wanted or transformer.backends.fused)
            and case.device_type == model.device.type
            and case.dtype == model.dtype
            and case.width in widths
        }
        if served:
            found[name] = sorted(served)
    return found


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
