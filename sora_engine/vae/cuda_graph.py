"""The steady step of the autoencoder as a CUDA graph: one launch instead of hundreds.

From its third latent frame on a video repeats one step: same shapes, same caches. After a few such
steps it is recorded once for each size and dtype, and then replayed on buffers that stay in place.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sora_engine.errors import BackendError
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.recording import Recorded, Recorder, record, wanted
from sora_engine.vae.shapes import VAEConfig, check_frames, check_latents, look_ahead
from sora_engine.vae.state import FeatureCache, FixedFeatureCache, VAEState

logger = logging.getLogger(__name__)

EAGER_LATENTS = 4
"""Latent frames of a video before its step is recorded: the decoder's first, its second and two
steady ones, in which weights are laid out, kernels compiled and algorithms picked."""


class SteadyGraph:
    """One recorded step, and the places of its input, its caches and its output.

    The caches of one state at a time lie here. Another one's are copied in when it is that one's
    turn, and those that it displaces move into memory of their own.
    """

    def __init__(
        self,
        step: Callable[[Tensor, FeatureCache], Tensor],
        x: Tensor,
        caches: Sequence[Tensor | None],
        recorder: Recorder,
    ):
        self._caches = tuple(cache for cache in caches if cache is not None)
        assert len(self._caches) == len(caches), "a steady step has all caches"
        self._input = x.clone(memory_format=torch.contiguous_format)
        self._output: Tensor
        self._inside: weakref.ref[VAEState] | None = None

        def once() -> None:
            self._output = step(self._input, FixedFeatureCache(self._caches))

        with torch.inference_mode():
            self._recorded = Recorded(once, x.device, recorder)

    @property
    def workspace_bytes(self) -> int:
        return self._recorded.workspace_bytes

    @torch.inference_mode()  # where most states are from: elsewhere theirs may not be written to
    def run(self, x: Tensor, state: VAEState, *, consume: bool) -> tuple[Tensor, VAEState]:
        """The step on `x` from `state`: its output, and the state after it, which lies here."""
        done = state.latent_frames
        self._bring_in(state, consume=consume)
        self._input.copy_(x)
        self._recorded.replay()
        after = VAEState(self._caches, done + 1, home=self)
        self._inside = weakref.ref(after)
        return self._output.clone(), after

    def _bring_in(self, state: VAEState, *, consume: bool) -> None:
        inside = None if self._inside is None else self._inside()
        if inside is not None and inside.caches is not self._caches:
            inside = None  # consumed, or moved out already
        there = inside is state
        if inside is not None and not (there and consume):
            inside.move_out()
        caches = state.release() if consume else list(state.caches)
        if there:
            return
        for i, place in enumerate(self._caches):
            cache, caches[i] = caches[i], None
            assert cache is not None
            if cache is not place:
                place.copy_(cache)


@contextmanager
def picked_by_time(wanted: bool) -> Iterator[None]:
    """cuDNN times its algorithms for each shape that it meets in here, and keeps to the fastest
    (`torch.backends.cudnn.benchmark`); where not `wanted`, it is left as the host has it."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class GraphedVAE(ChunkCoder[VAEState]):
    """A `VideoCoder` that runs a `CausalVAE`, replaying its steady steps as CUDA graphs.

    by_time: whether cuDNN picks the algorithms of steady steps by timing them, which another run
        may do otherwise: bits are then those of one process.

    A graph lives as long as a state that came from it, so its memory is free again when the videos
    of its size are done. Steps that cannot be recorded run as they are: `required` makes that a
    BackendError, otherwise it is logged as a warning, once for each size.
    """

    def __init__(
        self,
        vae: CausalVAE,
        *,
        required: bool = False,
        by_time: bool = True,
        recorder: Recorder = record,
    ):
        self.vae = vae
        self._by_time = by_time
        self._required, self._recorder = required, recorder
        self._graphs: weakref.WeakValueDictionary[tuple[object, ...], SteadyGraph] = (
            weakref.WeakValueDictionary()
        )
        self._refused: set[tuple[object, ...]] = set()

    @property
    def config(self) -> VAEConfig:
        return self.vae.config

    @property
    def workspace_bytes(self) -> int:
        """Device memory in which the graphs that are alive work, and which nothing else can use."""
        return sum(graph.workspace_bytes for graph in list(self._graphs.values()))

    def decode_chunk(
        self, latents: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """The next latent frames to frames, steady ones by a graph; bits as of `CausalVAE`."""
        check_latents(self.config, latents)
        parts = []
        for latent in latents.split(1, dim=2):
            graph = self._graph_for(self.vae.decode_step, latent, state, consume)
            if graph is None:
                with picked_by_time(self._by_time and _is_steady(state)):
                    frames, state = self.vae.decode_chunk(latent, state, consume=consume)
            else:
                assert state is not None
                frames, state = graph.run(self.denormalise(latent), state, consume=consume)
            parts.append(frames)
            consume = True  # a state between two of these steps is nobody else's
        assert state is not None
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0], state

    def encode_chunk(
        self, frames: Tensor, state: VAEState | None = None, *, consume: bool = False
    ) -> tuple[Tensor, VAEState]:
        """The next frames to latents, steady ones by a graph; bits as of `CausalVAE`."""
        check_frames(self.config, frames, first=state is None)
        head, factor = (1 if state is None else 0), self.scale_factor_temporal
        stretches = [1] * head + [factor] * ((frames.shape[2] - head) // factor)
        parts = []
        for stretch in frames.split(stretches, dim=2):
            graph = self._graph_for(self.vae.encode_step, stretch, state, consume)
            if graph is None:
                with picked_by_time(self._by_time and _is_steady(state)):
                    latents, state = self.vae.encode_chunk(stretch, state, consume=consume)
            else:
                assert state is not None
                moments, state = graph.run(stretch, state, consume=consume)
                latents = self.normalise(moments.chunk(2, dim=1)[0])
            parts.append(latents)
            consume = True
        assert state is not None
        return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0], state

    def _graph_for(
        self,
        step: Callable[[Tensor, FeatureCache], Tensor],
        x: Tensor,
        state: VAEState | None,
        consume: bool,
    ) -> SteadyGraph | None:
        """The graph of this step, recorded now if need be; None where it is to run as it is."""
        if state is None or state.latent_frames < EAGER_LATENTS or state.released:
            return None
        key = (step.__name__, *x.shape, x.dtype, x.device)
        graph = self._graphs.get(key)
        if graph is not None or key in self._refused:
            return graph
        # The graph takes over the caches' memory, or where they are still wanted, as much.
        caches = [c if consume or c is None else c.clone() for c in state.caches]
        try:
            with picked_by_time(self._by_time):
                graph = SteadyGraph(step, x, caches, self._recorder)
        except RuntimeError as error:
            message = f"the VAE's step on {list(x.shape)} cannot be a CUDA graph: {error}"
            if self._required:
                raise BackendError(message) from error
            logger.warning("%s; it runs kernel by kernel", message)
            self._refused.add(key)
            return None
        self._graphs[key] = graph
        return graph


def _is_steady(state: VAEState | None) -> bool:
    """Whether the next step has the shapes of all that follow: from the third latent frame on."""
    return state is not None and state.latent_frames >= 2


def graphed(
    vae: CausalVAE, setting: str, device: torch.device, *, by_time: bool = True
) -> CausalVAE | GraphedVAE:
    """`vae`, with CUDA graphs by the setting; raises as `recording.wanted`. by_time: as of
    `GraphedVAE`."""
    if not wanted(setting, device):
        return vae
    if look_ahead(vae.config):  # what comes out of a step changes until it has seen far enough
        if setting == "on":
            raise BackendError(
                f"CUDA graphs are not carried out for {vae.config.class_name}, whose decoder looks "
                "ahead; 'auto' or 'off' would work"
            )
        return vae
    return GraphedVAE(vae, required=setting == "on", by_time=by_time)
