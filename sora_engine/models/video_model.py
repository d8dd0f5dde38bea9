"""A loaded model: transformer or two, VAE, text encoder, and what requests need to know of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from sora_engine.denoise.canvas import KnownMode, Prompts
from sora_engine.denoise.packing import Context
from sora_engine.denoise.preview import LatentPreview
from sora_engine.models.device import free_memory
from sora_engine.models.wan.model import WanTransformer
from sora_engine.request.request import GenerationDefaults, LatentGrid
from sora_engine.samplers import SamplerConfig
from sora_engine.text import ImageEncoder, TextEncoder
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.fit import FittedCoder

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Expert:
    """One transformer, loaded when it is first needed.

    from_timestep: it serves timesteps at and above this one, down to the next expert's.
    """

    load: Callable[[], WanTransformer]
    from_timestep: float
    size_bytes: int
    transformer: WanTransformer | None = None


@dataclass(frozen=True, slots=True, eq=False)
class VideoDecoder:
    """The VAE of a checkpoint alone: what finished latents need."""

    vae: ChunkCoder[Any]
    vae_dtype: torch.dtype
    device: torch.device


@dataclass(slots=True, eq=False)
class VideoModel:
    """Everything that one checkpoint brings.

    experts: by falling noise level; Wan 2.2 A14B has two, all others one.
    weights_hash: `sampled_hash` of all weights, by which results name what made them.
    preview: latents to colours, where the checkpoint brings that.
    offload: which weights wait in host memory: one of `sora_engine.models.offload.LEVELS`.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    experts: list[Expert]
    vae: FittedCoder
    vae_dtype: torch.dtype
    text_encoder: TextEncoder
    image_encoder: ImageEncoder | None
    takes_last_image: bool
    sampler_config: SamplerConfig
    known_mode: KnownMode
    grid: LatentGrid
    defaults: GenerationDefaults
    weights_hash: str = ""
    preview: LatentPreview | None = None
    offload: str = "none"

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        for i, expert in enumerate(self.experts):
            if timestep >= expert.from_timestep:
                return i
        return len(self.experts) - 1

    def transformer(self, index: int) -> WanTransformer:
        """Expert `index`, loaded; where memory does not hold all, the others are let go of."""
        expert = self.experts[index]
        if expert.transformer is None:
            for other in self.experts:
                if other.transformer is not None and not self._fits(expert):
                    logger.info("letting go of one expert to load the other")
                    other.transformer = None
                    gc.collect()  # what visits a device and its methods refer to each other
            expert.transformer = expert.load()
        return expert.transformer

    @property
    def loaded_transformer(self) -> WanTransformer:
        """An expert that is loaded anyway: they are all built alike."""
        loaded = [e.transformer for e in self.experts if e.transformer is not None]
        return loaded[0] if loaded else self.transformer(0)

    def encode_contexts(self, transformer: WanTransformer, prompts: Prompts) -> list[Context]:
        """Keys and values of a request's texts, and last of its negative text."""
        texts = list(prompts.texts)
        if prompts.negative is not None:
            texts.append(prompts.negative)
        texts = [text.to(self.device) for text in texts]
        return transformer.encode_contexts(texts, [prompts.image] * len(texts))

    def _fits(self, expert: Expert) -> bool:
        waits = self.offload == "blocks"
        free = free_memory(torch.device("cpu") if waits else self.device)
        return free is None or expert.size_bytes < 0.8 * free
