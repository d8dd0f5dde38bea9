"""The autoencoder as ONNX graphs with dynamic height and width."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from sora_engine.errors import BackendError
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.graphs import GraphSet, GraphSpec, TensorSpec
from sora_engine.vae.shapes import look_ahead
from sora_engine.vae.state import VAEState

INSTALL = 'pip install "sora_engine[onnx]"'
# What the exporter writes by itself, and the first opset whose convolutions take bf16.
_OPSETS = {torch.float32: 18, torch.float16: 18, torch.bfloat16: 22}
# Latents of one side for which the graphs are declared; 512 of them are 4096 pixels at 8x.
_LEAST, _MOST = 2, 512
_EXAMPLE = (3, 4)


class _Step(nn.Module):
    """One call of the decoder or encoder with the caches as plain inputs and outputs."""

    def __init__(self, vae: CausalVAE, side: str, holes: list[bool], done: int):
        super().__init__()
        self.vae, self.side, self.holes, self.done = vae, side, holes, done

    def forward(self, x: Tensor, caches: list[Tensor]) -> tuple[Tensor, ...]:
        state = None
        if self.done:
            given = iter(caches)
            filled = tuple(None if hole else next(given) for hole in self.holes)
            state = VAEState(filled, self.done)
        run = self.vae.decode_chunk if self.side == "decoder" else self.vae.encode_chunk
        out, new = run(x, state)
        return (out, *(cache for cache in new.caches if cache is not None))


def export_onnx(
    vae: CausalVAE, folder: str | Path, *, dtype: torch.dtype = torch.float32
) -> GraphSet:
    """Write the graphs of `vae` (a copy of it at `dtype`: fp32, fp16 or bf16) into `folder`.

    Returns the set; `GraphSet.load` finds it again. Raises BackendError where onnx and onnxscript
    are not installed.
    """
    if look_ahead(vae.config):
        raise BackendError(
            f"{vae.config.class_name} is not exported to ONNX, as its decoder looks ahead; "
            "vae_backend 'torch' would work"
        )
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise BackendError(f"exporting to ONNX needs onnx and onnxscript: {INSTALL}") from error
    if dtype not in _OPSETS:
        raise BackendError(f"ONNX graphs are float32, float16 or bfloat16, not {dtype}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    copy = type(vae)(vae.config).eval().requires_grad_(False)
    copy.load_state_dict(vae.state_dict())
    # Plain weights, cut and folded before tracing: every convolution reads a constant.
    copy = copy.to("cpu", dtype).prepare(onednn=False)
    graphs: dict[str, GraphSpec] = {}
    for side in ("decoder", "encoder"):
        graphs |= _export_side(copy, side, folder)
    result = GraphSet(folder, vae.config, dtype, graphs)
    result.save()
    return result


def _export_side(vae: CausalVAE, side: str, folder: Path) -> dict[str, GraphSpec]:
    dtype = next(vae.parameters()).dtype
    factor, later = vae.scale_factor_spatial, vae.scale_factor_temporal
    height, width = _EXAMPLE
    if side == "decoder":
        shape, frames = (1, vae.z_dim, 1, height, width), [1, 1, 1]
    else:
        channels = vae.config.pixel_channels
        shape, frames = (1, channels, 1, height * factor, width * factor), [1, later, later]
    run = vae.decode_chunk if side == "decoder" else vae.encode_chunk
    names = ["first", "second", "steady"]
    state: VAEState | None = None
    graphs: dict[str, GraphSpec] = {}
    with torch.no_grad():
        for name, count in zip(names, frames, strict=True):
            x = torch.zeros(*shape[:2], count, *shape[3:], dtype=dtype)
            out, new = run(x, state)  # lays out the weights too, before anything is traced
            holes = [] if state is None else [cache is None for cache in state.caches]
            before = [] if state is None else [c for c in state.caches if c is not None]
            after = [c for c in new.caches if c is not None]
            if not (name == "second" and not any(holes)):
                spec = GraphSpec(
                    file=f"{side}_{name}.onnx",
                    inputs=_specs("latents" if side == "decoder" else "frames", x, "past", before),
                    outputs=_specs(
                        "frames" if side == "decoder" else "latents", out, "next", after
                    ),
                )
                step = _Step(vae, side, holes, 0 if state is None else state.latent_frames)
                _export_graph(step, x, before, spec, folder)
                graphs[f"{side}_{name}"] = spec
            state = new
    return graphs


def _specs(name: str, x: Tensor, prefix: str, caches: list[Tensor]) -> tuple[TensorSpec, ...]:
    def spec(name: str, tensor: Tensor) -> TensorSpec:
        assert tensor.shape[3] % _EXAMPLE[0] == 0
        return TensorSpec(name, tensor.shape[1], tensor.shape[2], tensor.shape[3] // _EXAMPLE[0])

    return (spec(name, x), *(spec(f"{prefix}_{i:02d}", c) for i, c in enumerate(caches)))


def _export_graph(
    step: _Step, x: Tensor, caches: list[Tensor], spec: GraphSpec, folder: Path
) -> None:
    height, width = Dim("h", min=_LEAST, max=_MOST), Dim("w", min=_LEAST, max=_MOST)

    def sizes(tensor: TensorSpec) -> dict[int, Any]:
        if tensor.scale == 1:
            return {3: height, 4: width}
        return {3: tensor.scale * height, 4: tensor.scale * width}

    shapes = (sizes(spec.inputs[0]), [sizes(tensor) for tensor in spec.inputs[1:]])
    with _quiet():
        program = torch.onnx.export(
            step,
            (x, [cache.contiguous() for cache in caches]),
            dynamo=True,
            opset_version=_OPSETS[x.dtype],
            dynamic_shapes=shapes,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    assert program is not None
    # Above protobuf's 2 GiB the weights go into a file beside the graph.
    weights = sum(parameter.nbytes for parameter in step.vae.parameters())
    program.save(str(folder / spec.file), external_data=weights > 1 << 30)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about opsets it then converts well."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
