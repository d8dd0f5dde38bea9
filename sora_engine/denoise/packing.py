"""Segments of any size, laid end to end in one batch without padding.

A `Segment` is the tokens of one window under one guidance branch. `pack` turns a list of them
into a `PackedBatch`: what a model's forward pass takes. Nothing here has a batch dimension.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sora_engine.denoise.adapting import AdapterRun, adapter_runs
from sora_engine.denoise.camera import token_control
from sora_engine.denoise.conditioning import Context, KeyValues
from sora_engine.denoise.extents import extents_of, places_of, rates_of
from sora_engine.denoise.rows import Conditions, modulation_rows, token_rows
from sora_engine.denoise.windows import token_sight
from sora_kernels import AttentionPlan, BlockPlan
from sora_kernels.transfer import to_device

Grid = tuple[int, int, int]
"""Patches of a window in frames, rows and columns."""
PatchSize = tuple[int, int, int]
"""Latents of a patch in frames, rows and columns."""

VIDEO = "video"
"""The stream of the latents' own tokens."""

ANCHOR_GAP = 8
"""Frames of tokens that are left free between anchors and the others, in RoPE's time."""
# Plans of packed attention by head_dim and dtype, each beside the offsets that it is for.
Plans = dict[tuple[int, torch.dtype], tuple[Tensor, AttentionPlan]]
SparsePlans = dict[tuple[int, torch.dtype], BlockPlan]


@dataclass(frozen=True, slots=True)
class Segment:
    """One window under one guidance branch.

    latents: `[channels, T, H, W]`, the model's input, conditioning channels included.
    timesteps: the noise level that the model is told, on the host (float32): `[T]`, or
        `[T, H / patch_h, W / patch_w]` where it differs within a frame.
    contexts: what stretches of its time read, in order, each with its number of latent frames:
        one for most requests, one a shot where there are several.
    sees: bool `[T, T]` on the host, which latent frames each one attends to; None: all.
    num_anchors: how many latent frames at the beginning are of another time: they show what the
        others are to look like, and stand `ANCHOR_GAP` before them, whenever they were. Whole
        patches.
    fps: frames a second of the video; None where no model of the batch reads it.
    actions: float32 `[T, action_dim]` on the host, what was done to make each latent frame, for
        models that are driven; None: nothing.
    places: float32 `[T, 2]` on the host, in latents: how far down and right of the newest frame's
        view each frame's lies, for models that know where their camera is; None: nowhere else.
    control: `[T, tokens of a frame, dim]`, what is added to its tokens once they are embedded, for
        models that are told how the camera moves; None: nothing.
    """

    latents: Tensor
    timesteps: Tensor
    contexts: tuple[tuple[Context, int], ...]
    sees: Tensor | None = None
    num_anchors: int = 0
    fps: float | None = None
    actions: Tensor | None = None
    places: Tensor | None = None
    control: Tensor | None = None


class SelfAttention(Protocol):
    """Self-attention of a stream whose tokens are one rank's share of a batch."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, stream: Stream, *, backend: str
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Stream:
    """The tokens of one modality, segments end to end.

    tokens: `[N, channels * patch volume]`, each token's patch in (channel, t, h, w) order; of a
        context's stream `[N, dim]`.
    rows: int64 `[N]`, the row of the modulation table that each token reads; None when there is
        one row for all.
    coords: int64 `[N, 3]`, (frame, row, column) of each token for RoPE: its place in its window's
        patch grid, and behind anchors `ANCHOR_GAP` frames later; of a context's stream (place in
        the text, 0, 0).
    extents: int64 `[N, 2]`, rows and columns of each token's segment; None of a context's stream.
    rates: float32 `[N]`, frames a second of each token's video; None where segments do not say.
    cu_seqlens: int32 `[segments + 1]`.
    max_seqlen: tokens of the longest segment.
    grids: of each segment; of a context's stream (tokens of the text, 1, 1).
    attend: how self-attention is done where the tokens are one rank's share of a batch;
        `cu_seqlens`, `max_seqlen` and `grids` are then the whole batch's, and the rest is this
        rank's.
    plans: what attention planned for these offsets. The video's are its layout's (over ranks, its
        shard's) and live from step to step, as offsets stay the same; a context's are this batch's.
    sees: for each segment bool `[T, T]`, which frames of tokens each one attends to; None: all, in
        every segment.
    sparse_plans: what attention planned for `sees`, for all layers; kept in the layout.
    places: float32 `[N, 2]`, how far down and right, in latents, the view that each token is of
        lies from its segment's newest; None: none lies elsewhere.
    control: `[N, dim]`, what is added to each token once it is embedded; None: nothing to any.
    """

    tokens: Tensor
    rows: Tensor | None
    coords: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    grids: tuple[Grid, ...]
    extents: Tensor | None = None
    rates: Tensor | None = None
    attend: SelfAttention | None = None
    plans: Plans = field(default_factory=dict)
    sees: tuple[Tensor, ...] | None = None
    sparse_plans: SparsePlans = field(default_factory=dict)
    places: Tensor | None = None
    control: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ContextRuns:
    """Runs of consecutive tokens that read one text (or image).

    cu_seqlens_q: int32 `[runs + 1]` over the stream's tokens.
    cu_seqlens_k: int32 `[runs + 1]` over `keys` and `values` `[layers, K, heads, head_dim]`.
    padding: int32 `[runs]`, how many padding keys each run reads; None when none has any.
        `padding_keys`, `padding_values`: as in `KeyValues`.
    stretches: where adapters make the padding of some tokens another one than that of others: the
        runs of each stretch of tokens, and its length. All else is the first one's then.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    keys: Tensor
    values: Tensor
    padding: Tensor | None
    padding_keys: Tensor | None
    padding_values: Tensor | None
    plans: Plans = field(default_factory=dict)
    stretches: tuple[tuple[ContextRuns, int], ...] = ()


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """What a model's forward pass takes.

    streams: by modality: `"video"`, and one for each name of `Context.tokens`.
    timesteps: float32 `[rows]`, one for each row of the modulation table.
    contexts: for cross-attention, by source (`"text"`, `"image"`).
    layout: what of it is the same object in batches of other steps; None where that is not said.
    pooled: `[rows, dim]`, what each row of the modulation table is of beside its timestep; None
        where contexts have nothing pooled.
    actions: float32 `[rows, action_dim]`, what each row of the modulation table is of beside its
        timestep; None where no segment has any.
    adapters: the tokens of the video that have any, in order.
    """

    streams: Mapping[str, Stream]
    timesteps: Tensor
    contexts: Mapping[str, ContextRuns]
    pooled: Tensor | None = None
    layout: PackLayout | None = None
    adapters: tuple[AdapterRun, ...] = ()
    actions: Tensor | None = None

    @property
    def video(self) -> Stream:
        return self.streams[VIDEO]


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PackLayout:
    """The part of a batch that stays the same from step to step: geometry and contexts."""

    coords: Tensor
    extents: Tensor
    rates: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    grids: tuple[Grid, ...]
    contexts: Mapping[str, ContextRuns]
    plans: Plans = field(default_factory=dict)
    sparse: dict[bytes, SparsePlans] = field(default_factory=dict)

    def plans_for(self, sees: tuple[Tensor, ...] | None) -> SparsePlans:
        """What attention plans for this sight. It is kept until there is another one: sessions see
        alike at every step."""
        key = b"" if sees is None else b"".join(seen.numpy().tobytes() for seen in sees)
        if key not in self.sparse:
            self.sparse.clear()
        return self.sparse.setdefault(key, {})


@dataclass(slots=True)
class Packer:
    """Packs segments, and keeps the layouts of the last few compositions that it met.

    From one denoising step to the next only tokens and noise levels change, so coordinates,
    sequence offsets and the joined text keys are built once for a composition.
    """

    patch_size: PatchSize
    device: torch.device
    max_layouts: int = 4
    _layouts: dict[tuple[object, ...], tuple[PackLayout, object]] = field(default_factory=dict)

    def pack(self, segments: Sequence[Segment]) -> PackedBatch:
        """Lay `segments` end to end. Raises ValueError where a size is off the patch grid."""
        if not segments:
            raise ValueError("pack needs at least one segment, got none")
        layout = self._layout(segments)
        tokens = torch.cat([patchify(s.latents, self.patch_size) for s in segments])
        frames = self.patch_size[0]
        rows = modulation_rows(
            [_conditions(s, grid, frames) for s, grid in zip(segments, layout.grids, strict=True)]
        )
        alone = len(rows.timesteps) == 1
        sees = token_sight([s.sees for s in segments], layout.grids, frames)
        video = Stream(
            tokens=tokens,
            rows=None if alone else token_rows(rows.read, layout.grids, self.device),
            coords=layout.coords,
            extents=layout.extents,
            rates=layout.rates,
            cu_seqlens=layout.cu_seqlens,
            max_seqlen=layout.max_seqlen,
            grids=layout.grids,
            plans=layout.plans,
            sees=sees,
            sparse_plans=layout.plans_for(sees),
            places=places_of([s.places for s in segments], layout.grids, frames, self.device),
            control=token_control([s.control for s in segments], layout.grids, self.device),
        )
        streams = {VIDEO: video}
        for name in segments[0].contexts[0][0].tokens:
            streams[name] = _context_stream(name, segments, rows.read, self.device)
        lengths = map(math.prod, layout.grids)
        own = (segment.contexts[0][0].adapters for segment in segments)
        runs = adapter_runs(zip(own, lengths, strict=True))
        return PackedBatch(
            streams,
            timesteps=to_device(rows.timesteps, self.device),
            contexts=layout.contexts,
            pooled=rows.pooled,
            layout=layout,
            adapters=runs,
            actions=None if rows.actions is None else to_device(rows.actions, self.device),
        )

    def unpack(self, predictions: Tensor, batch: PackedBatch, channels: int) -> list[Tensor]:
        """Split `predictions [N, patch volume * channels]` into one `[C, T, H, W]` a segment."""
        lengths = [math.prod(grid) for grid in batch.video.grids]
        parts = predictions.split(lengths)
        return [
            unpatchify(part, grid, self.patch_size, channels)
            for part, grid in zip(parts, batch.video.grids, strict=True)
        ]

    def _layout(self, segments: Sequence[Segment]) -> PackLayout:
        grids = tuple(_grid(s.latents, self.patch_size) for s in segments)
        contexts = [s.contexts for s in segments]
        anchors = tuple(s.num_anchors for s in segments)
        rates = tuple(s.fps for s in segments)
        texts = tuple((id(text), n) for spans in contexts for text, n in spans)
        key = (grids, anchors, rates, texts)
        if key not in self._layouts:
            while len(self._layouts) >= self.max_layouts:
                self._layouts.pop(next(iter(self._layouts)))
            # The contexts are kept beside the layout, so that their ids are not used again.
            layout = lay_out(grids, contexts, anchors, self.patch_size, self.device, rates)
            self._layouts[key] = (layout, contexts)
        return self._layouts[key][0]

    def num_tokens(self, segment: Segment) -> int:
        """How many tokens a segment will take in a batch."""
        return math.prod(_grid(segment.latents, self.patch_size))

    def clear(self) -> None:
        """Forget all layouts, and the text keys that they hold."""
        self._layouts.clear()


def patchify(latents: Tensor, patch_size: PatchSize) -> Tensor:
    """`[C, T, H, W]` -> tokens `[T' * H' * W', C * pt * ph * pw]`, channel first in each token."""
    (C, T, H, W), (pt, ph, pw) = latents.shape, patch_size
    x = latents.reshape(C, T // pt, pt, H // ph, ph, W // pw, pw)
    return x.permute(1, 3, 5, 0, 2, 4, 6).reshape(-1, C * pt * ph * pw)


def unpatchify(tokens: Tensor, grid: Grid, patch_size: PatchSize, channels: int) -> Tensor:
    """Tokens `[N, pt * ph * pw * C]`, channel last as models emit them -> `[C, T, H, W]`."""
    (T, H, W), (pt, ph, pw) = grid, patch_size
    x = tokens.reshape(T, H, W, pt, ph, pw, channels).permute(6, 0, 3, 1, 4, 2, 5)
    return x.reshape(channels, T * pt, H * ph, W * pw)


def lay_out(
    grids: Sequence[Grid],
    contexts: Sequence[tuple[tuple[Context, int], ...]],
    anchors: Sequence[int],
    patch_size: PatchSize,
    device: torch.device,
    rates: Sequence[float | None] = (),
) -> PackLayout:
    """Coordinates and offsets of segments with these patch grids, and their joined contexts."""
    lengths = [math.prod(grid) for grid in grids]
    axes = [
        torch.meshgrid(_times(T, seen, patch_size[0]), *map(torch.arange, size), indexing="ij")
        for (T, *size), seen in zip(grids, anchors, strict=True)
    ]
    coords = torch.cat([torch.stack([a.flatten() for a in axis], dim=1) for axis in axes])
    spans: list[tuple[Context, int]] = []
    for (T, H, W), stretches in zip(grids, contexts, strict=True):
        frames = [num_frames for _, num_frames in stretches]
        if sum(frames) != T * patch_size[0] or any(n % patch_size[0] for n in frames):
            raise ValueError(f"contexts of {frames} latent frames do not fill {T * patch_size[0]}")
        spans += [(context, n // patch_size[0] * H * W) for context, n in stretches]
    return PackLayout(
        coords=to_device(coords, device),
        extents=extents_of(grids, device),
        rates=rates_of(rates, lengths, device),
        cu_seqlens=_cumulative(lengths, device),
        max_seqlen=max(lengths),
        grids=tuple(grids),
        contexts={name: _joined(name, spans, device) for name in spans[0][0].sources},
    )


def _times(frames: int, anchors: int, patch_frames: int) -> Tensor:
    """The place in time of each frame of tokens, anchors first."""
    if anchors % patch_frames or not 0 <= anchors < frames * patch_frames:
        raise ValueError(
            f"anchors must be a multiple of {patch_frames} from 0 to below "
            f"{frames * patch_frames} latent frames, got {anchors}"
        )
    times = torch.arange(frames)
    times[anchors // patch_frames :] += ANCHOR_GAP if anchors else 0
    return times


def _joined(name: str, spans: Sequence[tuple[Context, int]], device: torch.device) -> ContextRuns:
    """What spans of tokens read of a source: in one, or in a stretch for each of those whose
    adapters differ, as the model's padding is another one then."""
    stretches = []
    for _, group in itertools.groupby(spans, key=lambda span: id(span[0].adapters)):
        own = [(context.sources[name], length) for context, length in group]
        stretches.append((_context_runs(own, device), sum(length for _, length in own)))
    first = stretches[0][0]
    return first if len(stretches) == 1 else replace(first, stretches=tuple(stretches))


def _context_runs(spans: Sequence[tuple[KeyValues, int]], device: torch.device) -> ContextRuns:
    """Join consecutive spans of tokens that read the same context into runs."""
    runs: list[KeyValues] = []
    run_lengths: list[int] = []
    for source, length in spans:
        if runs and runs[-1] is source:
            run_lengths[-1] += length
        else:
            runs.append(source)
            run_lengths.append(length)
    key_lengths = [run.keys.shape[1] for run in runs]
    padding = None
    if any(run.padding for run in runs):
        padding = to_device(torch.tensor([run.padding for run in runs], dtype=torch.int32), device)
    single = len(runs) == 1
    # Padding is the model's token and not the text's (Wan's is what its text embedder makes of a
    # zero row), and all of a batch is at one expert: the first run's key and value are everyone's.
    assert all((run.padding_keys is None) == (runs[0].padding_keys is None) for run in runs)
    return ContextRuns(
        cu_seqlens_q=_cumulative(run_lengths, device),
        cu_seqlens_k=_cumulative(key_lengths, device),
        max_seqlen_q=max(run_lengths),
        max_seqlen_k=max(key_lengths),
        keys=runs[0].keys if single else torch.cat([run.keys for run in runs], dim=1),
        values=runs[0].values if single else torch.cat([run.values for run in runs], dim=1),
        padding=padding,
        padding_keys=runs[0].padding_keys,
        padding_values=runs[0].padding_values,
    )


def _conditions(segment: Segment, grid: Grid, patch_frames: int) -> Conditions:
    """What its tokens are under. One of several latent frames has the first one's noise level."""
    T, H, W = grid
    level = segment.timesteps[::patch_frames].to(torch.float32)
    assert level.shape in ((T,), (T, H, W)), (level.shape, (T, H, W))
    levels = level.flatten()
    spans = [(own, n // patch_frames * (len(levels) // T)) for own, n in segment.contexts]
    actions = None if segment.actions is None else segment.actions[::patch_frames].float()
    assert actions is None or len(actions) == T, (actions.shape, T)
    return Conditions(levels, spans, actions, T)


def _context_stream(
    name: str,
    segments: Sequence[Segment],
    rows: Sequence[Tensor],
    device: torch.device,
) -> Stream:
    """The tokens of all segments' contexts under one name. They read the modulation row of the
    noisiest token of their segment (rows rise with the noise level)."""
    texts = []
    for segment in segments:
        if len(segment.contexts) != 1:
            raise ValueError(f"stream {name!r} takes one context a segment, got several shots")
        texts.append(segment.contexts[0][0].tokens[name])
    lengths = [len(text) for text in texts]
    noisiest = torch.stack([own.max() for own in rows])
    coords = torch.zeros(sum(lengths), 3, dtype=torch.int64)
    coords[:, 0] = torch.cat([torch.arange(n) for n in lengths])
    single = int(noisiest.max()) == 0
    each = noisiest.repeat_interleave(torch.tensor(lengths))
    return Stream(
        tokens=torch.cat(texts),
        rows=None if single else to_device(each, device),
        coords=to_device(coords, device),
        cu_seqlens=_cumulative(lengths, device),
        max_seqlen=max(lengths),
        grids=tuple((n, 1, 1) for n in lengths),
    )


def _grid(latents: Tensor, patch_size: PatchSize) -> Grid:
    if latents.ndim != 4:
        raise ValueError(f"latents must be [channels, T, H, W], got shape {tuple(latents.shape)}")
    size = tuple(latents.shape[1:])
    if any(n % p or n == 0 for n, p in zip(size, patch_size, strict=True)):
        raise ValueError(f"latent size {size} is not a positive multiple of the patch {patch_size}")
    T, H, W = (n // p for n, p in zip(size, patch_size, strict=True))
    return T, H, W


def _cumulative(lengths: Sequence[int], device: torch.device) -> Tensor:
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
    return to_device(offsets, device)
