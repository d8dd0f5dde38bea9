"""How a request is guided: by which rule, how strongly, and over which steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sora_engine.errors import RequestError


def needs_unconditional(scale: float) -> bool:
    """Whether a guidance scale takes an unconditional prediction at all."""
    return scale > 1.0


@dataclass(frozen=True)
class Guidance:
    """How one request is guided.

    kind: "cfg", "cfg_zero_star" or "apg". scale: 1 or less is no guidance; None stands for the
    checkpoint's own. rescale: see `denoise.guidance.rescaled`.
    start, stop: the part of the steps that is guided, as fractions (Kynkäänniemi et al.,
    arXiv 2404.07724); step i of n is guided if `int(start n) <= i < int(stop n)`.
    zero_init_steps: CFG-Zero*'s first steps, whose prediction is 0. eta, norm_threshold, momentum:
    see `denoise.guidance.apg`.
    """

    kind: Literal["cfg", "cfg_zero_star", "apg"] = "cfg"
    scale: float | None = None
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    zero_init_steps: int = 0
    eta: float = 1.0
    norm_threshold: float = 0.0
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("cfg", "cfg_zero_star", "apg"):
            raise RequestError(
                f"guidance {self.kind!r} is not known; choose cfg, cfg_zero_star or apg"
            )
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise RequestError(
                f"guidance interval {self.start} to {self.stop} must rise and lie in 0 to 1"
            )
        if not 0.0 <= self.rescale <= 1.0:
            raise RequestError(f"guidance rescale = {self.rescale} must lie in 0 to 1")
        if self.zero_init_steps and self.kind != "cfg_zero_star":
            raise RequestError(
                f"zero_init_steps = {self.zero_init_steps} belongs to cfg_zero_star, "
                f"not to {self.kind}"
            )

    def needs_unconditional(self, step: int, num_inference_steps: int) -> bool:
        """Whether step `step` of `num_inference_steps` takes an unconditional prediction."""
        assert self.scale is not None, "a request's own guidance has its scale settled"
        if step < self.zero_init_steps or not needs_unconditional(self.scale):
            return False
        n = num_inference_steps
        return int(self.start * n) <= step < int(self.stop * n)
