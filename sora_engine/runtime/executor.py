"""Who does a worker's model work: this process's own model, or ranks that hold one together.

`Executor` is what a worker asks for; `LocalExecutor` does it here, and `distributed.executor` has
it done by ranks.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.canvas_state import CanvasState
from sora_engine.denoise.denoise import denoise_step, preparing
from sora_engine.denoise.packing import Packer
from sora_engine.models.adapter_store import AdapterStore
from sora_engine.models.video_model import VideoModel
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid, ResolvedRequest
from sora_engine.request.labels import Labels
from sora_engine.request.lora import LoraRecord
from sora_engine.runtime.saturation import saturation_point
from sora_engine.vae.decoding import decoding


class ScalesLatents(Protocol):
    """What an engine asks of a VAE beside its work."""

    def denormalise(self, latents: Tensor) -> Tensor: ...


class ServedModel(Protocol):
    """What an engine must know of its model, wherever the model is."""

    @property
    def name(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def weights_hash(self) -> str: ...
    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def dtype_name(self) -> str: ...
    @property
    def quantised(self) -> Mapping[str, str]: ...
    @property
    def lossy(self) -> Mapping[str, float]: ...
    @property
    def vae_dtype(self) -> torch.dtype: ...
    @property
    def vae(self) -> ScalesLatents: ...
    @property
    def grid(self) -> LatentGrid: ...
    @property
    def defaults(self) -> GenerationDefaults: ...
    @property
    def known_mode(self) -> KnownMode: ...
    @property
    def takes_camera(self) -> bool: ...
    @property
    def labels(self) -> Labels | None: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def loras(self) -> tuple[LoraRecord, ...]: ...
    @property
    def chosen(self) -> Mapping[str, str]:
        """Why settings that were "auto" have become what they have, by name."""
        ...

    def expert_at(self, timestep: float) -> int:
        """The index of the expert for this timestep."""
        ...


class ServedCanvas(Protocol):
    """What a worker must know of a canvas, wherever the canvas is.

    num_windows: of the next step, as far as they are this process's to pack.
    """

    @property
    def step(self) -> int: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def finished(self) -> bool: ...
    @property
    def timestep(self) -> float: ...
    @property
    def num_windows(self) -> int: ...
    @property
    def solver_name(self) -> str: ...
    @property
    def cut_prompts(self) -> tuple[str, ...]: ...
    @property
    def texts_reused(self) -> int: ...
    @property
    def preview(self) -> np.ndarray | None: ...
    @property
    def latents(self) -> Tensor: ...

    def keep_latents_alone(self) -> None:
        """Denoising is over: let go of all that only steps need."""
        ...


C = TypeVar("C", bound=ServedCanvas)


class Executor(Protocol[C]):
    """A model's work on canvases of its own. For one thread."""

    @property
    def model(self) -> ServedModel: ...

    @property
    def adapters(self) -> AdapterStore | None:
        """Those that requests may ask for; None where it takes none."""
        ...

    @property
    def vae_name(self) -> str:
        """The class that decodes."""
        ...

    def make_current(self) -> None:
        """Have the device of its work current in this thread: every thread begins at the first."""
        ...

    def preparing(self, request: ResolvedRequest) -> Generator[None, None, C]:
        """See `denoise.preparing`."""
        ...

    def resuming(self, request: ResolvedRequest, state: CanvasState) -> Generator[None, None, C]:
        """As `preparing`, of a job that was saved. Raises CheckpointError or ValueError."""
        ...

    def state_of(self, canvas: C) -> CanvasState:
        """What is saved of a canvas."""
        ...

    def step(self, canvases: Sequence[C], max_tokens: int) -> dict[int, Exception]:
        """See `denoise.denoise_step`."""
        ...

    def decoding(self, canvas: C, raw: Tensor) -> Iterator[Tensor | None]:
        """See `vae.decoding.decoding`. The canvas stays as it is: saved now, its job is resumed
        from what was denoised.

        raw: its latents as `Video.latents` keeps them, float32 on the host: what is decoded
        follows from them where that is possible, so that `sora decode` makes the same bits."""
        ...

    def tiles_used(self, height: int, width: int) -> dict[str, str]:
        """The tiles in which frames of this size (pixels) were coded, by side."""
        ...

    def pack_limit(self, limit: int) -> int:
        """Tokens a batch, at most `limit`, beyond which a larger one is no faster."""
        ...

    def ops(self) -> dict[str, list[str]]:
        """The backends that served, by op."""
        ...

    def forget(self, canvas: C) -> None:
        """A canvas is done with."""
        ...

    def clear(self) -> None:
        """Forget what depends on the composition of batches."""
        ...

    def close(self) -> None:
        """No job will come."""
        ...


AnyExecutor = Executor[Any]


class LocalExecutor:
    """`Executor` by this process's own model."""

    def __init__(self, model: VideoModel) -> None:
        self.model = model
        self._packer = Packer(model.grid.patch, model.device)

    @property
    def adapters(self) -> AdapterStore | None:
        return self.model.adapters

    @property
    def vae_name(self) -> str:
        return type(self.model.vae.coder).__name__

    def make_current(self) -> None:
        device = self.model.device
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)

    def preparing(self, request: ResolvedRequest) -> Generator[None, None, Canvas]:
        return preparing(request, self.model)

    def resuming(
        self, request: ResolvedRequest, state: CanvasState
    ) -> Generator[None, None, Canvas]:
        yield
        return state.restore(request, self.model)

    def state_of(self, canvas: Canvas) -> CanvasState:
        return CanvasState.of(canvas)

    def step(self, canvases: Sequence[Canvas], max_tokens: int) -> dict[int, Exception]:
        return denoise_step(canvases, self.model, self._packer, max_tokens)

    def decoding(self, canvas: Canvas, raw: Tensor) -> Iterator[Tensor | None]:
        model = self.model
        latents = model.vae.normalise(raw[None])[0].to(canvas.latents)
        return decoding(
            latents, model.vae, dtype=model.vae_dtype, device=model.device, wraps=canvas.wraps
        )

    def tiles_used(self, height: int, width: int) -> dict[str, str]:
        unit = self.model.grid.vae_spatial
        return self.model.vae.tiles_used(height // unit, width // unit)

    def pack_limit(self, limit: int) -> int:
        return saturation_point(self.model, limit)

    def ops(self) -> dict[str, list[str]]:
        return self.model.ops()

    def forget(self, canvas: Canvas) -> None:
        pass

    def clear(self) -> None:
        self._packer.clear()

    def close(self) -> None:
        pass
