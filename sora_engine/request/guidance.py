"""How a request is guided: by which rule, how strongly, and over which steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sora_engine.errors import RequestError
from sora_engine.request.checks import finite, integer


def needs_unconditional(scale: float) -> bool:
    """Whether a guidance scale takes an unconditional prediction at all."""
    return scale > 1.0


_OF_ONE_KIND = {
    "zero_init_steps": "cfg_zero_star",
    "eta": "apg",
    "norm_threshold": "apg",
    "momentum": "apg",
}


@dataclass(frozen=True)
class Guidance:
    """How one request is guided.

    kind: "cfg" (classifier-free guidance, arXiv 2207.12598), "cfg_zero_star" (CFG-Zero*, arXiv
        2503.18886) or "apg" (adaptive projected guidance, arXiv 2410.02416).
    scale: the weight of the difference between the conditional and the unconditional prediction. 1
        or less is no guidance. A request's `guidance_scale` goes before it; where neither is given,
        the checkpoint's counts.
    rescale: from 0 (none) to 1: how far the guided prediction is moved towards the standard
        deviation of the conditional one (arXiv 2305.08891, section 3.4).
    start, stop: the part of the steps that is guided, as fractions that rise within 0 to 1
        (Kynkäänniemi et al., arXiv 2404.07724). Step i of n is guided if
        `int(start n) <= i < int(stop n)`; all others take the conditional prediction.
    zero_init_steps: with "cfg_zero_star", how many first steps have 0 for their prediction.

    The last three belong to "apg":

    eta: the share that stays of that part of the difference between the two predictions which lies
        along the conditional one: 1, all of it; 0, none. Any number.
    norm_threshold: the longest that the difference may be, as its Euclidean norm over a request's
        whole prediction; a longer one is scaled down to it. 0 or less: no limit.
    momentum: how much of the difference of the step before, with what it carried on itself, is
        added to this step's. 0: none; as a rule it is negative. Any number.

    Raises RequestError, when it is made, for a kind that is not known, a number that is none or is
    outside these, and a setting that is given to a kind that does not read it.
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
        for name in ("rescale", "start", "stop", "eta", "norm_threshold", "momentum"):
            self._set(name, finite(f"guidance {name}", getattr(self, name), None))
        if self.scale is not None:
            self._set("scale", finite("guidance scale", self.scale, None))
        self._set("zero_init_steps", integer("zero_init_steps", self.zero_init_steps, 0))
        if not 0.0 <= self.start <= self.stop <= 1.0:
            raise RequestError(
                f"guidance interval {self.start} to {self.stop} must rise and lie in 0 to 1"
            )
        if not 0.0 <= self.rescale <= 1.0:
            raise RequestError(f"guidance rescale = {self.rescale} must lie in 0 to 1")
        if self.zero_init_steps < 0:
            raise RequestError(f"zero_init_steps = {self.zero_init_steps} must be 0 or more")
        for name, kind in _OF_ONE_KIND.items():
            value, silent = getattr(self, name), getattr(type(self), name)
            if value != silent and self.kind != kind:
                raise RequestError(
                    f"guidance {name} = {value:g} belongs to {kind}, and {self.kind} does not read "
                    f"it; Guidance({kind!r}, {name}={value:g}) would"
                )

    def _set(self, name: str, value: float) -> None:
        object.__setattr__(self, name, value)  # it is frozen, and numbers of NumPy become plain

    def needs_unconditional(self, step: int, num_inference_steps: int) -> bool:
        """Whether step `step` of `num_inference_steps` takes an unconditional prediction."""
        assert self.scale is not None, "a request's own guidance has its scale settled"
        if step < self.zero_init_steps or not needs_unconditional(self.scale):
            return False
        n = num_inference_steps
        return int(self.start * n) <= step < int(self.stop * n)
