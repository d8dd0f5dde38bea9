"""`sora doctor`: what the engine finds on this machine."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from sora_engine.cli.app import OnceCommand, app, say
from sora_engine.io.memory_limits import left_under_limits
from sora_engine.io.system import total_memory_bytes, usable_cores

OPTIONAL_PACKAGES = {
    "onnx": "VAE export",
    "onnxscript": "VAE export",
    "onnxruntime": "VAE decoding with vae_backend='onnx'",
    "tensorrt": "VAE decoding with vae_backend='tensorrt'",
    "c2pa-python": "--sign and sora verify",
}


@app.command(cls=OnceCommand)
def doctor() -> None:
    """Print what was found: CPU, GPU, torch, Triton, csrc, FFmpeg, optional packages."""
    for name, finding in report():
        say(f"{name:<18} {finding}")


def report() -> Iterator[tuple[str, str]]:
    """(name, finding) line by line; a part that cannot be asked says why and never raises."""
    for name, ask in _PARTS.items():
        try:
            yield name, ask()
        except Exception as error:  # a broken installation is what one calls a doctor for
            yield name, f"cannot be asked: {type(error).__name__}: {error}"
    for package, use in OPTIONAL_PACKAGES.items():
        yield package, _version(package) or f"not installed ({use})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _engine() -> str:
    from sora_engine.version import version

    return f"{version()} in {Path(__file__).parents[1]}"


def _python() -> str:
    return f"{platform.python_version()} on {platform.platform()} ({sys.executable})"


def _cpu() -> str:
    flags: set[str] = set()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            match key.strip():
                case "model name":
                    model = value.strip()
                case "flags" | "Features":
                    flags = set(value.split())
        has = {
            "AVX2": "avx2" in flags,
            "AVX-512": "avx512f" in flags,
            "bf16": bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}),
            "AMX": "amx_tile" in flags,
        }
        features = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in has.items())
    else:
        features = "instruction sets unknown here"
    return f"{model}, {usable_cores()} of {os.cpu_count()} cores, {features}"


def _memory() -> str:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        total = total_memory_bytes()
        return "unknown here" if total is None else f"{total / 2**30:.1f} GiB"
    kib = {line.split(":")[0]: int(line.split()[1]) for line in meminfo.read_text().splitlines()}
    text = f"{kib['MemTotal'] / 2**20:.1f} GiB, {kib['MemAvailable'] / 2**20:.1f} GiB available"
    left = left_under_limits()
    return text if left is None else f"{text}; limits leave {left / 2**30:.1f} GiB of it here"


def _gpu() -> str:
    import torch

    if torch.cuda.is_available():
        found = []
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            found.append(
                f"{card.name}, sm_{card.major}{card.minor}, {card.total_memory / 2**30:.0f} GiB"
            )
        return "; ".join(found)
    if torch.backends.mps.is_available():
        return "Apple MPS (the engine does not use it)"
    why = "torch is a CPU build" if torch.version.cuda is None else "no CUDA device or driver"
    return f"none ({why}); the engine runs on the CPU"


def _torch() -> str:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{torch.__version__}, {cuda}, {capability} kernels, {torch.get_num_threads()} threads"


def _triton() -> str:
    found = _version("triton")
    if found is None:
        return "not installed; Triton backends are left out"
    import torch

    if torch.cuda.is_available():
        return found
    if os.environ.get("TRITON_INTERPRET") == "1":
        return f"{found}, interpreting (TRITON_INTERPRET=1)"
    return f"{found}, unused without a GPU (TRITON_INTERPRET=1 interprets)"


def _csrc() -> str:
    if importlib.util.find_spec("sora_kernels.csrc") is None:
        return "not in this installation"
    csrc = importlib.import_module("sora_kernels.csrc")
    why = csrc.problem()
    if why is None:
        cuda = "with" if csrc.has_cuda() else "without"
        threads = csrc.num_threads()
        plural = "" if threads == 1 else "s"
        return (
            f"built, running its {csrc.instruction_set()} kernels on {threads} thread{plural}; "
            f"{cuda} CUDA kernels"
        )
    return f"not in use: {why}"


def _speed() -> str:
    from sora_engine.models.machine import machine_rates

    rates = machine_rates()
    assert rates is not None
    return str(rates)


def _ffmpeg() -> str:
    import av

    libraries = (f"{name} {'.'.join(map(str, v))}" for name, v in av.library_versions.items())
    encoder = "libx264" in av.codecs_available
    note = "" if encoder else "; without libx264, so no .mp4 can be written"
    return f"PyAV {av.__version__}: {', '.join(libraries)}{note}"


def _transformers() -> str:
    return _version("transformers") or "not installed; text cannot be encoded"


def _bundled(name: str) -> str:
    folder = Path(__file__).parents[1] / "checkpoints" / name
    files = [p for p in folder.rglob("*.safetensors") if p.is_file()]
    if not files:
        return "not in this installation; name a checkpoint with --model"
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    return f"{size / 2**20:.1f} MiB in {folder}"


_PARTS: dict[str, Callable[[], str]] = {
    "sora_engine": _engine,
    "Python": _python,
    "CPU": _cpu,
    "memory": _memory,
    "GPU": _gpu,
    "torch": _torch,
    "Triton": _triton,
    "csrc": _csrc,
    "speed of a core": _speed,
    "FFmpeg": _ffmpeg,
    "transformers": _transformers,
    "sprites": functools.partial(_bundled, "sprites"),
    "meadow": functools.partial(_bundled, "meadow"),
}
