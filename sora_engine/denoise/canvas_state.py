"""A canvas between two steps as plain tensors, and from there the same canvas again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sora_engine.denoise.canvas import Canvas, Known, lay_out_canvas
from sora_engine.denoise.conditioning import Embedding, Prompts
from sora_engine.denoise.denoise import prompts_of
from sora_engine.denoise.model import DiffusionModel
from sora_engine.errors import CheckpointError
from sora_engine.request import ResolvedRequest
from sora_engine.samplers import SolverState


@dataclass(frozen=True, slots=True, eq=False)
class CanvasState:
    """What a canvas is, beside its request.

    tensors: latents, initial noise, embeddings, known content and the solver's history, by name.
    frame_texts: as of `Prompts`.
    """

    tensors: Mapping[str, Tensor]
    frame_texts: tuple[int, ...]

    @classmethod
    def of(cls, canvas: Canvas) -> CanvasState:
        """The state of a canvas; its tensors are the canvas's own."""
        prompts = canvas.prompts
        tensors = {
            "latents": canvas.latents,
            "noise": canvas.noise,
            "step": torch.tensor(canvas.step),
            "windows_done": torch.tensor(canvas.windows_done),
            **{f"solver.{k}": v for k, v in canvas.solver_state.to_dict().items()},
        }
        for i, text in enumerate(prompts.texts):
            tensors |= {f"texts.{i}.{name}": tensor for name, tensor in text.items()}
        tensors |= {f"negative.{k}": v for k, v in (prompts.negative or {}).items()}
        optional = {"image": prompts.image, "guidance_memory": canvas.guidance_memory}
        if canvas.known is not None:
            for name in ("latents", "mask", "channels"):
                optional[f"known.{name}"] = getattr(canvas.known, name)
        tensors |= {name: tensor for name, tensor in optional.items() if tensor is not None}
        return cls(tensors, prompts.frame_texts)

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return int(self.tensors["step"])

    def restore(
        self, request: ResolvedRequest, model: DiffusionModel, path: Path | None = None
    ) -> Canvas:
        """The canvas, on the model's device; CheckpointError, which names `path`, for one that
        cannot be."""
        try:
            canvas = self._canvas(request, model)
            _check(canvas, request, model)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"is damaged as a saved job: {error!r}", path=path) from error
        return canvas

    def _canvas(self, request: ResolvedRequest, model: DiffusionModel) -> Canvas:
        here = {
            name: tensor if name == "solver.step" else tensor.to(model.device)
            for name, tensor in self.tensors.items()
        }

        def named(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in here.items() if k.startswith(prefix)}

        texts: dict[int, Embedding] = {}
        for name, tensor in named("texts.").items():
            i, _, source = name.partition(".")
            texts[int(i)] = {**texts.get(int(i), {}), source: tensor}
        content = named("known.")
        canvas = lay_out_canvas(
            request,
            model,
            latents=here["latents"],
            noise=here["noise"],
            prompts=Prompts(
                tuple(texts[i] for i in range(len(texts))),
                self.frame_texts,
                named("negative.") or None,
                here.get("image"),
                model.prompt_encoder.cut(prompts_of(request)),
            ),
            known=Known(model.known_mode, **content) if content else None,
        )
        return replace(
            canvas,
            solver_state=SolverState.from_dict(named("solver.")),
            guidance_memory=here.get("guidance_memory"),
            windows_done=int(self.tensors["windows_done"]),
        )


def _check(canvas: Canvas, request: ResolvedRequest, model: DiffusionModel) -> None:
    shape = request.latent_shape(model.grid)
    for name, tensor in (("latents", canvas.latents), ("noise", canvas.noise)):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
    if not 0 <= canvas.step <= canvas.num_steps:
        raise ValueError(f"step {canvas.step} of {canvas.num_steps}")
