"""What a caller asks for: one video, with the clips and the words that it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, TypeAlias

from sora_engine.request.guidance import Guidance
from sora_engine.request.lora import Lora
from sora_engine.request.windows import SparsePlan, WindowPlan

if TYPE_CHECKING:
    import numpy as np
    import PIL.Image
    import torch

    from sora_engine.video import Video

    Camera: TypeAlias = str | PathLike[str] | Sequence[str] | Sequence[Sequence[float]] | np.ndarray
    WholeFrames: TypeAlias = np.ndarray | PIL.Image.Image | str | PathLike[str] | Video
    Frames: TypeAlias = "WholeFrames | Footage"


@dataclass(frozen=True, slots=True, eq=False)
class Footage:
    """A part of a clip: its frames `start` to `stop - 1`.

    A file's frames are counted at the request's frame rate, those in memory as they are.

    frames: as `Clip.frames`. stop: the frame after the last one; None stands for the end.

    An empty part, or one outside the clip, raises RequestError: from a task that is given it, or
    else from `Job.result`, as the frames are read when the job runs.
    """

    frames: WholeFrames
    start: int = 0
    stop: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Clip:
    """Known frames on the time line of a request.

    frames: uint8 `[n, height, width, 3]` or `[height, width, 3]` (a NumPy array or a torch tensor),
        a PIL image, the path of an image or a video, a `Video` that an engine has made, or
        `Footage`, a part of any of these. Of another size than the request's they are scaled until
        they cover it, and their middle is kept.
    at: the frame of the time line at which they begin. Where they fill no latent frame, as a
        picture behind the first one, they stand still in the one that has most of them.
    mask: bool `[n, height, width]`, `[height, width]` or `[n]`, in the request's size and at its
        frame rate: True where known (the opposite of the mask of `tasks.inpaint`, which is True
        where the picture is made anew). None: everywhere.

    An `at` outside the video raises RequestError on submission. Frames are read when the job runs:
    those that overlap another clip's or pass the video's end, and a mask of another shape, raise
    RequestError from `Job.result`, and a file that cannot be read raises MediaError there.
    """

    frames: Frames
    at: int = 0
    mask: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Shot:
    """A stretch of the video that reads a text of its own."""

    prompt: str
    num_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class VideoRequest:
    """One video (or, with one frame, one image) to be made.

    None stands for the checkpoint's own default everywhere. Making a request checks nothing:
    `Engine.submit` raises RequestError for a bad value. What only the frames of clips or the
    checkpoint's schedule can tell is found when the job runs, and raised by `Job.result`.

    Args:
        prompt: what the video shows; of a checkpoint of classes, one of them (or `label`).
        negative_prompt: what guidance steers away from; "" for nothing, whatever the checkpoint's
            own is.
        height, width: pixels, of any size. The model makes the next larger size on its grid
            (multiples of the VAE's factor times the patch, 16 for Wan); its middle is kept.
        num_frames: of any length; what the model makes beyond it (it takes one more than a multiple
            of the VAE's time factor) is left out at the end. In a loop, which a cut would open, it
            is a multiple of that factor.
        fps: frames a second of the result; clips and start videos from files are read at it too.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance (arXiv 2207.12598); 1 and less means none.
        guidance_scale_2: the same for the low-noise expert of a two-expert checkpoint.
        shift: shift of the flow schedule, `s' = k s / (1 + (k - 1) s)`.
        sigmas: explicit noise levels for a flow checkpoint, decreasing within (0, 1], in place of
            the schedule's; they pass through `shift`, and 1 takes them as they are. One step each:
            `num_inference_steps` is left out, or says their number.
        ladder: the levels, the solver and the want of guidance that a few-step checkpoint was
            distilled for, by name (`sora ladders` lists them); by default the checkpoint's own. ""
            switches that off. It goes with no other `num_inference_steps`, `sigmas` or `shift`.
        solver: `"euler"`, `"unipc"`, ...; by default the checkpoint's own.
        seed: of the initial noise; drawn at random where it is None, and told with the result.
        clips: known frames.
        init: a start video of `num_frames` frames (SDEdit, arXiv 2108.01073), as `Clip.frames`.
        strength: in (0, 1], how far back towards noise `init` is taken; 0.6 by default. Of n steps
            only the last `int(n * strength)` are taken. It needs `init`.
        loop: the video's end joins its beginning.
        shots: stretches with prompts of their own, which fill `num_frames`; the model does not read
            `prompt` then. A latent frame takes the text of its middle frame.
        window: `WindowPlan` for videos longer than the model's trained length, or `SparsePlan`,
            which agrees better over time and costs more, if the model can take the whole length.
        latents: the initial noise, float32, in the shape of the canvas, which is of the next larger
            size and length on the model's grid (`LatentGrid.shape`):
            `[channels, latent_frames, latent_height, latent_width]`.
        round_to_grid: take the nearest size and length on the model's grid, in place of the exact
            ones.
        strict_grid: refuse a size or a length off the model's grid.
        guidance: the kind of guidance and the part of the steps that it covers; its own scale
            counts where `guidance_scale` is None.
        resample: how often each step is taken where known frames are put into the sample (RePaint,
            arXiv 2201.09865), so that the rest agrees with them better: for checkpoints of
            `KnownMode.REPLACEMENT`, 1 to 50; others take 1. n costs n times as much.
        loras: adapters, by the names under which `Engine.load_lora` loaded them, or by their files,
            which are loaded as long as jobs have them. Requests in one batch may have different
            ones. Files that change more than linear layers by LoRA are merged on loading:
            `Engine.from_pretrained(loras=...)`.
        label: the class that a checkpoint of classes makes a picture of, by its number, or by its
            name where the checkpoint tells names.
        camera: how the camera moves, for checkpoints that take one: the path of a pose file (a row
            of 19 numbers a frame: see `request.camera`), such rows, or moves such as `"pan left,
            zoom in x0.5"`, in one text or a list. Moves that follow each other share the time out,
            and `+` makes several at once. None: nothing is said of it. A pose file is read when the
            request is submitted, and needs a pose for each frame.
        original_prompt: what the prompt was before a prompt upsampler rewrote it; kept with the
            result, and nothing else.
    """

    prompt: str = ""
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    shift: float | None = None
    sigmas: Sequence[float] | None = None
    ladder: str | None = None
    solver: str | None = None
    seed: int | None = None
    clips: Sequence[Clip] = ()
    init: Frames | None = None
    strength: float | None = None
    loop: bool = False
    shots: Sequence[Shot] = ()
    window: WindowPlan | SparsePlan | None = None
    latents: torch.Tensor | None = None
    round_to_grid: bool = False
    strict_grid: bool = False
    guidance: Guidance | None = None
    resample: int = 1
    loras: Sequence[Lora] = ()
    original_prompt: str | None = None
    label: int | str | None = None
    camera: Camera | None = None
