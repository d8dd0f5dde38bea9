"""How a long video's time is divided: in windows, or in one span of sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from sora_engine.errors import RequestError
from sora_engine.request.facts import GenerationDefaults

WEIGHTS = ("flat", "pyramid", "overlap")
SCHEDULES = ("static", "moving", "chained")


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a canvas's time is cut into windows.

    length, overlap: in latent frames. A lead is a part of the overlap: from 2 on, neighbours are
        blended; at 1 each frame is made in one window; at 0 there is no lead.
    weights: `flat`, `pyramid` (1, 2, .., 2, 1) or `overlap` (a ramp where neighbours overlap), over
        the frames behind a lead, whose own weight is 0.
    schedule: `static`; `moving`: the joints shift at every step; or `chained`: windows are denoised
        one after the other, each to its last step, and what it shares with those before is known to
        it. What the prompt leaves open is so handed on from window to window. For checkpoints that
        are told of known frames by their noise level; weights and free_noise have no part in it.
    free_noise: windows start from the same frames of noise, shuffled (FreeNoise, arXiv 2310.15169),
        so that what the prompt leaves open is drawn once for the whole video. It has no part where
        a request brings its own noise.
    anchors: with chained windows, how many latent frames of the first one every later one sees
        beside its own, known: its last ones. What a window goes on from has passed through all
        those before it, and what each loses is lost to the next; anchors are as they were at
        first (frame sinks: arXiv 2309.17453 for tokens, 2509.22622 for video). They cost each
        window their tokens.
    """

    length: int
    overlap: int
    weights: str = "pyramid"
    schedule: str = "static"
    free_noise: bool = True
    anchors: int = 0

    def __post_init__(self) -> None:
        if self.length < 1:
            raise RequestError(f"window length must be at least 1 latent frame, got {self.length}")
        if not 0 <= self.overlap < self.length:
            raise RequestError(
                f"window overlap must be from 0 to {self.length - 1} latent frames "
                f"(the window has {self.length}), got {self.overlap}"
            )
        if self.schedule == "chained" and self.overlap < 2:
            raise RequestError(
                "chained windows share at least 2 latent frames, a lead and one that is handed on; "
                f"got overlap {self.overlap}"
            )
        if not 0 <= self.anchors < self.length:
            raise RequestError(
                f"window anchors must be from 0 to {self.length - 1} latent frames "
                f"(the window has {self.length}), got {self.anchors}"
            )
        if self.anchors and self.schedule != "chained":
            raise RequestError(
                f"window anchors are of chained windows, got {self.anchors} with schedule "
                f"{self.schedule!r}; 0 anchors or schedule 'chained' would work"
            )
        if self.weights not in WEIGHTS:
            raise RequestError(f"window weights must be one of {WEIGHTS}, got {self.weights!r}")
        if self.schedule not in SCHEDULES:
            raise RequestError(f"window schedule must be one of {SCHEDULES}, got {self.schedule!r}")

    @property
    def stride(self) -> int:
        """Latent frames from one window's start to the next one's, at most."""
        return self.length - self.overlap

    @property
    def span(self) -> int:
        """Latent frames that one window attends to at most: its own and the anchors."""
        return self.length + self.anchors

    def holds(self, total: int) -> bool:
        """Whether one window holds all of `total` latent frames."""
        return total <= self.length


@dataclass(frozen=True, slots=True)
class SparsePlan:
    """A long video in one attention span, of which each frame sees a part (LVSA).

    Each latent frame attends to those at most `reach` away, to the first frame, and to `num_keys`
    key frames at even distances, whose places move by one with each step: after some steps every
    frame has seen every stretch. A step's cost grows linearly with the length.
    Of no effect where `reach` covers the video.
    """

    reach: int
    num_keys: int = 4

    def __post_init__(self) -> None:
        if self.reach < 1:
            raise RequestError(f"reach must be at least 1 latent frame, got {self.reach}")
        if self.num_keys < 0:
            raise RequestError(f"num_keys must be 0 or more, got {self.num_keys}")

    def holds(self, total: int) -> bool:
        """Whether every one of `total` latent frames sees all others."""
        return total <= self.reach + 1


def default_overlap(length: int) -> int:
    """Latent frames that windows of this length share: a quarter, but a lead and one behind it."""
    return min(length - 1, max(2, length // 4))


def default_plan(defaults: GenerationDefaults, schedule: str) -> WindowPlan | None:
    """The windows of a checkpoint's long videos; None where it asks for none.

    Under another schedule than its own, what it asks for beside the length does not count.
    Raises RequestError for windows that cannot be.
    """
    length, overlap, anchors = defaults.max_window, None, 0
    if length is None:
        return None
    if schedule == defaults.window_schedule:
        overlap, anchors = defaults.window_overlap, defaults.window_anchors
    if overlap is None:
        overlap = default_overlap(length)
    return WindowPlan(length, overlap, schedule=schedule, anchors=anchors)
