"""The camera of a request as a transformer reads it: a ray for each pixel of each frame.

A ray is six Plücker coordinates: its moment about the first frame's camera, and its direction
(CameraCtrl, arXiv 2404.02101). A latent frame has those of all its frames as channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sora_engine.request import LatentGrid, ResolvedRequest
from sora_engine.request.camera import CameraPath
from sora_kernels.transfer import to_device

POSED_SIZE = (720, 1280)
"""Height and width of the picture of which fx and fy are parts, whatever is made: another shape is
cut out of it. CameraCtrl's, and all that pose files for VideoX-Fun are read with."""

RAY = 6
"""Numbers of a ray."""


class EncodesCamera(Protocol):
    """A transformer, as far as it reads rays: `denoise.model.Transformer`."""

    def encode_camera(self, rays: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, eq=False)
class CameraRays:
    """The rays of a canvas, made a latent frame at a time: of all frames they would take more than
    the video.

    path: the poses of the result's frames; the canvas's last frames stand still where it has more.
    size, canvas: height and width of the result, and of the canvas whose middle it is.
    """

    path: CameraPath
    size: tuple[int, int]
    canvas: tuple[int, int]
    grid: LatentGrid
    num_latent_frames: int
    loop: bool = False

    @classmethod
    def of(cls, request: ResolvedRequest, grid: LatentGrid) -> CameraRays | None:
        """Those of a request; None where it has no camera."""
        if request.camera is None:
            return None
        size = request.height, request.width
        canvas = request.canvas_height, request.canvas_width
        frames = request.latent_shape(grid)[1]
        return cls(request.camera, size, canvas, grid, frames, request.loop)

    def of_frame(self, latent_frame: int, device: torch.device) -> Tensor:
        """float32 `[6 * time, height, width]`: of the frames of a latent frame, coordinate by
        coordinate. The one frame of a video's first latent stands for as many."""
        frames = list(self.grid.frames_of(latent_frame, loop=self.loop))
        frames = [min(i, len(self.path.poses) - 1) for i in frames]
        frames += frames[-1:] * (self.grid.time - len(frames))
        lenses, to_world = self._seen(frames)
        lens, pose = to_device(lenses, device), to_device(to_world, device)
        rows, columns = (
            torch.arange(0.5, whole, dtype=torch.float32, device=device) - (whole - own) // 2
            for whole, own in zip(self.canvas, self.size, strict=True)
        )
        fx, fy, cx, cy = (part[:, None, None] for part in lens.unbind(1))
        x = (columns[None, None] - cx) / fx
        y = (rows[None, :, None] - cy) / fy
        x, y = torch.broadcast_tensors(x, y)
        direction = torch.stack([x, y, torch.ones_like(x)], dim=-1)
        direction = direction / direction.norm(dim=-1, keepdim=True)
        direction = torch.einsum("nhwj,nij->nhwi", direction, pose[:, :3, :3])
        origin = pose[:, None, None, :3, 3].expand_as(direction)
        rays = torch.cat([torch.linalg.cross(origin, direction), direction], dim=-1)
        return rays.permute(3, 0, 1, 2).flatten(0, 1)

    def _seen(self, frames: list[int]) -> tuple[Tensor, Tensor]:
        """Lenses in pixels `[n, 4]`, and camera to the first one's world `[n, 4, 4]`, float32."""
        own = torch.tensor([self.path.poses[i] for i in frames], dtype=torch.float64)
        first = torch.tensor(self.path.poses[0], dtype=torch.float64)
        to_world = _square(first[None, 4:]) @ torch.linalg.inv(_square(own[:, 4:]))
        # The first one is where it is, and not where rounding puts it.
        at_first = torch.tensor([i == 0 for i in frames])[:, None, None]
        to_world = torch.where(at_first, torch.eye(4, dtype=torch.float64), to_world)
        height, width = self.size
        lens = own[:, :4].clone()
        posed = POSED_SIZE[1] / POSED_SIZE[0]
        if posed > width / height:
            lens[:, 0] *= height * posed / width
        else:
            lens[:, 1] *= width / posed / height
        lens *= torch.tensor([width, height, width, height])
        return lens.float(), to_world.float()


def _square(rows: Tensor) -> Tensor:
    """`[n, 12]` to `[n, 4, 4]`."""
    bottom = torch.tensor([0.0, 0.0, 0.0, 1.0], dtype=rows.dtype).expand(len(rows), 1, 4)
    return torch.cat([rows.view(-1, 3, 4), bottom], dim=1)


def token_control(
    controls: Sequence[Tensor | None],
    grids: Sequence[tuple[int, int, int]],
    device: torch.device,
) -> Tensor | None:
    """What is added to each token of a batch once it is embedded, `[N, dim]`; None where nothing
    is to any.

    controls: of each segment `[T, tokens of a frame, dim]`; None: nothing to its tokens. grids: of
        each segment, patches in frames, rows and columns.
    """
    given = next((control for control in controls if control is not None), None)
    if given is None:
        return None
    parts = [
        given.new_zeros(math.prod(grid), given.shape[-1]) if own is None else own.flatten(0, 1)
        for own, grid in zip(controls, grids, strict=True)
    ]
    return to_device(torch.cat(parts), device)


def camera_control(rays: CameraRays, transformer: EncodesCamera, device: torch.device) -> Tensor:
    """What a request's camera adds to the tokens of all its latent frames, `[T, tokens of a frame,
    dim]`."""
    frames = range(rays.num_latent_frames)
    return torch.stack([transformer.encode_camera(rays.of_frame(i, device)) for i in frames])
