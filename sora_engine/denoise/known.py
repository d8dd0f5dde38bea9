"""Known clips and start videos: frames onto the time line, and from there into latents."""

from __future__ import annotations

import itertools
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from sora_engine.denoise.canvas import Known
from sora_engine.denoise.model import DiffusionModel
from sora_engine.errors import RequestError
from sora_engine.request import Clip, KnownMode, ResolvedRequest
from sora_engine.request.frames import crop_middle, load_frames
from sora_kernels.transfer import to_device

if TYPE_CHECKING:
    from sora_engine.request.request import Frames


def to_unit_range(frames: np.ndarray) -> Tensor:
    """uint8 `[n, H, W, 3]` -> float32 `[1, 3, n, H, W]` in [-1, 1]."""
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
    return pixels.to(torch.float32) / 127.5 - 1


def on_canvas(array: np.ndarray, request: ResolvedRequest, end: int) -> np.ndarray:
    """Frames or masks `[n, height, width, ...]` of the result's size, in their place on the canvas.

    The margin continues what is at the edge, and so do frames beyond the result's last one, where
    these end there (`end` is the frame after their last): nothing new is made up that a model would
    have to agree with. Itself where the canvas is no larger.
    """
    tail = request.canvas_frames - request.num_frames if end == request.num_frames else 0
    top = (request.canvas_height - request.height) // 2
    left = (request.canvas_width - request.width) // 2
    margins = [
        (0, tail),
        (top, request.canvas_height - request.height - top),
        (left, request.canvas_width - request.width - left),
        *[(0, 0)] * (array.ndim - 3),
    ]
    if not any(map(any, margins)):
        return array
    return np.pad(array, margins, mode="edge")


class TimeLine:
    """The frames of a request's clips, each in its place on the canvas.

    frames: uint8 `[canvas_frames, H, W, 3]`; mask: bool `[canvas_frames, H, W]`, True where known.
    stretches: the frames of each clip.
    """

    def __init__(self, request: ResolvedRequest) -> None:
        shape = (request.canvas_frames, request.canvas_height, request.canvas_width)
        self.request = request
        self.loop = request.loop
        self.frames = np.zeros((*shape, 3), np.uint8)
        self.mask = np.zeros(shape, bool)
        self.stretches: list[range] = []
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
                free = int(self.known_frames[-1]) + 1
                raise RequestError(
                    f"two clips overlap at frame {first}; clips must not share frames, so the one "
                    f"at frame {clip.at} could begin at frame {free}"
                )
            mask = on_canvas(_clip_mask(clip, frames.shape[:3]), request, end)
            self.frames[clip.at : clip.at + len(mask)] = on_canvas(frames, request, end)
            self.mask[clip.at : clip.at + len(mask)] = mask
            self.stretches.append(range(clip.at, clip.at + len(mask)))

    @property
    def known_frames(self) -> np.ndarray:
        """Indices of frames of which anything is known."""
        return np.flatnonzero(self.mask.any(axis=(1, 2)))

    def picture(self, frame: int) -> Image.Image:
        """A frame of the result's size, without the canvas's margin."""
        request = self.request
        return Image.fromarray(crop_middle(self.frames[frame], request.height, request.width))

    def hold(self, latents: list[range]) -> None:
        """Lets a clip that fills no latent frame, a picture above all, stand still in the one that
        has most of it: the model would be told nothing of one that is known in part.

        latents: the frames of each latent frame.
        """
        for clip in self.stretches:
            shared = [len(set(clip) & set(latent)) for latent in latents]
            if any(len(latent) == n for latent, n in zip(latents, shared, strict=True)):
                continue
            latent = np.array(latents[int(np.argmax(shared))])
            known = latent[self.mask[latent].any(axis=(1, 2))]
            if len(known):
                nearest = known[np.abs(latent[:, None] - known[None]).argmin(axis=1)]
                self.frames[latent], self.mask[latent] = self.frames[nearest], self.mask[nearest]

    def filled(self) -> np.ndarray:
        """The frames as they are encoded: nothing unknown is in them.

        Unknown frames stand still at the nearest known one, and unknown parts of a frame take their
        colours from what is known round about: an encoder sees far, and what lay there must not
        leak into the latents that count as known.
        """
        known = self.known_frames
        distance = np.abs(np.arange(len(self.frames))[:, None] - known[None])
        if self.loop:
            distance = np.minimum(distance, len(self.frames) - distance)
        nearest = known[distance.argmin(axis=1)]
        filled = self.frames[nearest]
        for i in np.flatnonzero(~self.mask[nearest].all(axis=(1, 2))):
            filled[i] = fill_holes(filled[i], self.mask[nearest[i]])
        return filled


def fill_holes(frame: np.ndarray, known: np.ndarray) -> np.ndarray:
    """A frame uint8 `[H, W, 3]` whose unknown pixels follow smoothly from the known ones.

    known: bool `[H, W]`, somewhere True. By a pyramid of means (push-pull, Gortler et al. 1996).
    """
    weight = torch.from_numpy(known).float()[None, None]
    colour = torch.from_numpy(frame).permute(2, 0, 1)[None].float() * weight
    levels = [(colour, weight)]
    while not bool((levels[-1][1] > 0).all()):
        colour, weight = (F.avg_pool2d(x, 2, ceil_mode=True) for x in levels[-1])
        levels.append((colour, weight))
    whole = levels[-1][0] / levels[-1][1]
    for colour, weight in reversed(levels[:-1]):
        coarse = F.interpolate(whole, size=colour.shape[2:], mode="bilinear")
        whole = torch.where(weight > 0, colour / weight.clamp(min=1e-6), coarse)
    filled = whole[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8).numpy()
    return np.where(known[..., None], frame, filled)


def encode_known(
    request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, tuple[Known | None, Tensor | None]]:
    """The request's known content as its model takes it, and the CLIP tokens of its image.

    Yields after each latent frame: there the engine may turn to other jobs, or stop.
    """
    if model.known_mode is KnownMode.VACE:
        return (yield from _encode_control(TimeLine(request), request, model)), None
    if not request.clips:
        return None, None
    line = TimeLine(request)
    if model.known_mode.animates:
        encode = {
            KnownMode.CHANNELS: _encode_channels,
            KnownMode.FIRST_FRAME: _encode_first_frame,
            KnownMode.CHANNELS_AND_LEVEL: _encode_channels_and_level,
        }[model.known_mode]
        return (yield from encode(line, request, model)), _image_tokens(line, model)
    return (yield from _encode_latents(line, request, model)), None


def encode_video(
    frames: Frames, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Tensor]:
    """A start video of `num_frames` frames as latents `[C, T, H, W]`. Yields as `encode_known`."""
    loaded = load_frames(frames, request.height, request.width, request.fps, "start video")
    if len(loaded) != request.num_frames:
        raise RequestError(
            f"the start video has {len(loaded)} frames; the request makes {request.num_frames}"
        )
    placed = on_canvas(loaded, request, len(loaded))
    return (yield from _encode(placed, model, before=placed[-1:] if request.loop else None))


def _encode(
    frames: np.ndarray,
    model: DiffusionModel,
    *,
    before: np.ndarray | None,
    mask: np.ndarray | None = None,
) -> Generator[None, None, Tensor]:
    """Frames from the start of the time line (uint8) as latents `[C, T, H, W]`.

    before: in a loop, the frame before the first. A loop has no first latent of one frame: that
    frame takes it, and it is left out.
    mask: bool `[n, H, W]`; what is not True becomes grey. In a loop its last frame is `before`'s.
    """
    first = 1 if before is None else 0
    cuts = range(first, len(frames) + 1, model.grid.time)
    latents: list[Tensor] = []
    state: Any = None
    for span in (slice(0, 1), *(slice(a, b) for a, b in itertools.pairwise(cuts))):
        here, known = frames[span], None if mask is None else mask[span]
        if before is not None and not latents:
            here, known = before, None if mask is None else mask[-1:]
        pixels = to_unit_range(here)
        if known is not None:
            pixels = pixels * torch.from_numpy(known)
        placed = to_device(pixels.to(model.vae_dtype), model.device)
        encoded, state = model.vae.encode_chunk(placed, state, consume=True)
        latents.append(encoded[0].float())
        yield
    return torch.cat(latents if before is None else latents[1:], dim=1)


def _encode_latents(
    line: TimeLine, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Known]:
    """Known latents in their places; only what no unknown frame can touch counts as known."""
    grid = model.grid
    shape = request.latent_shape(grid)
    spans = [grid.frames_of(i, loop=request.loop) for i in range(shape[1])]
    line.hold(spans)
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
    latents = torch.zeros(shape, dtype=torch.float32, device=model.device)
    filled = line.filled()
    before = filled[-1:] if request.loop else None
    encoded = yield from _encode(filled[: spans[last].stop], model, before=before)
    latents[:, : last + 1] = encoded
    return Known(model.known_mode, latents=latents, mask=to_device(mask, model.device))


def _encode_channels(
    line: TimeLine, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Known]:
    """Wan I2V's further channels: a mask for each frame of a latent, and the latents of a video
    that is grey where unknown."""
    grid = model.grid
    latents = yield from _encode(line.frames, model, before=None, mask=line.mask)
    unit = (1, grid.vae_spatial, grid.vae_spatial)
    mask = -F.max_pool3d(-torch.from_numpy(line.mask)[None].float(), unit)[0]
    # The first latent holds one frame: its mask stands for all of a latent's frames.
    mask = torch.cat([mask[:1].expand(grid.time, -1, -1), mask[1:]])
    channels = mask.unflatten(0, (-1, grid.time)).transpose(0, 1).to(latents)
    return Known(KnownMode.CHANNELS, channels=torch.cat([channels, latents]))


def _encode_first_frame(
    line: TimeLine, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Known]:
    """The first frame's latents as further channels, and zeros behind them.

    Written after VideoX-Fun's `WanFunControlPipeline`. Raises RequestError where another frame is
    known, or not all of this one.
    """
    known = line.known_frames
    if known.tolist() != [0] or not line.mask[0].all():
        raise RequestError(
            f"this checkpoint is told its first frame, whole, and no other; the clips give "
            f"{len(known)} frames, the first of them frame {known[0]}: Clip(image, at=0) would work"
        )
    latents = yield from _encode(line.frames[:1], model, before=None)
    channels = latents.new_zeros(request.latent_shape(model.grid))
    channels[:, :1] = latents
    return Known(KnownMode.FIRST_FRAME, channels=channels)


def _encode_channels_and_level(
    line: TimeLine, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Known]:
    """As `_encode_channels`, and the first latent frame stands in the sample, too.

    Written after VideoX-Fun's `Wan2_2FunControlPipeline`, which holds that frame for autoencoders
    of 16 pixels to a latent. Raises RequestError where it is not known whole.
    """
    if not line.mask[0].all():
        raise RequestError(
            "this checkpoint begins with a frame that is known whole: Clip(image, at=0) would work"
        )
    known = yield from _encode_channels(line, request, model)
    assert known.channels is not None
    latents = known.channels[model.grid.time :]
    mask = torch.zeros(latents.shape[1:], dtype=torch.bool)
    mask[0] = True
    return replace(
        known,
        mode=KnownMode.CHANNELS_AND_LEVEL,
        latents=latents,
        mask=to_device(mask, model.device),
    )


def _encode_control(
    line: TimeLine, request: ResolvedRequest, model: DiffusionModel
) -> Generator[None, None, Known]:
    """VACE's control latents: those of the video where it is known and grey elsewhere, those of
    what is unknown (grey: nothing is given of it), and the mask's pixels as channels.

    Written after diffusers' `WanVACEPipeline.prepare_video_latents` and `prepare_masks`.
    """
    unit = model.grid.vae_spatial
    before = line.frames[-1:] if request.loop else None
    known = yield from _encode(line.frames, model, before=before, mask=line.mask)
    nothing = np.zeros_like(line.mask)
    unknown = yield from _encode(line.frames, model, before=before, mask=nothing)
    mask = 1 - torch.from_numpy(line.mask).float()
    n, height, width = mask.shape
    blocks = mask.view(n, height // unit, unit, width // unit, unit).permute(2, 4, 0, 1, 3)
    channels = F.interpolate(
        blocks.flatten(0, 1)[None], size=known.shape[1:], mode="nearest-exact"
    )[0]
    return Known(KnownMode.VACE, channels=torch.cat([known, unknown, channels.to(known)]))


def _image_tokens(line: TimeLine, model: DiffusionModel) -> Tensor | None:
    if model.image_encoder is None:
        return None
    known = line.known_frames
    images = [line.picture(known[0])]
    if model.takes_last_image:
        if known[-1] != len(line.frames) - 1:
            raise RequestError(
                "this checkpoint takes a first and a last frame: give a clip that ends at frame "
                f"{line.request.num_frames - 1} too"
            )
        images.append(line.picture(known[-1]))
    return model.image_encoder.encode(images).flatten(0, 1)


def _clip_mask(clip: Clip, shape: tuple[int, ...]) -> np.ndarray:
    if clip.mask is None:
        return np.ones(shape, bool)
    mask = np.asarray(clip.mask)
    if mask.dtype != bool or mask.shape not in (shape, shape[1:], shape[:1]):
        raise RequestError(
            f"a clip's mask is bool {list(shape)}, {list(shape[1:])} or {list(shape[:1])} here, "
            f"got {mask.dtype} {list(mask.shape)}"
        )
    return np.broadcast_to(mask[:, None, None] if mask.ndim == 1 else mask, shape)


def _describe(spans: list[range]) -> str:
    shown = [f"{s.start}" if len(s) == 1 else f"{s.start}-{s.stop - 1}" for s in spans[:4]]
    return ", ".join(shown) + (", ..." if len(spans) > 4 else "")
