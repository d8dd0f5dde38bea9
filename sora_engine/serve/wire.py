"""The bodies of requests, field by field. What a body has beyond these is a 400."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, field_validator, model_validator

from sora_engine.io.formats import LEAST_FPS, MAX_FPS

Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha = Annotated[str, Field(pattern=r"^upload_[0-9a-f]{64}$")]


Pose = Annotated[list[float], Field(min_length=19, max_length=19)]
Moves = (
    Annotated[str, Field(max_length=1000)]
    | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(max_length=100)]
    | Annotated[list[Pose], Field(max_length=100_000)]
)


class Body(BaseModel):
    """What all bodies have in common: nothing unknown, no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Media(Body):
    """A picture or a clip: an upload, one of the caller's videos, or a data URL (where the operator
    allows it, another URL).

    start, stop: the frames of it that count, at the request's frame rate.
    """

    upload: Annotated[Sha | None, Field(validation_alias=AliasChoices("upload", "file_id"))] = None
    video_id: Annotated[
        str | None, Field(max_length=64, validation_alias=AliasChoices("video_id", "id"))
    ] = None
    image_url: Annotated[
        str | None, Field(description="A data URL, or what --allow-urls allows.")
    ] = None
    start: Annotated[int, Field(ge=0)] = 0
    stop: Annotated[int | None, Field(ge=1)] = None

    @model_validator(mode="after")
    def _one(self) -> Media:
        given = [x for x in (self.upload, self.video_id, self.image_url) if x is not None]
        if len(given) != 1:
            raise ValueError("give one of upload, video_id and image_url")
        return self


class ClipBody(Media):
    """Known frames on the time line. at: the frame at which they begin. mask: an upload that is
    white where the picture is made anew."""

    at: Annotated[int, Field(ge=0)] = 0
    mask: Media | None = None


class ShotBody(Body):
    """A stretch of the video with a text of its own."""

    prompt: Annotated[str, Field(max_length=32_000)]
    num_frames: Annotated[int, Field(ge=1)]


class WindowBody(Body):
    """Windows of a long video (`length`), or its sparse attention (`reach`)."""

    length: int | None = None
    overlap: int | None = None
    weights: str | None = None
    schedule: str | None = None
    free_noise: bool | None = None
    anchors: int | None = None
    reach: int | None = None
    num_keys: int | None = None

    SPARSE: ClassVar[tuple[str, ...]] = ("reach", "num_keys")

    @model_validator(mode="after")
    def _of_a_kind(self) -> WindowBody:
        sparse = {name for name in self.SPARSE if getattr(self, name) is not None}
        rest = self.model_fields_set - set(self.SPARSE)
        if sparse and any(getattr(self, name) is not None for name in rest):
            raise ValueError("reach and num_keys are of sparse attention, the others of windows")
        if self.reach is None and self.length is None:
            raise ValueError("give length (windows) or reach (sparse attention)")
        return self


class GuidanceBody(Body):
    """As `Guidance` has them."""

    kind: str = "cfg"
    scale: float | None = None
    rescale: float = 0.0
    start: float = 0.0
    stop: float = 1.0
    zero_init_steps: int = 0
    eta: float = 1.0
    norm_threshold: float = 0.0
    momentum: float = 0.0


class LoraBody(Body):
    """An adapter by the name that the operator gave it (`GET /v1/models` lists them)."""

    name: Annotated[str, Field(max_length=64)]
    strength: float = 1.0
    expert: Literal["high", "low"] | None = None


class Timeline(Body):
    """Known frames, and the texts of stretches, on the time line of one video."""

    clips: Annotated[list[ClipBody], Field(max_length=64)] = []
    shots: Annotated[list[ShotBody], Field(max_length=64)] = []
    loop: bool = False
    init: Media | None = None
    strength: float | None = None
    resample: int | None = None


class Sampling(Body):
    """What every video may be given: each parameter of `VideoRequest` that has no place in a
    task's own fields. Left out, the checkpoint's own counts."""

    model: Annotated[str | None, Field(max_length=200)] = None
    size: Annotated[
        str | None, Field(max_length=16, description="WIDTHxHEIGHT in pixels, such as 1280x720.")
    ] = None
    height: Annotated[int | None, Field(ge=1)] = None
    width: Annotated[int | None, Field(ge=1)] = None
    fps: Annotated[float | None, Field(ge=LEAST_FPS, le=MAX_FPS[".mp4"])] = None
    negative_prompt: Annotated[str | None, Field(max_length=32_000)] = None
    original_prompt: Annotated[str | None, Field(max_length=32_000)] = None
    num_inference_steps: Annotated[int | None, Field(ge=1)] = None
    guidance_scale: float | None = None
    guidance_scale_2: float | None = None
    guidance: GuidanceBody | None = None
    shift: Annotated[float | None, Field(validation_alias=AliasChoices("shift", "flow_shift"))] = (
        None
    )
    sigmas: Annotated[list[float] | None, Field(max_length=1000)] = None
    ladder: Annotated[str | None, Field(max_length=100)] = None
    solver: Annotated[str | None, Field(max_length=100)] = None
    seed: Seed | None = None
    window: WindowBody | None = None
    latents: Annotated[
        str | None,
        Field(
            description="The initial noise: base64 of little-endian float32, in the shape "
            "[channels, latent_frames, latent_height, latent_width] of the canvas."
        ),
    ] = None
    label: Annotated[
        int | Annotated[str, Field(max_length=200)] | None,
        Field(description="The class, by its number or name, of a checkpoint of classes."),
    ] = None
    camera: Annotated[
        Moves | None,
        Field(
            description="How the camera moves, for a model that takes that: `pan left, zoom in "
            "x0.5`, a list of such moves, or a pose of 19 numbers for each frame."
        ),
    ] = None
    round_to_grid: bool = False
    strict_grid: bool = False
    loras: Annotated[list[LoraBody], Field(max_length=16)] = []
    resample: Annotated[int | None, Field(ge=1)] = None
    draft: Annotated[
        bool, Field(description="Half of each side and of the steps; `refine` makes it whole.")
    ] = False
    priority: Annotated[int, Field(ge=-8, le=8)] = 0
    deadline_s: Annotated[float | None, Field(gt=0)] = None
    user: Annotated[str | None, Field(max_length=200, description="It is not kept.")] = None

    @field_validator("size")
    @classmethod
    def _size(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return None
        if re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", value) is None:
            raise ValueError("it is WIDTHxHEIGHT in pixels, such as 1280x720, or auto")
        return value

    @field_validator("label")
    @classmethod
    def _label(cls, value: int | str | None) -> int | str | None:
        """A form has numbers as texts."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @model_validator(mode="after")
    def _one_size(self) -> Sampling:
        if self.size is not None and (self.height is not None or self.width is not None):
            raise ValueError("give size, or height and width")
        return self


Prompt = Annotated[str, Field(min_length=1, max_length=32_000)]
Text = Annotated[str | None, Field(max_length=32_000)]
Seconds = Annotated[float, Field(gt=0, le=100_000)]


class CreateVideo(Sampling):
    """A video from words; with `input_reference`, from a picture (its first frame) or a clip (which
    is changed to fit the prompt)."""

    prompt: Prompt
    seconds: Seconds | None = None
    num_frames: Annotated[int | None, Field(ge=1)] = None
    input_reference: Media | None = None
    strength: float | None = None
    loop: bool = False
    shots: Annotated[list[ShotBody], Field(max_length=64)] = []
    timeline: Timeline | None = None


class RemixVideo(Sampling):
    """The same request with another prompt, from the video that it became."""

    prompt: Prompt
    strength: float | None = None


class EditVideo(Sampling):
    """A clip changed to fit a prompt; with `mask`, only where that is white; with `missing`, only
    those frames (`4-7,12`)."""

    prompt: Prompt
    video: Media
    strength: float | None = None
    mask: Media | None = None
    missing: Annotated[str | None, Field(max_length=1000)] = None


class ExtendVideo(Sampling):
    """A clip made longer by `seconds` at its end, and by `before_s` at its beginning."""

    prompt: Text = None
    video: Media
    seconds: Annotated[
        Seconds | None, Field(validation_alias=AliasChoices("seconds", "after_s"))
    ] = None
    before_s: Annotated[float | None, Field(ge=0)] = None


class LoopVideo(Sampling):
    """New frames, `gap_s` seconds of them, lead from a video's end to its beginning."""

    prompt: Text = None
    gap_s: Seconds = 1.0


class ConnectVideos(Sampling):
    """New frames, `gap_s` seconds of them, lead from one clip to another."""

    prompt: Text = None
    first: Media
    second: Media
    gap_s: Seconds = 1.0


class UpscaleVideo(Sampling):
    """A video `scale` times as large on each side, or at `size`, its detail drawn anew."""

    prompt: Text = None
    scale: Annotated[float | None, Field(gt=1)] = None
    strength: float | None = None


class RefineVideo(Sampling):
    """A draft at its full size."""

    strength: float | None = None


class LoopClip(LoopVideo):
    """As `LoopVideo`, of a clip that is given."""

    video: Media


class UpscaleClip(UpscaleVideo):
    """As `UpscaleVideo`, of a clip that is given."""

    video: Media


class RepeatVideo(Sampling):
    """The same request again, task and clips and all; what is given here is in place of its own."""

    prompt: Text = None


class SetPriority(Body):
    """The priority of a job that waits."""

    priority: Annotated[int, Field(ge=-8, le=8)]


class CreateImages(Sampling):
    """Pictures from words."""

    prompt: Prompt
    n: Annotated[int, Field(ge=1, le=10)] = 1
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int | None, Field(ge=0, le=100)] = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    stream: Literal[False] | None = None
    style: Literal["vivid", "natural"] | None = None
