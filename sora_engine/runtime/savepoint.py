"""A job between two steps, in a file: taken up in another process it ends in the same video.

One safetensors file. Its tensors are the canvas: latents, initial noise, text embeddings, known
content and the solver's history. Its metadata is one JSON text: the request, and the model's hash.
Fresh noise of later steps needs no state, being a function of seed and step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from sora_engine.denoise.canvas import Canvas, Known, Prompts
from sora_engine.denoise.denoise import guidances_of, num_links, solver_of, window_plan
from sora_engine.denoise.guidance import Guidance
from sora_engine.denoise.windows import SparsePlan, WindowPlan
from sora_engine.errors import CheckpointError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.provenance import Provenance
from sora_engine.models.video_model import VideoModel
from sora_engine.request.request import ResolvedRequest, Shot
from sora_engine.samplers import SolverState

FORMAT = 2
_PLAIN = (
    "prompt",
    "negative_prompt",
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "guidance_scale_2",
    "shift",
    "solver",
    "seed",
    "strength",
    "loop",
    "original_prompt",
    "resample",
)


@dataclass(frozen=True, slots=True, eq=False)
class Savepoint:
    """What a file holds: its metadata and its tensors, on the host."""

    told: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    path: Path | None = None

    @property
    def request(self) -> ResolvedRequest:
        return _request_of(self.told, self.tensors)

    @property
    def provenance(self) -> Provenance | None:
        return Provenance.from_json(self.told["provenance"])

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return int(self.tensors["step"])

    def canvas(self, model: VideoModel) -> Canvas:
        """The canvas, on the model's device; CheckpointError for one that cannot be."""
        try:
            canvas = _canvas_of(self.request, self.told, self.tensors, model)
            _check(canvas, self.request, model)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"is damaged as a saved job: {error!r}", path=self.path
            ) from error
        return canvas


def tensors_of(canvas: Canvas) -> dict[str, Tensor]:
    """What of a canvas is saved."""
    tensors = {
        "latents": canvas.latents,
        "noise": canvas.noise,
        "step": torch.tensor(canvas.step),
        "link": torch.tensor(canvas.link),
        **{f"texts.{i}": text for i, text in enumerate(canvas.prompts.texts)},
        **{f"solver.{k}": v for k, v in canvas.solver_state.to_dict().items()},
    }
    optional = {
        "negative": canvas.prompts.negative,
        "image": canvas.prompts.image,
        "guidance_memory": canvas.guidance_memory,
    }
    if canvas.known is not None:
        for name in ("latents", "mask", "channels"):
            optional[f"known.{name}"] = getattr(canvas.known, name)
    return tensors | {name: tensor for name, tensor in optional.items() if tensor is not None}


def save_state(
    path: Path,
    request: ResolvedRequest,
    tensors: Mapping[str, Tensor],
    frame_texts: Sequence[int],
    model: VideoModel,
    provenance: Provenance,
) -> None:
    """Write a job's state whole or not at all; raises OSError.

    tensors: `tensors_of` its canvas; frame_texts: of its prompts.
    """
    told = {
        "format": FORMAT,
        "request": {
            **{name: getattr(request, name) for name in _PLAIN},
            "sigmas": request.sigmas,
            "shots": [asdict(shot) for shot in request.shots],
            "guidance": asdict(request.guidance),
            "window": None if request.window is None else asdict(request.window),
            "sparse": isinstance(request.window, SparsePlan),
        },
        "noise_given": request.latents is not None,
        "frame_texts": list(frame_texts),
        "model": model.weights_hash,
        "dtype": str(model.dtype),
        "provenance": provenance.to_json(),
    }
    # Copies: some tensors share storage, which the format does not allow.
    content = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, save(content, {"sora_engine": json.dumps(told)}))


def load_state(path: Path, model: VideoModel) -> Savepoint:
    """Read `save_state`'s file; CheckpointError for any other, or another model's."""
    try:
        with safe_open(path, "pt") as file:
            told = json.loads((file.metadata() or {}).get("sora_engine", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"cannot be read as a saved job: {error}", path=path) from error
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise CheckpointError("this is no saved job of this version", path=path)
    if told["model"] != model.weights_hash:
        raise CheckpointError(
            f"the job was saved from another model: weights {told['model'][:12]}, these are "
            f"{model.weights_hash[:12]}",
            path=path,
        )
    if told["dtype"] != str(model.dtype):
        raise CheckpointError(
            f"the job was saved with dtype {told['dtype']}, this engine has {model.dtype}",
            path=path,
        )
    saved = Savepoint(told, tensors, path)
    try:
        most = saved.request.num_inference_steps * num_links(saved.request, model)
        if saved.provenance is None or most < saved.step:
            raise ValueError(f"{saved.step} steps of {most}")
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"is damaged as a saved job: {error!r}", path=path) from error
    return saved


def _request_of(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ResolvedRequest:
    plain = told["request"]
    plan = SparsePlan if plain["sparse"] else WindowPlan
    return ResolvedRequest(
        **{name: plain[name] for name in _PLAIN},
        sigmas=None if plain["sigmas"] is None else tuple(plain["sigmas"]),
        shots=tuple(Shot(**shot) for shot in plain["shots"]),
        guidance=Guidance(**plain["guidance"]),
        window=None if plain["window"] is None else plan(**plain["window"]),
        clips=(),
        init=None,
        latents=tensors["noise"] if told["noise_given"] else None,
    )


def _canvas_of(
    request: ResolvedRequest,
    told: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    model: VideoModel,
) -> Canvas:
    def get(name: str) -> Tensor | None:
        return tensors[name].to(model.device) if name in tensors else None

    def named(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    solver = solver_of(request, model)
    state = {k: v if k == "step" else v.to(model.device) for k, v in named("solver.").items()}
    texts = named("texts.")
    known = None
    if named("known."):
        known = Known(model.known_mode, get("known.latents"), get("known.mask"))
        if "known.channels" in tensors:
            known = Known(model.known_mode, channels=get("known.channels"))
    return Canvas(
        latents=tensors["latents"].to(model.device),
        noise=tensors["noise"].to(model.device),
        solver=solver,
        prompts=Prompts(
            tuple(texts[str(i)].to(model.device) for i in range(len(texts))),
            tuple(told["frame_texts"]),
            get("negative"),
            get("image"),
        ),
        guidances=guidances_of(request, model),
        patch_size=model.grid.patch,
        known=known,
        wraps=request.loop,
        window_plan=window_plan(request, model, tensors["latents"].shape[1]),
        seed=request.seed,
        resample=request.resample,
        solver_state=SolverState.from_dict(state),
        guidance_memory=get("guidance_memory"),
        link=int(tensors["link"]),
    )


def _check(canvas: Canvas, request: ResolvedRequest, model: VideoModel) -> None:
    shape = model.grid.shape(request.height, request.width, request.num_frames, loop=request.loop)
    for name, tensor in (("latents", canvas.latents), ("noise", canvas.noise)):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
            raise ValueError(f"{name} are {tensor.dtype} {list(tensor.shape)}, not {list(shape)}")
    if not 0 <= canvas.step <= canvas.num_steps:
        raise ValueError(f"step {canvas.step} of {canvas.num_steps}")
