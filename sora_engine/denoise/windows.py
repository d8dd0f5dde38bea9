"""Windows: stretches of a canvas's time that are denoised each in one attention span.

A video longer than the model was trained for is denoised in windows of latent frames, in one of two
ways. *Blended* windows overlap, all of them move at every step, and their predictions are averaged
by weight (MultiDiffusion, arXiv 2302.08113). *Chained* windows are denoised one after the other,
each to its last step; what a window shares with those before it is known to it. Nothing is cached
from one window to the next in either way: a window reads the canvas. A step's cost grows linearly
with the length, and memory only by the windows that are packed at a time.

A causal VAE's first latent frame holds one video frame and every other several, and models are
trained on videos that begin with such a frame: what they predict at a window's first place is right
only for a video's beginning. So a window that begins elsewhere has its first frame as a `lead`: it
is attended to, and its prediction is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sora_engine.request.windows import SparsePlan, WindowPlan
from sora_kernels.transfer import to_device


@dataclass(frozen=True, slots=True)
class Window:
    """Latent frames `start` to `start + length - 1` of a canvas, modulo `total` in a loop.

    lead: how many frames at its beginning are seen and not made: 0 or 1.
    """

    start: int
    length: int
    total: int
    lead: int = 0

    @property
    def covers_all(self) -> bool:
        return self.start == 0 and self.length == self.total

    def indices(self) -> Tensor:
        return torch.arange(self.start, self.start + self.length) % self.total

    def stretches(self) -> list[slice]:
        """Its frames as stretches of the canvas, in order: one, unless it passes the end.

        A stretch needs no indices on the device, which the host would have to bring there.
        """
        found, at, left = [], self.start % self.total, self.length
        while left:
            stop = min(self.total, at + left)
            found.append(slice(at, stop))
            left -= stop - at
            at = 0
        return found

    def of(self, canvas: Tensor, dim: int) -> Tensor:
        """The window's frames of a tensor with the canvas's time at `dim`, in memory of its own
        unless they are all frames."""
        if self.covers_all:
            return canvas
        stretches = self.stretches()
        return torch.cat([canvas.narrow(dim, s.start, s.stop - s.start) for s in stretches], dim)

    def places(self, canvas: Tensor, own: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of a canvas `[C, total, H, W]`, each beside what lies there of `own [C, length, H,
        W]`."""
        stretches = self.stretches()
        lengths = [s.stop - s.start for s in stretches]
        return [
            (canvas[:, s], part) for s, part in zip(stretches, own.split(lengths, 1), strict=True)
        ]


def plan_windows(
    plan: WindowPlan | SparsePlan | None, total: int, *, wraps: bool, step: int
) -> list[Window]:
    """The windows of one step over `total` latent frames, in order of time.

    Every frame is covered, neighbours overlap by `plan.overlap` frames or more, and all windows
    have the same length. With no plan, or where one window holds everything, there is one window.
    In a loop that one goes once round and one frame further, its lead being the frame that it ends
    in; and it starts elsewhere at every step, so that no frame is always at the seam.
    """
    if plan is None or isinstance(plan, SparsePlan) or plan.holds(total):
        if not wraps:
            return [Window(0, total, total)]
        return [Window(_golden_offset(step, total), total + 1, total, lead=1)]
    stride = plan.stride
    offset = _golden_offset(step, stride) if plan.schedule == "moving" else 0
    lead = min(1, plan.overlap)
    if wraps:
        starts = [(offset + at) % total for at in range(0, total, stride)]
        return [Window(start, plan.length, total, lead) for start in starts]
    last = total - plan.length
    starts = sorted({0, last, *range(offset, last, stride)})
    return [Window(start, plan.length, total, lead if start else 0) for start in starts]


def chain_of(
    plan: WindowPlan | SparsePlan | None, total: int, known: Tensor | None, *, wraps: bool
) -> tuple[Window, ...]:
    """Chained windows in the order in which they are denoised; empty where none are.

    known: bool `[total]` on the host, the latent frames of which anything is known. Windows that
    hold such frames come first, then their neighbours, and so on: a video is led out of what is
    known in both directions (in a loop forward), and is never made first and then to meet it. With
    nothing known, the first window comes first.
    """
    if not isinstance(plan, WindowPlan) or plan.schedule != "chained" or plan.holds(total):
        return ()
    windows = plan_windows(plan, total, wraps=wraps, step=0)
    n = len(windows)
    holding = [i for i, w in enumerate(windows) if known is not None and known[w.indices()].any()]

    def distance(i: int) -> int:
        return min((i - j) % n if wraps else abs(i - j) for j in holding or [0])

    return tuple(windows[i] for i in sorted(range(n), key=lambda i: (distance(i), i)))


def _golden_offset(step: int, stride: int) -> int:
    """An offset within a stride that spreads evenly over the steps (golden-ratio sequence)."""
    return int((step * 0.6180339887498949) % 1.0 * stride)


def window_weights(plan: WindowPlan | SparsePlan | None, window: Window, *, wraps: bool) -> Tensor:
    """Blend weights `[length]` (float32) of a window's frames: 0 for a lead, positive elsewhere.

    A chained window is alone, and nothing of it is blended: its weights are 1.
    """
    if isinstance(plan, WindowPlan) and plan.schedule == "chained":
        return torch.ones(window.length, dtype=torch.float32)
    n = window.length - window.lead
    weights = torch.ones(n, dtype=torch.float32)
    if isinstance(plan, WindowPlan) and n < window.total:
        position = torch.arange(n, dtype=torch.float32)
        if plan.weights == "pyramid":
            weights = torch.minimum(position, n - 1 - position) + 1
        elif plan.weights == "overlap":
            ramp = plan.overlap - window.lead + 1
            if wraps or window.start > 0:
                weights = torch.minimum(weights, (position + 1) / ramp)
            if wraps or window.start + window.length < window.total:
                weights = torch.minimum(weights, (n - position) / ramp)
    return torch.cat([torch.zeros(window.lead, dtype=torch.float32), weights])


def blend(
    predictions: Sequence[Tensor],
    windows: Sequence[Window],
    plan: WindowPlan | SparsePlan | None,
    *,
    wraps: bool,
) -> Tensor:
    """Average windows' predictions `[C, length, H, W]` by weight into one `[C, total, H, W]`.

    The sum runs in order of the windows' starts, so that it does not depend on the order given.
    """
    if len(windows) == 1 and windows[0].covers_all:
        return predictions[0]
    weights = to_device(weight_sum(windows, plan, wraps=wraps), predictions[0].device)
    return divided(weighted_sum(predictions, windows, plan, wraps=wraps), weights)


def divided(total: Tensor, weights: Tensor) -> Tensor:
    """A sum `[C, T, H, W]` over its weights `[T]`; 0 where no window is."""
    return total / torch.where(weights > 0, weights, 1)[:, None, None]


def weighted_sum(
    predictions: Sequence[Tensor],
    windows: Sequence[Window],
    plan: WindowPlan | SparsePlan | None,
    *,
    wraps: bool,
) -> Tensor:
    """The sum of windows' predictions, each times its weights: `[C, total, H, W]`."""
    C, _, H, W = predictions[0].shape
    total = predictions[0].new_zeros(C, windows[0].total, H, W)
    every = torch.cat([window_weights(plan, window, wraps=wraps) for window in windows])
    weights = to_device(every, total.device).split([window.length for window in windows])
    for i in sorted(range(len(windows)), key=lambda i: windows[i].start):
        weighted = predictions[i] * weights[i][:, None, None]
        for place, part in windows[i].places(total, weighted):
            place.add_(part)
    return total


def weight_sum(
    windows: Sequence[Window], plan: WindowPlan | SparsePlan | None, *, wraps: bool
) -> Tensor:
    """The weights of all windows, summed for each frame: float32 `[total]`."""
    total = torch.zeros(windows[0].total, dtype=torch.float32)
    for window in sorted(windows, key=lambda window: window.start):
        total.index_add_(0, window.indices(), window_weights(plan, window, wraps=wraps))
    return total


def frames_seen(plan: SparsePlan, total: int, *, wraps: bool, step: int) -> Tensor:
    """Which of `total` latent frames each one attends to: bool `[total, total]`, rows for queries.

    Key frames move by one with each step.
    """
    at = torch.arange(total)
    distance = (at[:, None] - at[None]).abs()
    if wraps:
        distance = torch.minimum(distance, total - distance)
    keys = [(i * total // plan.num_keys + step) % total for i in range(plan.num_keys)]
    seen = distance <= plan.reach
    seen[:, [0, *keys]] = True
    return seen


def token_sight(
    sight: Sequence[Tensor | None], grids: Sequence[tuple[int, int, int]], patch_frames: int
) -> tuple[Tensor, ...] | None:
    """Which frames of tokens see which, for every segment, where any segment says so.

    sight: of each segment bool `[T, T]`, of latent frames; None: all see all.
    """
    if all(sees is None for sees in sight):
        return None
    found = []
    for sees, (T, _, _) in zip(sight, grids, strict=True):
        if sees is None:
            found.append(torch.ones(T, T, dtype=torch.bool))
        else:  # a token sees what any of its latent frames does
            frames = sees.reshape(T, patch_frames, T, patch_frames)
            found.append(frames.any(dim=3).any(dim=1))
    return tuple(found)
