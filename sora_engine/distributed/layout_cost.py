"""What a layout costs, before anything runs: work, bytes sent, memory, and the time of a step.

Bytes are exact: they are what `Traffic` counts in a run, from the same shares of tokens and heads.
Work counts multiply-adds of the transformer as two FLOPs. Times are predictions from a device's
rates; `H200` holds the published and measured ones that they come from (`docs/parallel.md`).
No torch here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from sora_engine.config import ParallelConfig
from sora_engine.distributed.layout import bounds, layouts, share
from sora_engine.errors import LayoutError


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerCost:
    """The sizes of a transformer, and what they cost.

    patch_channels: values that a token's prediction has.
    """

    layers: int
    heads: int
    head_dim: int
    ffn: int
    patch_channels: int
    text_tokens: int = 512
    bytes_each: int = 2
    cross_attn_norm: bool = True

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of the blocks: two attentions of four matrices each, and the feed-forward."""
        return self.layers * (8 * self.width**2 + 2 * self.width * self.ffn)

    def shard_bytes(self, ranks: int) -> int:
        """What a rank holds of a block whose weights are sharded: of each tensor as many rows as
        any rank has, for that much it sends to the others each time the block runs."""
        width, ffn = self.width, self.ffn
        matrices = [(width, width)] * 8 + [(ffn, width), (width, ffn)]
        vectors = [rows for rows, _ in matrices] + [width] * (6 if self.cross_attn_norm else 4)
        values = sum(-(-rows // ranks) * columns for rows, columns in matrices)
        return (values + sum(-(-rows // ranks) for rows in vectors)) * self.bytes_each

    def token_flops(self) -> float:
        """A token's share of everything but self-attention, in one pass."""
        # The keys and values of texts are made once a request, not once a step.
        products = 6 * self.width**2 + 2 * self.width * self.ffn
        return self.layers * (2.0 * products + 4.0 * self.text_tokens * self.width)

    def pair_flops(self) -> float:
        """Of one query and one key in self-attention, over all heads and layers."""
        return 4.0 * self.width * self.layers


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoCost:
    """What a request's cost depends on: its canvas in latents, its windows, its branches.

    patch: latents a token, in frames, rows and columns. window: latent frames; None: one span.
    batch_tokens: `Limits.max_batch_tokens`, up to which windows and branches share a pass.
    """

    frames: int
    height: int
    width: int
    channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    window: int | None = None
    overlap: int = 0
    guided: bool = True
    batch_tokens: int = 32_768

    def spans(self) -> list[tuple[int, int]]:
        """(start, length) of each window, as `windows.plan_windows` lays them out."""
        if self.window is None or self.frames <= self.window:
            return [(0, self.frames)]
        last = self.frames - self.window
        starts = sorted({0, last, *range(0, last, self.window - self.overlap)})
        return [(start, self.window) for start in starts]

    def tokens(self, frames: int) -> int:
        return frames * self.height * self.width // math.prod(self.patch)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Rates that a step's time is predicted from.

    gemm, attention: FLOP/s; memory: bytes/s; link, network: bytes/s of one rank in each direction,
    inside a node of `node` ranks and between nodes; latency_s: of one exchange.
    elementwise_passes: passes over a layer's activations by what is neither.
    """

    name: str
    gemm: float
    attention: float
    memory: float
    memory_bytes: float
    link: float
    network: float
    node: int = 8
    latency_s: float = 15e-6
    elementwise_passes: float = 20.0


H200 = Device(
    name="H200",
    gemm=700e12,
    attention=600e12,
    memory=4.0e12,
    memory_bytes=141e9,
    link=380e9,
    network=45e9,
)
"""GEMM at 89% of the measured 790 TFLOP/s, attention at 85-90% of FA3's 673 to 711, copies near the
measured 4.3 TB/s; NVLink 450 and InfiniBand 50 GB/s a direction (their makers' figures), less 10 to
15%."""

HIDDEN = 0.8
"""How much of a ring's attention time its transfers can hide under."""

INTERCONNECTS = {"nvlink": H200.link, "pcie": 50e9, "infiniband": H200.network, "ethernet": 2.5e9}
"""Bytes a second of one rank in each direction, inside a node."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one step of a video costs at the rank that has most to do.

    sent_bytes: of each rank and purpose. exchanges: a step. overlapped_s: of sending, under work.
    """

    layout: ParallelConfig
    flops: float
    sent_bytes: tuple[dict[str, int], ...]
    memory_bytes: float
    compute_s: float
    exchange_s: float

    @property
    def step_s(self) -> float:
        return self.compute_s + self.exchange_s

    @property
    def largest_sent(self) -> int:
        return max(sum(sent.values()) for sent in self.sent_bytes)


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one cell makes in a step: passes of segments (their tokens), and the frames it sends."""

    passes: list[list[int]]
    blended: int

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.passes))


def _cells(layout: ParallelConfig, video: VideoCost) -> list[_Cell]:
    """As `RankSharing._owners` shares out one canvas."""
    spans = video.spans()
    branches = 2 if video.guided else 1
    split = video.guided and layout.guidance == 2
    groups = layout.window if split else layout.cells
    cells = []
    first = 0
    for count in share(len(spans), min(groups, len(spans))):
        mine = spans[first : first + count]
        first += count
        touched = len({f for start, length in mine for f in range(start, start + length)})
        tokens = [video.tokens(length) for _, length in mine]
        copies = 1 if split else branches
        cells.append(_Cell(_fill(tokens * copies, video.batch_tokens), touched * copies))
    cells += [_Cell([], 0)] * (groups - len(cells))
    return cells * 2 if split else cells


def _fill(segments: list[int], max_tokens: int) -> list[list[int]]:
    """As `denoise.fill` batches them."""
    passes: list[list[int]] = []
    for tokens in segments:
        if passes and sum(passes[-1]) + tokens <= max_tokens:
            passes[-1].append(tokens)
        else:
            passes.append([tokens])
    return passes


def sent_bytes(
    layout: ParallelConfig, model: TransformerCost, video: VideoCost
) -> list[dict[str, int]]:
    """What each rank sends in one step of one video, by purpose.

    Where weights are sharded, the first step has one gathering more, to encode the texts.
    """
    found: list[dict[str, int]] = []
    cells = _cells(layout, video)
    frame = video.channels * video.height * video.width * 4
    for i, cell in enumerate(cells):
        if i and cell == cells[i - 1]:
            found += found[-layout.sequence :]
            continue
        laid = [[0, *itertools.accumulate(segments)] for segments in cell.passes]
        cut = [bounds(offsets[-1], layout.sequence) for offsets in laid]
        for place in range(layout.sequence):
            sent: Counter[str] = Counter()
            for offsets, cuts in zip(laid, cut, strict=True):
                sent["ulysses"] += model.layers * _ulysses(layout, model, cuts, place)
                sent["ring"] += model.layers * _ring(layout, model, cuts, offsets, place)
                mine = cuts[place + 1] - cuts[place]
                out = model.patch_channels * model.bytes_each
                sent["gather"] += (layout.sequence - 1) * mine * out
            sent["blend"] = (layout.cells - 1) * cell.blended * frame
            if layout.shard_weights:
                shards = model.layers * model.shard_bytes(layout.sequence)
                sent["weights"] = len(cell.passes) * (layout.sequence - 1) * shards
            found.append({purpose: n for purpose, n in sent.items() if n})
    return found


def _ulysses(
    layout: ParallelConfig, model: TransformerCost, cuts: Sequence[int], place: int
) -> int:
    """Bytes that a rank sends in a layer: q, k and v of its tokens for others' heads, and the
    result of its heads for others' tokens."""
    first = place // layout.ulysses * layout.ulysses
    index = place - first
    group = cuts[first + layout.ulysses] - cuts[first]
    mine = cuts[place + 1] - cuts[place]
    heads = share(model.heads, layout.ulysses)[index]
    out = 3 * mine * (model.heads - heads) + (group - mine) * heads
    return out * model.head_dim * model.bytes_each


def _ring(
    layout: ParallelConfig,
    model: TransformerCost,
    cuts: Sequence[int],
    offsets: Sequence[int],
    place: int,
) -> int:
    """Bytes of keys and values that a rank sends in a layer: of those segments alone that reach
    into the block of the rank they go to."""
    heads = share(model.heads, layout.ulysses)[place % layout.ulysses]
    own = place // layout.ulysses
    start, stop = cuts[own * layout.ulysses], cuts[(own + 1) * layout.ulysses]
    # Blocks that hold something; an empty one is where two edges are equal.
    edges = sorted({cuts[i * layout.ulysses] for i in range(layout.ring + 1)})
    keys = 0
    for first, last in itertools.pairwise(offsets):
        inside = min(last, stop) - max(first, start)
        if inside > 0:
            blocks = bisect.bisect_left(edges, last) - bisect.bisect_right(edges, first) + 1
            keys += inside * (blocks - 1)
    return 2 * keys * heads * model.head_dim * model.bytes_each


def cost(layout: ParallelConfig, model: TransformerCost, video: VideoCost, device: Device) -> Cost:
    """One step of a video over a layout."""
    cells = _cells(layout, video)
    sent = sent_bytes(layout, model, video)
    busiest = max(cells, key=lambda cell: cell.tokens)
    mine = sum(bounds(sum(segments), layout.sequence)[1] for segments in busiest.passes)
    linear = model.token_flops() * mine
    # The rank with one head more than others waits for nobody; they wait for it.
    heads = share(model.heads, layout.ulysses)[0] / model.heads
    pairs = sum(n * n for p in busiest.passes for n in p) / layout.ring * heads
    attention = model.pair_flops() * pairs
    activation = mine * model.width * model.bytes_each
    elementwise = model.layers * device.elementwise_passes * activation / device.memory
    attention_s = attention / device.attention
    # A merge reads and writes a block's float32 output, and reads what it joins.
    merged = mine * layout.ulysses * heads * model.width * (8 + model.bytes_each)
    merges = model.layers * (layout.ring - 1) * merged / device.memory
    compute_s = linear / device.gemm + attention_s + elementwise + merges

    worst = max(range(len(sent)), key=lambda i: sum(sent[i].values()))
    bytes_of = sent[worst]
    # Ulysses is innermost, so it stays in a node where it fits; a ring of larger groups does not.
    ulysses_rate = device.link if layout.ulysses <= device.node else device.network
    sequence_rate = device.link if layout.sequence <= device.node else device.network
    replica_rate = device.link if layout.num_ranks <= device.node else device.network
    ulysses_s = bytes_of.get("ulysses", 0) / ulysses_rate
    ring_s = bytes_of.get("ring", 0) / sequence_rate
    # Keys of the next block cross while a block is attended to; the last block's work covers none.
    cover_s = HIDDEN * attention_s * (layout.ring - 1) / layout.ring
    shown_ring_s = max(0.0, ring_s - cover_s)
    # A block's weights cross while the block before it runs.
    weights_s = bytes_of.get("weights", 0) / sequence_rate
    shown_weights_s = max(0.0, weights_s - HIDDEN * compute_s)
    once_s = bytes_of.get("gather", 0) / sequence_rate + bytes_of.get("blend", 0) / replica_rate
    per_layer = (2 if layout.ulysses > 1 else 0) + (layout.ring - 1)
    exchanges = len(busiest.passes) * (model.layers * per_layer + 1) + 1
    exchange_s = ulysses_s + shown_ring_s + shown_weights_s + once_s
    if layout.num_ranks > 1:
        exchange_s += exchanges * device.latency_s
    return Cost(
        layout=layout,
        flops=linear + attention,
        sent_bytes=tuple(sent),
        memory_bytes=_memory(layout, model, video, _largest_share(cells, layout)),
        compute_s=compute_s,
        exchange_s=exchange_s,
    )


def _largest_share(cells: list[_Cell], layout: ParallelConfig) -> int:
    """The most tokens that a rank has in one pass."""
    return max(bounds(sum(p), layout.sequence)[1] for cell in cells for p in cell.passes)


def _memory(layout: ParallelConfig, model: TransformerCost, video: VideoCost, tokens: int) -> float:
    """Weights (sharded: a rank's share, the block that runs and the next one), and the tensors of
    one block that live at once, about: the residual stream in fp32, q, k, v, what Ulysses and ring
    hold beside them, the feed-forward's middle, and the canvas."""
    width, each = model.width, model.bytes_each
    held = 2 * width + 4 * width + model.ffn
    exchanged = (4 * width if layout.ulysses > 1 else 0) + (4 * width if layout.ring > 1 else 0)
    canvas = video.channels * video.frames * video.height * video.width * 4
    weights = model.parameters * each
    if layout.shard_weights:
        weights = weights // layout.sequence + 2 * (weights // model.layers)
    return weights + tokens * (held + exchanged) * each + 8.0 * canvas


def layouts_by_cost(
    num_ranks: int, model: TransformerCost, video: VideoCost, device: Device = H200
) -> list[Cost]:
    """The cost of every layout over `num_ranks` ranks, those that fit in memory first, then by
    the time of a step. The first is the one to take. Raises LayoutError where there is none.

    Where no layout fits with all weights at every rank, those with sharded weights are there too.
    """
    if num_ranks < 1:
        raise LayoutError(f"{num_ranks} ranks; at least 1 would work")
    found = layouts(num_ranks, num_heads=model.heads, windows=len(video.spans()))
    if not video.guided:
        found = [layout for layout in found if layout.guidance == 1]
    costs = [cost(layout, model, video, device) for layout in found]
    if all(c.memory_bytes > device.memory_bytes for c in costs):
        sharded = [replace(layout, shard_weights=True) for layout in found if layout.sequence > 1]
        costs += [cost(layout, model, video, device) for layout in sharded]
    if not costs:
        raise LayoutError(
            f"no layout over {num_ranks} ranks for {len(video.spans())} windows and "
            f"{model.heads} heads"
        )
    return sorted(costs, key=lambda c: (c.memory_bytes > device.memory_bytes, c.step_s))


def with_link(device: Device, interconnect: str) -> Device:
    """A device whose ranks in a node are joined by another link. Raises LayoutError by name."""
    if interconnect not in INTERCONNECTS:
        raise LayoutError(
            f"interconnect {interconnect!r} is not known; {', '.join(INTERCONNECTS)} are"
        )
    return replace(device, link=INTERCONNECTS[interconnect])
