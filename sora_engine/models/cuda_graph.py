"""Small passes of a transformer as CUDA graphs: one launch in the place of hundreds.

From step to step a composition, which is the segments that are packed together, keeps its shapes
and all that its layout holds. Where the device is done with a block before the host has launched
the next, a few passes of a composition run as they are, and the next one is recorded: tokens, rows
and timesteps are copied to fixed places then, and one launch does the rest. The same kernels run,
so the bits are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import VIDEO, PackedBatch, PackLayout
from sora_engine.errors import BackendError
from sora_engine.vae.recording import Recorded, Recorder, record

logger = logging.getLogger(__name__)

EAGER_PASSES = 2
"""Passes of a composition before it is recorded: attention is planned in the first, kernels are
loaded, and cuBLAS has picked its algorithms."""

MOST_GRAPHS = 4
"""Graphs that a transformer keeps, as many as a packer keeps layouts. The one that was not used for
the longest goes first."""

MOST_BLOCK_FLOP = 3e11
"""Arithmetic of a block, in its products, below which the host limits. It takes a device of
600 TFLOP/s 0.5 ms, and its 13 launches take the host about as long: 0.27 ms were measured on a
processor (`benchmarks/host_passes.py`), to which CUDA's driver adds its own."""

Kind = tuple[object, ...]


class PassGraph:
    """One recorded pass, and the places of what a step brings anew and of its predictions."""

    def __init__(
        self, forward: Callable[[PackedBatch], Tensor], batch: PackedBatch, recorder: Recorder
    ) -> None:
        self.last_used = 0
        self._inputs = [None if x is None else x.clone() for x in _inputs(batch)]
        self._predictions: Tensor
        tokens, timesteps, rows, pooled = self._inputs
        assert tokens is not None
        assert timesteps is not None
        video = replace(batch.video, tokens=tokens, rows=rows)
        # Without its layout: what stands in for a graph may keep the batch, and with it a layout
        # whose end is to be the graph's.
        fixed = replace(
            batch, streams={VIDEO: video}, timesteps=timesteps, pooled=pooled, layout=None
        )

        def once() -> None:
            self._predictions = forward(fixed)

        self._recorded = Recorded(once, tokens.device, recorder)

    @property
    def workspace_bytes(self) -> int:
        return self._recorded.workspace_bytes

    def run(self, batch: PackedBatch) -> Tensor:
        """The pass on a batch of the same kind and layout."""
        for place, value in zip(self._inputs, _inputs(batch), strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self._recorded.replay()
        return self._predictions.clone()


@dataclass(slots=True)
class _Composition:
    """What is known of one layout: passes that ran as they are, and graphs, by kind."""

    passes: dict[Kind, int] = field(default_factory=dict)
    graphs: dict[Kind, PassGraph] = field(default_factory=dict)


class GraphedPasses:
    """A transformer's `forward`, which replays small passes.

    A graph lives as long as the layout that it is of. Passes that are not recorded run as they are:
    those that only ranks take together, that sparse attention plans anew, that have streams of
    tokens beside the video's, or whose batch carries what is not known here. Where recording fails,
    `required` makes that a BackendError, otherwise it is logged as a warning, once for each kind.

    forward, shape: of the transformer.
    required: passes of any size are recorded.
    """

    def __init__(
        self,
        forward: Callable[[PackedBatch], Tensor],
        shape: TransformerShape,
        *,
        required: bool = False,
        recorder: Recorder = record,
    ) -> None:
        self._forward, self._required, self._recorder = forward, required, recorder
        self._block_flop = block_flop(shape)
        self._known: WeakKeyDictionary[PackLayout, _Composition] = WeakKeyDictionary()
        self._refused: set[Kind] = set()
        self._clock = 0

    def replays(self, num_tokens: int) -> bool:
        """Whether passes over so many tokens are recorded, where nothing else forbids it."""
        return self._required or num_tokens * self._block_flop < MOST_BLOCK_FLOP

    @property
    def workspace_bytes(self) -> int:
        """Device memory in which the graphs work."""
        return sum(graph.workspace_bytes for _, _, graph in self._graphs())

    @property
    def num_graphs(self) -> int:
        return len(self._graphs())

    def clear(self) -> None:
        """Forget all graphs: weights lie elsewhere now."""
        self._known.clear()

    def __call__(self, batch: PackedBatch) -> Tensor:
        if batch.layout is None or not self._can_replay(batch):
            return self._forward(batch)
        kind = _kind(batch)
        graph = self._graph_for(batch, batch.layout, kind)
        if graph is None:
            return self._forward(batch)
        self._clock += 1
        graph.last_used = self._clock
        return graph.run(batch)

    def _can_replay(self, batch: PackedBatch) -> bool:
        video = batch.video
        return (
            self.replays(len(video.tokens))
            and len(batch.streams) == 1
            and video.attend is None
            and video.sees is None
            and video.control is None
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(getattr(batch, name) is default for name, default in _UNKNOWN.items())
        )

    def _graph_for(self, batch: PackedBatch, layout: PackLayout, kind: Kind) -> PassGraph | None:
        """The graph of a batch, recorded now if need be; None where it is to run as it is."""
        if kind in self._refused:
            return None
        known = self._known.setdefault(layout, _Composition())
        if kind in known.graphs:
            return known.graphs[kind]
        known.passes[kind] = passes = known.passes.get(kind, 0) + 1
        if passes <= EAGER_PASSES:
            return None
        self._make_room()
        try:
            graph = PassGraph(self._forward, batch, self._recorder)
        except RuntimeError as error:
            size = len(batch.video.tokens)
            message = f"a pass over {size} tokens cannot be a CUDA graph: {error}"
            if self._required:
                raise BackendError(message) from error
            logger.warning("%s; it runs kernel by kernel", message)
            self._refused.add(kind)
            return None
        known.graphs[kind] = graph
        return graph

    def _graphs(self) -> Sequence[tuple[_Composition, Kind, PassGraph]]:
        known = list(self._known.values())
        return [(one, kind, graph) for one in known for kind, graph in one.graphs.items()]

    def _make_room(self) -> None:
        while len(found := self._graphs()) >= MOST_GRAPHS:
            composition, kind, _ = min(found, key=lambda entry: entry[2].last_used)
            del composition.graphs[kind], composition.passes[kind]


_KNOWN = {"streams", "timesteps", "contexts", "pooled", "layout"}
_UNKNOWN = {f.name: f.default for f in fields(PackedBatch) if f.name not in _KNOWN}
"""What else a batch may carry, and what it has there where it carries nothing."""


def _inputs(batch: PackedBatch) -> tuple[Tensor | None, ...]:
    """What a step brings anew; all else is the layout's."""
    return batch.video.tokens, batch.timesteps, batch.video.rows, batch.pooled


def _kind(batch: PackedBatch) -> Kind:
    """What of these decides which kernels run."""
    forms = [None if x is None else (x.shape, x.dtype) for x in _inputs(batch)]
    return (*forms, torch.is_inference_mode_enabled())


def block_flop(shape: TransformerShape) -> int:
    """Arithmetic of one block's products for one token, those of attention's scores aside."""
    attentions = 4 + (2 if shape.text_tokens else 0)  # a text's keys are computed once a request
    return 2 * shape.inner_dim * (attentions * shape.inner_dim + 2 * shape.ffn_dim)
