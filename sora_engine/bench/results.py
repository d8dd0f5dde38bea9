"""What a benchmark found, as a file: machine, versions, commit, samples, medians, paired ratios."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sora_engine.errors import SoraError
from sora_engine.io.system import total_memory_bytes
from sora_engine.version import version

FORMAT = 1
SUBJECT = "sora"
"""The rival that a benchmark is about; ratios say how many times better it is than another."""

PACKAGES = ("torch", "triton", "diffusers", "transformers", "numpy", "onnxruntime", "flash-attn")


class ResultError(SoraError, ValueError):
    """A file is not a benchmark's result, or two results have nothing in common."""


def counted(count: int, noun: str) -> str:
    """'1 thread', '2 threads'."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


@dataclass(frozen=True, slots=True)
class Spread:
    """A median, and the quantiles 20% and 80% around it."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        if len(samples) < 2:
            return cls(samples[0], samples[0], samples[0], len(samples))
        fifths = statistics.quantiles(samples, n=5, method="inclusive")
        return cls(statistics.median(samples), fifths[0], fifths[-1], len(samples))


@dataclass(frozen=True, slots=True)
class Measurement:
    """One quantity of one or several rivals.

    name: `group/what`, the same from run to run: results are compared by it.
    samples: by rival. Where `paired`, entry i of all rivals was taken side by side.
    better: whether `lower` or `higher` values are.
    figures: what else is worth knowing (FLOP rates, differences, sizes).
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    better: str = "lower"
    paired: bool = True
    figures: Mapping[str, float | str] = field(default_factory=dict)

    def spread(self, rival: str) -> Spread:
        return Spread.of(self.samples[rival])

    @property
    def rivals(self) -> list[str]:
        """All but the subject."""
        return [name for name in self.samples if name != SUBJECT]

    def ratios(self, rival: str) -> list[float]:
        """How many times better the subject is than `rival`: round by round, or of the medians."""
        ours, theirs = self.samples[SUBJECT], self.samples[rival]
        if not self.paired:
            ours, theirs = [self.spread(SUBJECT).median], [self.spread(rival).median]
        pairs = zip(ours, theirs, strict=True)
        if self.better == "lower":
            return [theirs / ours for ours, theirs in pairs]
        return [ours / theirs for ours, theirs in pairs]

    def to_dict(self) -> dict[str, Any]:
        """With the medians and ratios that follow from the samples, for other readers."""
        has_subject = SUBJECT in self.samples
        return {
            "name": self.name,
            "unit": self.unit,
            "better": self.better,
            "paired": self.paired,
            "samples": {k: [float(f"{x:.6g}") for x in v] for k, v in self.samples.items()},
            "median": {name: asdict(self.spread(name)) for name in self.samples},
            "times_better": {
                rival: asdict(Spread.of(self.ratios(rival)))
                for rival in (self.rivals if has_subject else [])
            },
            "figures": dict(self.figures),
        }

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> Measurement:
        keys = ("name", "unit", "samples", "better", "paired", "figures")
        found = cls(**{key: saved[key] for key in keys})
        lengths = {len(values) for values in found.samples.values()}
        if not lengths or 0 in lengths or (found.paired and len(lengths) > 1):
            raise ValueError(f"{found.name} has rivals with {sorted(lengths)} samples")
        return found


@dataclass(frozen=True, slots=True)
class Result:
    """One run of a profile."""

    profile: str
    measurements: tuple[Measurement, ...]
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    created: str

    @classmethod
    def here(cls, profile: str, measurements: Sequence[Measurement]) -> Result:
        """The measurements, with what they ran on."""
        created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return cls(profile, tuple(measurements), machine(), versions(), commit(), created)

    def find(self, name: str) -> Measurement | None:
        return next((m for m in self.measurements if m.name == name), None)

    def write(self, path: str | Path) -> None:
        """As JSON, under a temporary name first."""
        saved = {
            "format": FORMAT,
            "profile": self.profile,
            "created": self.created,
            "commit": self.commit,
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "measurements": [m.to_dict() for m in self.measurements],
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: str | Path) -> Result:
        """Raises ResultError for what `write` did not write."""
        try:
            saved = json.loads(Path(path).read_text(encoding="utf-8"))
            if saved["format"] != FORMAT:
                raise ValueError(f"format {saved['format']!r}, this version reads {FORMAT}")
            return cls(
                profile=saved["profile"],
                measurements=tuple(Measurement.from_dict(m) for m in saved["measurements"]),
                machine=saved["machine"],
                versions=saved["versions"],
                commit=saved["commit"],
                created=saved["created"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ResultError(f"{path} is not a result of sora bench: {what}") from error


def machine() -> dict[str, Any]:
    """What the figures ran on."""
    import torch

    from sora_kernels import csrc

    found: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round((total_memory_bytes() or 0) / 2**30, 1),
        "system": platform.platform(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "native_kernels": csrc.instruction_set() or "none",
        "gpu": None,
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{card.name}, {card.total_memory / 2**30:.0f} GiB"
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    found = {"sora_engine": version(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the source tree, `+` behind it where files were changed; else `unknown`."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", *arguments),
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
