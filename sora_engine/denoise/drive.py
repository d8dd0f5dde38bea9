"""What drives a canvas that is made a latent frame at a time: actions, places, and what it recalls.

A world is told at each latent frame what was done, and where the camera is. The past is seen as
clean tokens: the frames just before as known content of the canvas, and before them some that are
recalled because they show what is to be seen again (WorldMem, arXiv 2504.12369). No keys or values
are kept from one latent frame to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Drive:
    """Of a canvas with T latent frames, m of the past recalled before them.

    recalled: `[C, m, H, W]`, clean, of the canvas's size; m may be 0.
    actions: float32 `[m + T, action_dim]`, what was done to make each latent frame.
    places: float32 `[m + T, 2]`, in latents: how far down and right of the newest frame's view each
        one's lies. None for a model that knows no places.
    sees: bool `[m + T, m + T]`, which latent frames each attends to.

    The last three lie on the host.
    """

    recalled: Tensor
    actions: Tensor | None
    places: Tensor | None
    sees: Tensor | None

    @property
    def num_recalled(self) -> int:
        return self.recalled.shape[1]


def sight(recalled: int, context: int, new: int = 1) -> Tensor:
    """Bool `[n, n]`, which of n latent frames each attends to: those that are recalled, those just
    before, and the new ones.

    A frame of the past sees itself alone, a new one everything. What the model makes of a past
    frame is then the same whatever is recalled beside it: clips to train on show it so too, many
    new frames at once.
    """
    known = recalled + context
    seen = torch.eye(known + new, dtype=torch.bool)
    seen[known:] = True
    return seen
