"""Which backend codes the video: `vae_backend` of the engine, and `sora export-vae`."""

from __future__ import annotations

import atexit
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sora_engine.errors import BackendError, RequestError
from sora_engine.io.cache import cache_folder
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.coder import VideoCoder
from sora_engine.vae.cuda_graph import graphed
from sora_engine.vae.graphs import SPEC_FILE, GraphSet
from sora_engine.vae.tiny_coder import TinyDecoder

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "torch", "onnx", "tensorrt", "tiny")


def open_coder(
    backend: str,
    vae: CausalVAE,
    *,
    device: str | torch.device,
    dtype: torch.dtype = torch.float32,
    cuda_graphs: str = "auto",
    by_time: bool = True,
    tiny: CausalVAE | None = None,
    cache: str | Path | None = None,
) -> VideoCoder[Any]:
    """The backend of that name for `vae`, ready to code on `device`.

    "auto" and "torch" give `vae` itself, on a GPU with its steady steps as CUDA graphs (see
    `vae.cuda_graph`; `cuda_graphs` is auto, on or off, and `by_time` says how cuDNN's algorithms
    are picked). "tiny" decodes with `tiny`, and encodes with `vae`. The others want `vae` in
    float32. "onnx" exports it, once, into the cache (`$XDG_CACHE_HOME/sora_engine/vae` by
    default); where there can be no cache, into a temporary folder that goes with the process.
    "tensorrt" takes engines of `dtype` that `export_vae` has built and builds none. Raises
    BackendError.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise BackendError(f"vae_backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    if backend in ("auto", "torch"):
        return graphed(vae, cuda_graphs, device, by_time=by_time)
    if backend == "tiny":
        if tiny is None:
            raise BackendError("vae_backend 'tiny' needs a tiny autoencoder")
        both = [graphed(each, cuda_graphs, device, by_time=by_time) for each in (vae, tiny)]
        return TinyDecoder(*both)
    if cuda_graphs == "on":
        raise BackendError(f"CUDA graphs are of vae_backend 'torch', not of {backend!r}")
    place = Path(cache) if cache is not None else cache_folder("vae")
    if backend == "onnx":
        from sora_engine.vae.onnx_run import OnnxVAE

        return OnnxVAE(_graphs_of(vae, place), device)
    from sora_engine.vae.tensorrt_run import TensorRTVAE, missing, require_tensorrt

    require_tensorrt()
    if place is None:
        raise BackendError(
            "vae_backend 'tensorrt' looks for its engines in a cache, and this user has no home to "
            "have one in; an absolute XDG_CACHE_HOME names another place"
        )
    folder = place / _key(vae, dtype)
    if not _is_file(folder / SPEC_FILE):
        raise missing("this VAE", dtype)
    return TensorRTVAE(folder, folder / "engines", device=device)


def export_vae(
    vae: CausalVAE,
    backend: str,
    output: str | Path | None = None,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cuda",
) -> Path:
    """Export `vae` (in float32) to ONNX graphs of `dtype` in `output`; for "tensorrt" build engines
    from them too, in its subfolder `engines`, for the pixel `sizes` (height, width).

    Without `output` it all goes into the cache, where `open_coder` finds it. Returns the folder.
    Raises BackendError where it cannot be written.
    """
    if backend not in ("onnx", "tensorrt"):
        raise BackendError(f"a VAE is exported to onnx or tensorrt, not to {backend!r}")
    latents = latent_sizes(vae, sizes)
    if backend == "tensorrt":
        from sora_engine.vae.tensorrt_run import build_engines, require_tensorrt

        require_tensorrt()
        if not latents:
            raise BackendError("TensorRT engines are built for sizes: --sizes 480x832,720x1280")
    place = cache_folder("vae") if output is None else Path(output)
    if place is None:
        raise BackendError("this user has no home for a cache; --output names a folder")
    try:
        if output is None:
            folder = _export_once(vae, place / _key(vae, dtype), dtype)
        else:
            from sora_engine.vae.onnx_export import export_onnx

            folder = export_onnx(vae, output, dtype=dtype).folder
        if backend == "tensorrt":
            build_engines(GraphSet.load(folder), folder / "engines", latents, device=device)
    except OSError as error:
        raise BackendError(
            f"{place} cannot be written ({error.strerror or error}); --output names another folder"
        ) from error
    return folder


def latent_sizes(vae: CausalVAE, sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Pixel sizes in latents; RequestError for one that does not divide."""
    factor = vae.scale_factor_spatial
    for height, width in sizes:
        if height % factor or width % factor or min(height, width) < factor:
            near = [max(round(side / factor), 1) * factor for side in (height, width)]
            raise RequestError(
                f"{height}x{width} does not divide into latents of {factor} pixels; "
                f"{near[0]}x{near[1]} does"
            )
    return [(height // factor, width // factor) for height, width in sizes]


def _graphs_of(vae: CausalVAE, place: Path | None) -> Path:
    """The exported graphs, in the cache or, where none can be, in a folder of this process."""
    name, why = _key(vae, torch.float32), "there is no home folder"
    if place is not None:
        try:
            return _export_once(vae, place / name, torch.float32)
        except OSError as error:
            why = f"{place}: {error.strerror or error}"
    try:
        temporary = Path(tempfile.mkdtemp(prefix="sora_engine-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        logger.warning("the VAE is exported anew by every process, as it cannot be kept: %s", why)
        return _export_once(vae, temporary / name, torch.float32)
    except OSError as error:
        raise BackendError(
            f"vae_backend 'onnx' has nowhere to export to: {why}, and no temporary folder either "
            f"({error.strerror or error}); an absolute XDG_CACHE_HOME or TMPDIR names a place"
        ) from error


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder on the way is not ours to look into
        return False


def _export_once(vae: CausalVAE, folder: Path, dtype: torch.dtype) -> Path:
    """Export unless it has been done. Whole or not at all: another process may be at it too."""
    if _is_file(folder / SPEC_FILE):
        return folder
    from sora_engine.vae.onnx_export import export_onnx

    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="export-") as scratch:
        ready = Path(scratch) / "graphs"
        export_onnx(vae, ready, dtype=dtype)
        try:
            ready.rename(folder)
        except OSError:
            if not (folder / SPEC_FILE).is_file():
                raise
    return folder


def _key(vae: CausalVAE, dtype: torch.dtype) -> str:
    """A name for the graphs of this autoencoder with these weights."""
    digest = hashlib.sha256(json.dumps(vae.config.to_dict(), sort_keys=True).encode())
    digest.update(str(dtype).encode())
    for name, tensor in vae.state_dict().items():
        flat = tensor.detach().float().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode())
        digest.update(flat.numpy().data)
    return digest.hexdigest()[:32]
