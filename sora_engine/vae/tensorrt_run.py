"""Exported graphs built into TensorRT engines and run on torch's stream, on torch's memory.

Written against the documented Python API of TensorRT 10 (strongly typed networks, explicit tensor
addresses, `execute_async_v3`). Engines are built ahead of time by `build_engines`, never while a
request waits.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import BackendError
from sora_engine.vae.graphs import GraphCoder, GraphSet, GraphSpec

INSTALL = 'pip install "sora_engine[tensorrt]"'
_BUILD = "sora export-vae MODEL --backend tensorrt --dtype {dtype} --sizes HEIGHTxWIDTH,..."
_WORKSPACE = 4 << 30


@dataclass(frozen=True)
class SizeRange:
    """Latent heights and widths that one profile serves, tuned for the best of them."""

    least: tuple[int, int]
    best: tuple[int, int]
    most: tuple[int, int]

    def holds(self, height: int, width: int) -> bool:
        return self.least[0] <= height <= self.most[0] and self.least[1] <= width <= self.most[1]


def profiles(sizes: Sequence[tuple[int, int]]) -> tuple[SizeRange, ...]:
    """A profile of its own for every latent size, so that each runs with kernels picked for it, and
    where there are several, one more for all sizes between them."""
    exact = tuple(SizeRange(size, size, size) for size in dict.fromkeys(sizes))
    if not exact:
        raise ValueError("an engine needs at least one size")
    if len(exact) == 1:
        return exact
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    largest = max(sizes, key=lambda size: size[0] * size[1])
    least, most = (min(heights), min(widths)), (max(heights), max(widths))
    return (*exact, SizeRange(least, largest, most))


def pick_profile(ranges: Sequence[SizeRange], height: int, width: int) -> int | None:
    """The first profile that holds a size: exact ones come first. None if there is none."""
    for index, sizes in enumerate(ranges):
        if sizes.holds(height, width):
            return index
    return None


def private_folder(folder: str | Path) -> Path:
    """`folder`, made if need be, after a check that nobody else can write to it: an engine file is
    as good as code. Raises BackendError."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found = folder.stat()
    if hasattr(os, "getuid") and found.st_uid != os.getuid():
        raise BackendError(f"{folder}: belongs to another user; engines are not loaded from there")
    if hasattr(os, "getuid") and stat.S_IMODE(found.st_mode) & 0o022:  # Windows has no such bits
        raise BackendError(
            f"{folder}: others can write to it, so engines are not loaded from there; "
            f"chmod 700 {folder}"
        )
    return folder


def engine_key(path: Path, gpu: str, version: str) -> str:
    """What an engine depends on beside its sizes: the graph and its weights, the GPU, TensorRT."""
    digest = hashlib.sha256(repr((gpu, version)).encode())
    for file in (path, path.with_name(path.name + ".data")):
        if file.exists():
            with file.open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def write_private(path: Path, data: Any) -> None:
    """Write a file that only its owner can read or write, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_ranges(engine: Path, ranges: Sequence[SizeRange]) -> None:
    """Keep the sizes of an engine in a file beside it."""
    text = json.dumps([asdict(sizes) for sizes in ranges])
    write_private(engine.with_suffix(".json"), text.encode())


def read_ranges(engine: Path) -> tuple[SizeRange, ...]:
    """The sizes that `write_ranges` kept; none where the file is missing or damaged."""
    try:
        values = json.loads(engine.with_suffix(".json").read_text(encoding="utf-8"))
        return tuple(
            SizeRange(*((int(v[end][0]), int(v[end][1])) for end in ("least", "best", "most")))
            for v in values
        )
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def require_tensorrt() -> Any:
    """The tensorrt module; BackendError with the install line where there is none."""
    try:
        import tensorrt
    except ImportError as error:
        raise BackendError(f"vae_backend 'tensorrt' needs TensorRT: {INSTALL}") from error
    return tensorrt


def missing(what: str, dtype: torch.dtype) -> BackendError:
    """The error for an engine that is not there, with the command that builds it."""
    build = _BUILD.format(dtype=str(dtype).removeprefix("torch."))
    return BackendError(f"no TensorRT engine for {what} in {dtype}; build it first: {build}")


def _gpu(device: torch.device) -> str:
    if device.type != "cuda" or not torch.cuda.is_available():
        raise BackendError(f"vae_backend 'tensorrt' runs on NVIDIA GPUs, not on {device}")
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} sm_{major}{minor}"


def build_engines(
    graphs: GraphSet,
    cache: str | Path,
    sizes: Sequence[tuple[int, int]],
    *,
    device: str | torch.device = "cuda",
    sides: Sequence[str] = ("decoder", "encoder"),
) -> list[Path]:
    """Build the engines of `graphs` for these latent sizes `(h, w)`; those in the cache stay.

    Takes minutes a graph. Precision is the graphs' own (fp32, fp16 or bf16): networks are strongly
    typed.
    """
    trt = require_tensorrt()
    device = torch.device(device)
    gpu = _gpu(device)
    cache = private_folder(cache)
    ranges = profiles(sizes)
    built = []
    with torch.cuda.device(device):
        for name, spec in graphs.graphs.items():
            if name.split("_")[0] not in sides:
                continue
            path = graphs.folder / spec.file
            target = cache / f"{engine_key(path, gpu, trt.__version__)}.engine"
            if not target.exists() or read_ranges(target) != ranges:
                timing = cache / f"timing-{trt.__version__}.cache"
                plan = _build(trt, path, spec, ranges, timing)
                target.unlink(missing_ok=True)  # never an engine beside another one's sizes
                write_ranges(target, ranges)
                write_private(target, plan)
            built.append(target)
    return built


def _build(
    trt: Any, path: Path, spec: GraphSpec, ranges: Sequence[SizeRange], timing: Path
) -> bytes:
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(path)):
        problems = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise BackendError(f"{path}: TensorRT cannot parse it: {problems}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, _WORKSPACE)
    known = timing.read_bytes() if timing.exists() else b""
    config.set_timing_cache(config.create_timing_cache(known), ignore_mismatch=False)
    for sizes in ranges:
        profile = builder.create_optimization_profile()
        for tensor in spec.inputs:
            shapes = (tensor.shape(*size) for size in (sizes.least, sizes.best, sizes.most))
            profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BackendError(f"{path}: TensorRT could not build an engine; its log says why")
    write_private(timing, bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


class TensorRTVAE(GraphCoder):
    """A `VideoCoder` on the engines that `build_engines` made from the graphs in `folder`."""

    def __init__(
        self, folder: str | Path, cache: str | Path, *, device: str | torch.device = "cuda"
    ):
        self._trt = require_tensorrt()
        device = torch.device(device)
        self._gpu_name = _gpu(device)
        super().__init__(GraphSet.load(folder), device)
        self._cache = private_folder(cache)
        self._ranges: dict[str, tuple[SizeRange, ...]] = {}
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.WARNING))
        self._engines: dict[str, Any] = {}
        self._contexts: dict[tuple[str, int], Any] = {}
        self._scratch: Tensor | None = None

    def _engine(self, name: str) -> Any:
        if name not in self._engines:
            path = self.graphs.folder / self.graphs.graphs[name].file
            key = engine_key(path, self._gpu_name, self._trt.__version__)
            file = self._cache / f"{key}.engine"
            ranges = read_ranges(file)
            if not file.exists() or not ranges:
                raise missing(
                    f"{path.name} on {self._gpu_name} with version {self._trt.__version__}",
                    self.graphs.dtype,
                )
            engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
            if engine is None:
                raise BackendError(f"{file}: TensorRT cannot load it; delete it and build it again")
            self._engines[name], self._ranges[name] = engine, ranges
        return self._engines[name]

    def _context(self, name: str, profile: int, stream: int) -> Any:
        """A context without memory of its own: all take turns on one scratch tensor of torch's."""
        engine = self._engine(name)
        if (name, profile) not in self._contexts:
            strategy = self._trt.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(strategy)
            if not context.set_optimization_profile_async(profile, stream):
                raise BackendError(f"TensorRT refuses optimisation profile {profile} of {name}")
            self._contexts[name, profile] = context
        need = int(engine.device_memory_size_v2)
        if self._scratch is None or self._scratch.nbytes < need:
            self._scratch = torch.empty(need, dtype=torch.uint8, device=self.device)
        context = self._contexts[name, profile]
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.nbytes)
        return context

    def run_graph(self, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """See `GraphCoder.run_graph`. Returns when the work is queued on torch's current stream."""
        spec = self.graphs.graphs[name].inputs[0]
        piece = inputs[spec.name]
        height, width = piece.shape[3] // spec.scale, piece.shape[4] // spec.scale
        self._engine(name)
        profile = pick_profile(self._ranges[name], height, width)
        if profile is None:
            known = ", ".join(f"{r.best[0]}x{r.best[1]}" for r in self._ranges[name])
            raise missing(f"{height}x{width} latents (there are {known})", self.graphs.dtype)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device).cuda_stream
            context = self._context(name, profile, stream)
            for key, tensor in inputs.items():
                context.set_input_shape(key, tuple(tensor.shape))
            for key, tensor in (inputs | outputs).items():
                context.set_tensor_address(key, tensor.data_ptr())
            if not context.execute_async_v3(stream):
                raise BackendError(f"TensorRT could not run {name} at {height}x{width} latents")
