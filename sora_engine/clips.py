"""Known clips and start videos: frames onto the time line, and from there into latents."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sora_engine.canvas import Known, KnownMode
from sora_engine.errors import RequestError
from sora_engine.io.images import fit
from sora_engine.io.video import read_video
from sora_engine.request import Clip, ResolvedRequest
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.state import VAEState
from sora_engine.vae.wan import WanVAE

if TYPE_CHECKING:
    from sora_engine.models.video_model import VideoModel
    from sora_engine.request import Frames

MAX_REACH = 96
"""Latent frames after which a causal decoder that still remembers is taken to be at fault: Wan's
reaches back 38."""


def load_frames(
    frames: Frames, height: int, width: int, fps: float | None = None, what: str = "clip"
) -> np.ndarray:
    """Frames in any form that a request takes, as uint8 `[n, height, width, 3]`.

    A file is resampled to `fps`. Frames of another size are scaled until they cover the size asked
    for, and their middle is kept. Raises RequestError or MediaError.
    """
    if isinstance(frames, (str, PathLike)):
        return read_video(Path(frames), fps=fps, height=height, width=width)[0]
    if isinstance(frames, Image.Image):
        frames = np.asarray(frames.convert("RGB"))[None]
    if isinstance(frames, Tensor):
        frames = frames.cpu().numpy()
    if not isinstance(frames, np.ndarray):
        raise RequestError(
            f"a {what}'s frames are a uint8 array [n, height, width, 3], a PIL image or a path, "
            f"got {type(frames).__name__}"
        )
    if frames.ndim == 3:
        frames = frames[None]
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise RequestError(
            f"a {what}'s frames are uint8 [n, height, width, 3], "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack(
        [np.asarray(fit(Image.fromarray(f), height=height, width=width)) for f in frames]
    )


def to_unit_range(frames: np.ndarray) -> Tensor:
    """uint8 `[n, H, W, 3]` -> float32 `[1, 3, n, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None] / 127.5 - 1


class TimeLine:
    """The frames of a request's clips, each in its place.

    frames: uint8 `[num_frames, H, W, 3]`; mask: bool `[num_frames, H, W]`, True where known.
    """

    def __init__(self, request: ResolvedRequest) -> None:
        shape = (request.num_frames, request.height, request.width)
        self.frames = np.zeros((*shape, 3), np.uint8)
        self.mask = np.zeros(shape, bool)
        for clip in request.clips:
            frames = load_frames(clip.frames, request.height, request.width, request.fps)
            end = clip.at + len(frames)
            if end > request.num_frames:
                raise RequestError(
                    f"a clip of {len(frames)} frames at frame {clip.at} ends at frame {end}; the "
                    f"video has {request.num_frames}: at most {request.num_frames - clip.at} fit"
                )
            if self.mask[clip.at : end].any():
                first = clip.at + int(self.mask[clip.at : end].any(axis=(1, 2)).argmax())
                raise RequestError(
                    f"two clips overlap at frame {first}; clips must not share frames"
                )
            self.frames[clip.at : end] = frames
            self.mask[clip.at : end] = _clip_mask(clip, frames.shape[:3])

    @property
    def known_frames(self) -> np.ndarray:
        """Indices of frames of which anything is known."""
        return np.flatnonzero(self.mask.any(axis=(1, 2)))

    def filled(self) -> np.ndarray:
        """The frames, with unknown ones standing still at the nearest known one."""
        known = self.known_frames
        positions = np.arange(len(self.frames))
        nearest = known[np.abs(positions[:, None] - known[None]).argmin(axis=1)]
        return self.frames[nearest]


def encode_known(request: ResolvedRequest, model: VideoModel) -> tuple[Known | None, Tensor | None]:
    """The request's known content as its model takes it, and the CLIP tokens of its image."""
    if not request.clips:
        if model.known_mode is KnownMode.CHANNELS:
            raise RequestError(
                "this checkpoint animates an image: give one, as Clip(image, at=0) in `clips`"
            )
        return None, None
    line = TimeLine(request)
    if model.known_mode is KnownMode.CHANNELS:
        return _encode_channels(line, request, model), _image_tokens(line, model)
    return _encode_latents(line, request, model), None


def encode_video(frames: Frames, request: ResolvedRequest, model: VideoModel) -> Tensor:
    """A start video of `num_frames` frames as latents `[C, T, H, W]`."""
    loaded = load_frames(frames, request.height, request.width, request.fps, "start video")
    if len(loaded) != request.num_frames:
        raise RequestError(
            f"the start video has {len(loaded)} frames; the request makes {request.num_frames}"
        )
    return _encode(loaded, request, model)


def last_lap_state(latents: Tensor, vae: ChunkCoder[VAEState] | WanVAE) -> VAEState:
    """The decoder's state from which a lap over a loop's latents ends where it began.

    latents: `[C, T, H, W]`. A causal decoder forgets: after enough laps its caches repeat bit for
    bit, and the frames of the next lap join at the seam like any others.
    """
    before: VAEState | None = None
    for _ in range(MAX_REACH // latents.shape[1] + 2):
        state = before
        for latent_frame in latents.split(1, dim=1):
            _, state = vae.decode_chunk(latent_frame[None], state)
        assert state is not None
        if before is not None and _same(before, state):
            return state
        before = state
    raise RuntimeError(f"the decoder does not repeat within {MAX_REACH} latent frames of a loop")


def _same(a: VAEState, b: VAEState) -> bool:
    pairs = zip(a.caches, b.caches, strict=True)
    return all(x is not None and y is not None and torch.equal(x, y) for x, y in pairs)


def _encode(frames: np.ndarray, request: ResolvedRequest, model: VideoModel) -> Tensor:
    """Frames from the start of the time line (uint8) as latents `[C, T, H, W]`.

    A loop has no first latent of one frame: a frame is put before it, and its latent left out.
    """
    if request.loop:
        frames = np.concatenate([frames[-1:], frames])
    video = to_unit_range(frames).to(model.device, model.vae_dtype)
    latents = model.vae.encode(video)[0].float()
    return latents[:, 1:] if request.loop else latents


def _encode_latents(line: TimeLine, request: ResolvedRequest, model: VideoModel) -> Known:
    """Known latents in their places; only what no unknown frame can touch counts as known."""
    grid = model.grid
    shape = grid.shape(request.height, request.width, request.num_frames, loop=request.loop)
    spans = [grid.frames_of(i, loop=request.loop) for i in range(shape[1])]
    unit = grid.vae_spatial
    by_latent = torch.from_numpy(np.stack([line.mask[list(span)].all(axis=0) for span in spans]))
    # A token is known where all of its pixels are, in all of its frames.
    pool = (1, unit * grid.patch[1], unit * grid.patch[2])
    tokens = -F.max_pool3d(-by_latent[None].float(), pool)[0]
    mask = tokens.repeat_interleave(grid.patch[1], 1).repeat_interleave(grid.patch[2], 2) > 0.5
    if not mask.any():
        raise RequestError(
            f"the clips cover no whole latent frame, so nothing would be known; latent frames of "
            f"this model hold the frames {_describe(spans)}"
        )
    last = int(mask.any(dim=2).any(dim=1).nonzero().max())
    latents = torch.zeros(shape)
    encoded = _encode(line.filled()[: spans[last].stop], request, model)
    latents[:, : last + 1] = encoded.cpu()
    return Known(model.known_mode, latents=latents.to(model.device), mask=mask.to(model.device))


def _encode_channels(line: TimeLine, request: ResolvedRequest, model: VideoModel) -> Known:
    """Wan I2V's further channels: a mask for each frame of a latent, and the latents of a video
    that is grey where unknown."""
    grid = model.grid
    video = np.where(line.mask[..., None], line.frames, 0)
    pixels = to_unit_range(video) * torch.from_numpy(line.mask)
    latents = model.vae.encode(pixels.to(model.device, model.vae_dtype))[0].float()
    unit = (1, grid.vae_spatial, grid.vae_spatial)
    mask = -F.max_pool3d(-torch.from_numpy(line.mask)[None].float(), unit)[0]
    # The first latent holds one frame: its mask stands for all of a latent's frames.
    mask = torch.cat([mask[:1].expand(grid.time, -1, -1), mask[1:]])
    channels = mask.unflatten(0, (-1, grid.time)).transpose(0, 1).to(latents)
    return Known(KnownMode.CHANNELS, channels=torch.cat([channels, latents]))


def _image_tokens(line: TimeLine, model: VideoModel) -> Tensor | None:
    if model.image_encoder is None:
        return None
    known = line.known_frames
    images = [Image.fromarray(line.frames[known[0]])]
    if model.takes_last_image:
        if known[-1] != len(line.frames) - 1:
            raise RequestError(
                "this checkpoint takes a first and a last frame: give a clip that ends at frame "
                f"{len(line.frames) - 1} too"
            )
        images.append(Image.fromarray(line.frames[known[-1]]))
    return model.image_encoder.encode(images).flatten(0, 1)


def _clip_mask(clip: Clip, shape: tuple[int, ...]) -> np.ndarray:
    if clip.mask is None:
        return np.ones(shape, bool)
    mask = np.asarray(clip.mask)
    if mask.dtype != bool or mask.shape not in (shape, shape[1:]):
        raise RequestError(
            f"a clip's mask is bool {list(shape)} or {list(shape[1:])} here, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return np.broadcast_to(mask, shape)


def _describe(spans: list[range]) -> str:
    shown = [f"{s.start}" if len(s) == 1 else f"{s.start}-{s.stop - 1}" for s in spans[:4]]
    return ", ".join(shown) + (", ..." if len(spans) > 4 else "")
