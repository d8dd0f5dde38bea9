"""A loaded model: transformer or two, VAE, text encoder, and what requests need to know of them."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from sora_engine.denoise.preview import Preview
from sora_engine.errors import RequestError
from sora_engine.models.adapter_store import AdapterStore
from sora_engine.models.backends import served_backends
from sora_engine.models.lora import AdapterSet
from sora_engine.models.quantised import errors_of, formats_of
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid
from sora_engine.request.driving import Driving
from sora_engine.request.labels import Labels
from sora_engine.request.lora import LoraRecord
from sora_engine.samplers import SamplerConfig
from sora_engine.text import ImageEncoder, PromptEncoder
from sora_engine.vae.fit import FittedCoder
from sora_engine.vae.free_memory import free_bytes

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Expert:
    """One transformer, loaded when it is first needed.

    from_timestep: it serves timesteps at and above this one, down to the next expert's.
    """

    load: Callable[[], DiffusionTransformer]
    from_timestep: float
    size_bytes: int
    transformer: DiffusionTransformer | None = None


@dataclass(slots=True, eq=False)
class VideoModel:
    """Everything that one checkpoint brings.

    family: the name of the family that it is of.
    experts: by falling noise level, most often one.
    takes_last_image: whether the image encoder is shown the last frame too.
    learned_variance: whether predictions carry as many channels again, of a variance.
    labels: the classes that it makes, where it reads a class in place of a text.
    takes_camera: whether it is told how the camera moves.
    weights_hash: `sampled_hash` of all weights, by which results name what made them.
    preview: latents to pictures, where the checkpoint brings that or a tiny decoder was given.
    loras: adapters that are merged into its transformers. adapters: those that requests ask for.
    offload: which weights wait in host memory: one of `models.offload.LEVELS`.
    kind: how weights of its blocks are quantised: one of `models.quantised.KINDS`, or "".
    driving: how its worlds are driven; None where it takes no actions.
    chosen: why settings that were "auto" have become what they have, by name.
    """

    name: str
    device: torch.device
    dtype: torch.dtype
    experts: list[Expert]
    vae: FittedCoder
    vae_dtype: torch.dtype
    prompt_encoder: PromptEncoder
    image_encoder: ImageEncoder | None
    takes_last_image: bool
    sampler_config: SamplerConfig
    known_mode: KnownMode
    grid: LatentGrid
    defaults: GenerationDefaults
    weights_hash: str = ""
    family: str = ""
    learned_variance: bool = False
    labels: Labels | None = None
    takes_camera: bool = False
    preview: Preview | None = None
    loras: tuple[LoraRecord, ...] = ()
    adapters: AdapterStore | None = None
    offload: str = "none"
    kind: str = ""
    driving: Driving | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        """As `Engine.from_pretrained(dtype=...)` takes it."""
        name = str(self.dtype).removeprefix("torch.")
        return f"{self.kind}:{name}" if self.kind else name

    @property
    def quantised(self) -> dict[str, str]:
        """By format, what of the loaded transformers' blocks is quantised, for receipts."""
        return {name: text for part in self._by_expert(formats_of) for name, text in part.items()}

    @property
    def lossy(self) -> dict[str, float]:
        """What is lossy of that, with its measured relative error."""
        return {name: error for part in self._by_expert(errors_of) for name, error in part.items()}

    def _by_expert(
        self, told: Callable[[DiffusionTransformer], dict[str, T]]
    ) -> list[dict[str, T]]:
        if not self.kind:
            return []
        one = len(self.experts) == 1
        return [
            {name if one else f"{name}, expert {i + 1}": value for name, value in of.items()}
            for i, expert in enumerate(self.experts)
            if expert.transformer is not None
            for of in [told(expert.transformer)]
        ]

    @property
    def num_experts(self) -> int:
        return len(self.experts)

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        for i, expert in enumerate(self.experts):
            if timestep >= expert.from_timestep:
                return i
        return len(self.experts) - 1

    def transformer(self, index: int) -> DiffusionTransformer:
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

    def adapters_of(self, loras: Sequence[LoraRecord]) -> Sequence[AdapterSet | None]:
        """For each expert what these adapters, which are loaded, change of it."""
        if self.adapters is None:
            raise RequestError("this model takes no adapters of requests")
        return self.adapters.sets(loras, hollow=self.device.type == "meta")

    @property
    def loaded_transformer(self) -> DiffusionTransformer:
        """An expert that is loaded anyway: they are all built alike."""
        loaded = [e.transformer for e in self.experts if e.transformer is not None]
        return loaded[0] if loaded else self.transformer(0)

    def ops(self) -> dict[str, list[str]]:
        """The backends that have served its transformer, by op of `sora_kernels`."""
        transformer = self.loaded_transformer
        return served_backends(transformer.backends, transformer.shape, self.device, self.dtype)

    def _fits(self, expert: Expert) -> bool:
        waits = self.offload == "blocks"
        free = free_bytes(torch.device("cpu") if waits else self.device)
        return expert.size_bytes < 0.8 * free
