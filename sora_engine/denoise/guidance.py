"""Guidance: how the conditional and the unconditional prediction become one.

Every function takes the predictions of one request, in one shape and any layout; norms and
standard deviations run over all of it, as diffusers' guiders run over all but the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sora_engine.errors import RequestError

if TYPE_CHECKING:  # requests hold a Guidance, and are checked before torch is loaded
    import torch


def needs_unconditional(scale: float) -> bool:
    """Whether a guidance scale takes an unconditional prediction at all."""
    return scale > 1.0


def cfg(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """Classifier-free guidance, `uncond + scale (cond - uncond)` (arXiv 2207.12598).

    cond, uncond: one shape, any layout. Written in diffusers' order of operations.
    """
    return uncond + scale * (cond - uncond)


def rescaled(guided: torch.Tensor, cond: torch.Tensor, rescale: float) -> torch.Tensor:
    """`guided` moved by `rescale` (0 to 1) towards the standard deviation of `cond`.

    Keeps high scales from burning the video (Lin et al., arXiv 2305.08891, section 3.4).
    """
    matched = guided * (cond.std() / guided.std())
    return rescale * matched + (1 - rescale) * guided


def cfg_zero_star(cond: torch.Tensor, uncond: torch.Tensor, scale: float) -> torch.Tensor:
    """CFG whose unconditional prediction is first scaled to lie nearest to `cond`
    (CFG-Zero*, Fan et al., arXiv 2503.18886, eq. 7)."""
    c, u = cond.float(), uncond.float()
    nearest = ((c * u).sum() / ((u * u).sum() + 1e-8)).to(uncond.dtype)
    return cfg(cond, uncond * nearest, scale)


def apg(
    cond: torch.Tensor,
    uncond: torch.Tensor,
    scale: float,
    *,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    running: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416): (prediction, running).

    eta: how much of the difference along `cond` stays (it is what saturates). norm_threshold: the
    longest the difference may be, 0 for no limit. momentum: how much of `running`, which an earlier
    step returned, is added to the difference; negative as a rule. With eta 1, no threshold and no
    momentum it is CFG.
    """
    difference = cond - uncond
    if running is not None:
        difference = difference + momentum * running
    running = difference
    if norm_threshold > 0.0:
        length = difference.double().norm().clamp(min=1e-300)
        difference = difference * (norm_threshold / length).clamp(max=1.0).to(difference.dtype)
    # In float64: along a long `cond` the two parts are a small difference of large numbers.
    wide, direction = difference.double(), cond.double()
    direction = direction / direction.norm().clamp(min=1e-12)
    along = (wide * direction).sum() * direction
    kept = (wide - along).to(difference.dtype) + eta * along.to(difference.dtype)
    return uncond + scale * kept, running


@dataclass(frozen=True)
class Guidance:
    """How one request is guided.

    kind: "cfg", "cfg_zero_star" or "apg". scale: 1 or less is no guidance. rescale: see `rescaled`.
    start, stop: the part of the steps that is guided, as fractions (Kynkäänniemi et al.,
    arXiv 2404.07724); step i of n is guided if `int(start n) <= i < int(stop n)`.
    zero_init_steps: CFG-Zero*'s first steps, whose prediction is 0. eta, norm_threshold, momentum:
    see `apg`.
    """

    kind: Literal["cfg", "cfg_zero_star", "apg"] = "cfg"
    scale: float = 1.0
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
        if step < self.zero_init_steps or not needs_unconditional(self.scale):
            return False
        n = num_inference_steps
        return int(self.start * n) <= step < int(self.stop * n)

    def __call__(
        self,
        cond: torch.Tensor,
        uncond: torch.Tensor | None,
        step: int,
        num_inference_steps: int,
        running: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The guided prediction of a step, and APG's running difference for the next one.

        uncond: needed where `needs_unconditional` says so, else ignored.
        """
        if step < self.zero_init_steps:
            return cond.new_zeros(cond.shape), running
        if not self.needs_unconditional(step, num_inference_steps):
            return cond, running
        if uncond is None:
            raise ValueError(f"step {step} of {num_inference_steps} is guided and has no uncond")
        if self.kind == "apg":
            guided, running = apg(
                cond,
                uncond,
                self.scale,
                eta=self.eta,
                norm_threshold=self.norm_threshold,
                momentum=self.momentum,
                running=running,
            )
        elif self.kind == "cfg_zero_star":
            guided = cfg_zero_star(cond, uncond, self.scale)
        else:
            guided = cfg(cond, uncond, self.scale)
        if self.rescale > 0.0:
            guided = rescaled(guided, cond, self.rescale)
        return guided, running
