"""What an engine is told once: limits on requests and on its work, and over which ranks it runs."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask of an engine, and how much the engine works on at a time.

    Raises ValueError where a value is not an integer of at least 1; the last five may be None, and
    `text_cache_bytes` 0.

    Checked when a request is submitted, before it is queued:

    max_queued_jobs: the most jobs that wait, for each replica. One more raises QueueFullError.
    max_sessions: the most sessions that are open at a time. One more raises SessionLimitError.
    max_pixels: the most pixels of a frame, `height * width` as the model makes it, margin included.
        More raise RequestError.
    max_frames: the most frames as the model makes them, those left out at the end included. More
        raise RequestError.
    max_inference_steps: the largest `num_inference_steps`, and the most `sigmas`. More raise
        RequestError.
    max_prompt_chars: the most characters of `prompt`, of `negative_prompt` and of a shot's prompt,
        each. More raise RequestError.
    memory_bytes: what all jobs together may take beside the weights. A request that needs more
        raises MemoryLimitError; one that fits later waits. None: nine tenths of what was free when
        the engine was made. Over ranks it does nothing.

    Kept to while jobs run:

    max_running_jobs: the most jobs under way at a time, for each replica; further ones wait.
    max_batch_tokens: the most tokens of one forward pass. A single window that is larger still
        runs, alone.
    text_cache_bytes: what embeddings of texts may take that are kept for later requests with the
        same texts. They take what jobs leave free, and give way to them. 0: none are kept. Over
        ranks it does nothing, and none are.
    pack_tokens: the most tokens of a pass that several jobs share, or several windows of one long
        video; `max_batch_tokens` bounds it. A job joins another's pass if it has at most a quarter
        of this. None: measured once on this machine for a model, and kept on disk; over ranks
        nothing is measured, and it is `max_batch_tokens`.
    vae_memory_bytes: what coding one video may take beside the weights. Frames that need more are
        coded in tiles, which is an approximation and stands in the receipt. A request whose
        smallest tiles need more raises RequestError. None: what is free. Over ranks it does
        nothing: they code whole frames, or rows of them, and never tiles.
    max_clip_pixels: the most pixels of a picture, or of a frame of a clip, that a request gives as
        a file. None: 66,355,200, twice 8K UHD.
    max_clip_bytes: the most bytes of a clip that a request gives as a file, once its frames are
        decoded and scaled to the request's size. None: 4 GiB. A file over either fails the job
        with MediaError.
    """

    max_queued_jobs: int = 256
    max_sessions: int = 64
    max_running_jobs: int = 16
    max_pixels: int = 2048 * 2048
    max_frames: int = 100_000
    max_inference_steps: int = 1000
    max_prompt_chars: int = 20_000
    max_batch_tokens: int = 32_768
    text_cache_bytes: int = 64 * 2**20
    pack_tokens: int | None = None
    vae_memory_bytes: int | None = None
    memory_bytes: int | None = None
    max_clip_pixels: int | None = None
    max_clip_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                least = 0 if name in _SWITCHES else 1
                object.__setattr__(self, name, _integer(f"Limits.{name}", value, least))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """Over how many ranks an engine runs, and what each of them takes a share of.

    Raises ValueError where a number of ranks is not an integer of at least 1, `guidance` is over 2,
    `timeout_s` is not over 0, or `shard_weights` has one rank alone to share weights over.

    ulysses, ring: tokens are sharded over `ulysses * ring` ranks; attention exchanges heads inside
        a Ulysses group (arXiv 2309.14509), keys and values around a ring (arXiv 2310.01889).
    guidance: 2 puts the conditional and the unconditional branch on different ranks.
    window: a long video's windows are shared out over this many groups of ranks.
    data: replicas of all that, which serve separate requests.
    shard_weights: each of a forward pass's `ulysses * ring` ranks holds, and reads from the files,
        its own rows of the transformer's weights; a block's are gathered when it runs (FSDP2).
    timeout_s: a rank for which the others have waited this long counts as hung.
    """

    ulysses: int = 1
    ring: int = 1
    guidance: int = 1
    window: int = 1
    data: int = 1
    shard_weights: bool = False
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("ulysses", "ring", "guidance", "window", "data"):
            value = _integer(f"ParallelConfig.{name}", getattr(self, name))
            object.__setattr__(self, name, value)
        if self.guidance > 2:
            raise ValueError(
                f"ParallelConfig.guidance = {self.guidance}: there are two branches, so 1 or 2"
            )
        if self.shard_weights and self.sequence == 1:
            raise ValueError(
                "ParallelConfig.shard_weights shares weights out over the ulysses * ring ranks of "
                "a forward pass, and this layout has one; ulysses=2 or ring=2 would work"
            )
        if not isinstance(self.shard_weights, bool):
            raise ValueError(
                f"ParallelConfig.shard_weights must be True or False, got {self.shard_weights!r}"
            )
        number = isinstance(self.timeout_s, (int, float)) and math.isfinite(self.timeout_s)
        if not number or self.timeout_s <= 0:
            raise ValueError(
                f"ParallelConfig.timeout_s must be over 0, got {self.timeout_s!r}; 20.0 would work"
            )

    @property
    def sequence(self) -> int:
        """Ranks over which one forward pass's tokens are sharded."""
        return self.ulysses * self.ring

    @property
    def cells(self) -> int:
        """Groups of ranks that make forward passes of their own."""
        return self.guidance * self.window

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica."""
        return self.sequence * self.cells

    def __str__(self) -> str:
        names = ("data", "guidance", "window", "ring", "ulysses")
        shown = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) > 1]
        shown += ["shard_weights"] * self.shard_weights
        return " ".join(shown) or "one rank"


NO_LIMIT = 1 << 62
"""Bytes: more than any machine has."""

_SWITCHES = ("text_cache_bytes",)
_OPTIONAL = (
    *("pack_tokens", "vae_memory_bytes", "memory_bytes"),
    *("max_clip_pixels", "max_clip_bytes"),
)


def _integer(name: str, value: object, least: int = 1) -> int:
    """A plain integer of at least `least`, from one of any kind but bool; ValueError for others."""
    try:
        number = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if number < least:
        what = "a positive integer" if least else "an integer of at least 0"
        raise ValueError(f"{name} must be {what}, got {value!r}")
    return number
