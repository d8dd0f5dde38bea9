"""How a long video's time is divided: in windows, or in one span of sparse attention."""

from __future__ import annotations

from dataclasses import dataclass

from sora_engine.errors import RequestError
from sora_engine.request.checks import flag, integer
from sora_engine.request.facts import GenerationDefaults

WEIGHTS = ("flat", "pyramid", "overlap")
SCHEDULES = ("static", "moving", "chained")


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a canvas's time is cut into windows.

    The first latent frame of a window that begins within the video (in a loop: of every window) is
    its *lead*: it is seen, and its prediction is left out. It counts as one frame of `overlap`.

    length: latent frames of a window, at least 1. A video that one window holds is not cut.
    overlap: latent frames that neighbours share, from 0 to `length - 1`: 0, no lead; 1, a lead
        alone, and nothing is blended; 2 and more, blended behind the lead. Where the video's length
        does not come out even, and at the ends of `moving` windows, some neighbours share more than
        that, and it is blended too.
    weights: how windows are blended: `flat`, `pyramid` (1, 2, .., 2, 1) or `overlap` (a ramp where
        neighbours overlap), over the frames behind a lead, whose own weight is 0.
    schedule: `static`; `moving`: the joints shift at every step; or `chained`: windows are denoised
        one after the other, each to its last step, and what it shares with those before is known to
        it. What the prompt leaves open is so handed on from window to window. For checkpoints that
        are told of known frames by their noise level; weights and free_noise have no part in it.
    free_noise: windows start from the same frames of noise, shuffled (FreeNoise, arXiv 2310.15169),
        so that what the prompt leaves open is drawn once for the whole video. It has no part where
        a request brings its own noise.
    anchors: with chained windows, how many latent frames of the first one every later one sees
        beside its own, known: its last ones; from 0 to `length - 1`. What a window goes on from has
        passed through all those before it, and what each loses is lost to the next; anchors are as
        they were at first (frame sinks: arXiv 2309.17453 for tokens, 2509.22622 for video). They
        cost each window their tokens.

    Raises RequestError, when it is made, for a length, an overlap or a number of anchors outside
    these, names of weights or a schedule that are not known, chained windows with an overlap under
    2, and anchors without chained windows.
    """

    length: int
    overlap: int
    weights: str = "pyramid"
    schedule: str = "static"
    free_noise: bool = True
    anchors: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "overlap", "anchors"):
            _set_integer(self, name, f"window {name}")
        object.__setattr__(self, "free_noise", flag("free_noise", self.free_noise))
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
    """A long video in one attention span, of which each frame sees a part.

    Long Video Sparse Attention (LVSA, arXiv 2605.31057): each latent frame attends to its
    neighbours, to the first frame, and to key frames at even distances, whose places move by one
    latent frame with each step. So after some steps every frame has seen every stretch. A step's
    cost grows linearly with the length.

    reach: how many latent frames to each side one attends to, at least 1; in a loop across the
        joint too. A video of at most `reach + 1` latent frames is attended to as a whole, as if
        there were no plan.
    num_keys: how many key frames, 0 or more.

    Raises RequestError, when it is made, for a value outside these.
    """

    reach: int
    num_keys: int = 4

    def __post_init__(self) -> None:
        for name in ("reach", "num_keys"):
            _set_integer(self, name, name)
        if self.reach < 1:
            raise RequestError(f"reach must be at least 1 latent frame, got {self.reach}")
        if self.num_keys < 0:
            raise RequestError(f"num_keys must be 0 or more, got {self.num_keys}")

    def holds(self, total: int) -> bool:
        """Whether every one of `total` latent frames sees all others."""
        return total <= self.reach + 1


def _set_integer(plan: WindowPlan | SparsePlan, name: str, called: str) -> None:
    """Make a number of a frozen plan a plain one; RequestError for what is no integer."""
    value = getattr(plan, name)
    if value is None:  # which stands for no default here
        raise RequestError(f"{called} must be an integer, got None")
    object.__setattr__(plan, name, integer(called, value, 0))


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
