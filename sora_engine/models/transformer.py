"""What every family's transformer is: a module over packed tokens whose blocks run one by one."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from sora_engine.denoise.adapting import AdapterRun
from sora_engine.denoise.conditioning import Context, Embedding
from sora_engine.denoise.model import TransformerShape
from sora_engine.denoise.packing import PackedBatch
from sora_engine.models.backends import Backends
from sora_engine.models.cuda_graph import GraphedPasses
from sora_engine.models.cuda_linear import CublasLinear, lay_out_for_cuda
from sora_engine.models.linear import block_linears, lay_out_like
from sora_engine.models.lora import adapting
from sora_engine.models.quantised import lay_out_quantised
from sora_engine.vae.recording import Recorder, record


class DiffusionTransformer(nn.Module, ABC):
    """A transformer that takes a `PackedBatch` of segments of any size, length, text and noise
    level: there is no batch dimension.

    What it needs is rehearsed on meta tensors, so no tensor's values may decide what it does: sizes
    of segments are in `Stream.grids`.

    block_lists: the names of its lists of blocks, in the order in which they run.
    own_parts: the children of a block that only the block's own methods read: their weights may be
        elsewhere while none of `block_methods` runs.
    one_input: layers of a block, by name, that read one input and have one parent. On CUDA their
        weights lie side by side, and the parent has them as `joined`.
    """

    block_lists: ClassVar[tuple[str, ...]] = ("blocks",)
    own_parts: ClassVar[tuple[str, ...]]
    adaptable: ClassVar[str] = ""
    """A pattern of the layers, by name, whose adapters may differ from row to row: their input has
    a row for each token of the video, or of a text."""
    block_methods: ClassVar[tuple[str, ...]] = ("forward",)
    one_input: ClassVar[tuple[str, ...]] = ()
    backends: Backends
    graphs: GraphedPasses | None = None
    """What replays its small passes, where that is wanted."""

    @property
    @abstractmethod
    def shape(self) -> TransformerShape:
        """Its sizes."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype that activations flow in."""

    @abstractmethod
    def rebuild(self) -> Self:
        """Another transformer of the same configuration and backends, with weights of its own."""

    @abstractmethod
    def example_embedding(self, num_tokens: int, device: torch.device) -> Embedding:
        """Zeros of the shapes that `encode_contexts` takes for a text of so many tokens."""

    @abstractmethod
    def encode_contexts(self, embeddings: Sequence[Embedding]) -> list[Context]:
        """What each embedding is to attention, for every layer: once a request."""

    def encode_camera(self, rays: Tensor) -> Tensor:
        """What the camera's rays in a latent frame add to its tokens, `[tokens, inner_dim]`: for
        transformers that take a camera, once a request."""
        raise ValueError(f"{type(self).__name__} of this configuration takes no camera")

    @abstractmethod
    def forward(self, batch: PackedBatch) -> Tensor:
        """Predictions for the video's tokens, `[N, patch volume * out_channels]`, channel last."""

    def adapting(self, runs: Sequence[AdapterRun]) -> AbstractContextManager[None]:
        """While it lasts, adapters change what the layers make of these runs of tokens."""
        return adapting(self, runs)

    @property
    def blocks_in_order(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [block for name in self.block_lists for block in getattr(self, name)]

    def prepare(self) -> Self:
        """Lay the blocks' weights out for the processor, for good: the model only runs from here.

        On a CPU they are no parameters any more, and cannot be saved. Returns self.
        """
        for block in self.blocks_in_order:
            block_linears(block)
        return self.lay_out_for_cuda() if next(self.parameters()).is_cuda else self

    def lay_out_for_cuda(self) -> Self:
        """Give the blocks' linear layers the forms that they have on CUDA. Returns self."""
        for block in self.blocks_in_order:
            lay_out_for_cuda(block, self.one_input)
        return self

    def replay_passes(self, *, required: bool = False, recorder: Recorder = record) -> Self:
        """Have passes be recorded and replayed as CUDA graphs (`GraphedPasses`), for a transformer
        whose weights stay where they are. Returns self."""
        owner = weakref.ref(self)  # the graphs are its own: without a circle it goes at once

        def forward(batch: PackedBatch) -> Tensor:
            transformer = owner()
            assert transformer is not None
            return type(transformer).forward(transformer, batch)

        self.graphs = GraphedPasses(forward, self.shape, required=required, recorder=recorder)
        self.forward = self.graphs  # type: ignore[method-assign,assignment]
        return self

    def without_weights(self) -> Self:
        """The same layers on the meta device, to rehearse what they will need."""
        with torch.device("meta"):
            hollow = self.rebuild()
        hollow = hollow.to(self.dtype).eval().requires_grad_(False)
        lay_out_like(hollow, self)
        lay_out_quantised(hollow, self)
        if any(isinstance(module, CublasLinear) for module in self.modules()):
            hollow.lay_out_for_cuda()
        return hollow
