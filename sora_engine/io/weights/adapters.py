"""Adapters (LoRA and its kin) out of whatever file people hold, in one form.

An `AdapterFile` says of each module what changes of it, under the name that the file has; which
parameter of a model that is `models.adapters` finds out. Headers and alphas are read, and values
only to see that they are finite.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.safetensors import TensorInfo, Weights, refuse_pickle
from sora_engine.io.weights.adapter_config import FOLDER_FILE, AdapterConfig
from sora_engine.io.weights.adapter_keys import (
    Key,
    kind_not_read,
    layout_of,
    of_text_encoder,
    parse_key,
)
from sora_engine.io.weights.changes import Change, finite

WORKS = "LoRA, LoHa, LoKr, DoRA and differences of weights would work"

logger = logging.getLogger(__name__)

_FACTORS = {
    "lora": ("up", "down"),
    "loha": ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
}


@dataclass(frozen=True, slots=True)
class ModuleChange:
    """What changes of one module.

    module: its name in the file, without prefixes. leaf: weight, bias or modulation. second: it is
    of the second expert alone.
    """

    module: str
    leaf: str
    change: Change
    second: bool = False


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter, checked, of which no more than headers and alphas is kept.

    layout: whose naming it has. both: it has changes of two experts, each its own. sha256: of the
    file, where all of it was read.
    """

    path: Path
    changes: tuple[ModuleChange, ...]
    layout: str
    both: bool
    sha256: str

    @property
    def ranks(self) -> tuple[int, ...]:
        """The ranks of its factors, each once."""
        return tuple(sorted({c.change.rank for c in self.changes if c.change.rank}))

    @property
    def kinds(self) -> tuple[str, ...]:
        """For people: lora, loha, lokr, dora, diff, set."""
        found = {"dora" if c.change.decorated else c.change.kind for c in self.changes}
        return tuple(sorted(found))

    def open(self) -> Weights:
        """Its tensors."""
        return Weights.open(self.path)


def adapter_path(path: str | PathLike[str]) -> Path:
    """The file of an adapter: itself, or PEFT's in a folder. Raises CheckpointError."""
    path = Path(path)
    refuse_pickle(path)
    if path.is_dir():
        if not (path / FOLDER_FILE).exists():
            raise CheckpointError(
                f"a folder without {FOLDER_FILE}; the adapter's .safetensors file would work",
                path=path,
            )
        return path / FOLDER_FILE
    if not path.exists():
        raise CheckpointError(
            "no such file; an adapter is a .safetensors file, and nothing is downloaded", path=path
        )
    if not path.is_file():  # a pipe would be waited for
        raise CheckpointError("a device, a pipe or a socket; a file would work", path=path)
    return path


def read_adapter(path: str | PathLike[str], *, whole: bool = True) -> AdapterFile:
    """Read an adapter's file, in any layout that `docs/adapters.md` lists.

    whole: read all of it, for its hash and to see that there is no NaN or infinity. Raises
    CheckpointError, which names file and tensor, for what is no adapter, is half of one, or of a
    kind that is not read.
    """
    path = adapter_path(path)
    with Weights.open(path) as weights:
        if not len(weights):
            raise CheckpointError("it holds no tensors: a download that failed?", path=path)
        keys = _keys(weights)
        told = AdapterConfig.read(weights.files[0].metadata, path)
        raw = "base_model.model." in keys[0].prefix and not told.settings
        if raw and all(key.part != "alpha" for key in keys):
            logger.warning(
                "%s: its alpha is in PEFT's adapter_config.json, which is not beside it; it is "
                "applied with the scale 1",
                path.name,
            )
        reader = _Reader(weights, told)
        changes = tuple(change for module in _by_module(keys) for change in reader.changes(module))
        if whole:
            for name in weights:
                finite(weights, name)
    sha256 = ""
    if whole:
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return AdapterFile(
        path,
        changes,
        layout=layout_of(keys[0].prefix),
        both=any(change.second for change in changes),
        sha256=sha256,
    )


def _keys(weights: Weights) -> list[Key]:
    """Every key taken apart; CheckpointError that lists those that are nothing known."""
    keys, unknown = [], []
    for name in weights:
        if of_text_encoder(name):
            raise CheckpointError(
                f"tensor {name!r} is of a text encoder; adapters of transformers are read, and a "
                "file with no others would work",
                path=weights.path,
                tensor=name,
            )
        key = parse_key(name)
        if key is None:
            kind = kind_not_read(name)
            if kind is not None:
                raise CheckpointError(
                    f"tensor {name!r} marks {kind}, which is not read; {WORKS}",
                    path=weights.path,
                    tensor=name,
                )
            unknown.append(name)
        else:
            keys.append(key)
    if unknown:
        whole = "" if keys else "no adapter: "
        raise CheckpointError(
            f"{whole}{len(unknown)} of {len(weights)} tensors are of no known kind of adapter: "
            f"{some(unknown)}; {WORKS}",
            path=weights.path,
            tensor=unknown[0],
        )
    return keys


def some(names: Iterable[str], limit: int = 8) -> str:
    """Names for an error: all where they are few."""
    names = list(names)
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _by_module(keys: Iterable[Key]) -> list[list[Key]]:
    modules: dict[tuple[str, bool], list[Key]] = {}
    for key in keys:
        modules.setdefault((key.module, key.second), []).append(key)
    return list(modules.values())


class _Reader:
    """Makes changes of modules out of their parts."""

    def __init__(self, weights: Weights, told: AdapterConfig) -> None:
        self.weights, self.told = weights, told

    def changes(self, keys: list[Key]) -> list[ModuleChange]:
        parts: dict[str, str] = {}
        for key in keys:
            other = parts.setdefault(key.part, key.name)
            if other != key.name:
                raise self.error(f"tensors {other!r} and {key.name!r} are both one part", key.name)
        module, second = keys[0].module, keys[0].second
        found: list[ModuleChange] = []

        def add(leaf: str, change: Change) -> None:
            found.append(ModuleChange(module, leaf, change, second))

        product = self.product(module, second, parts)
        if product is not None:
            add("weight", product)
        for part, leaf in (("diff", "weight"), ("set", "weight"), ("bias_diff", "bias")):
            if part in parts:
                kind = "set" if part == "set" else "diff"
                add(leaf, self.difference(kind, parts.pop(part)))
        if "modulation_diff" in parts:
            add("modulation", self.difference("diff", parts.pop("modulation_diff")))
        if "up_bias" in parts:
            bias = self.difference("diff", parts.pop("up_bias"))
            if product is None or product.kind != "lora":
                raise self.error(f"tensor {bias.example!r} has no lora_A and lora_B", bias.example)
            add("bias", replace(bias, scale=product.scale))
        self.no_leftovers(parts)
        return found

    def no_leftovers(self, parts: Mapping[str, str]) -> None:
        for part, name in parts.items():
            if part == "reshape":
                raise self.error(
                    f"tensor {name!r} changes the shape of the model's own, which is not done",
                    name,
                )
            what = {"alpha": "an alpha", "magnitude": "DoRA's magnitude"}.get(part, f"a {part}")
            raise self.error(f"tensor {name!r} is {what} without the matrices it is for", name)

    def product(self, module: str, second: bool, parts: dict[str, str]) -> Change | None:
        """The low-rank change of a module's weight, its parts taken out of `parts`."""
        kinds = {
            "lora": any(p in parts for p in ("up", "down", "mid")),
            "loha": any(p.startswith("hada_") for p in parts),
            "lokr": any(p.startswith("lokr_") for p in parts),
        }
        present = [kind for kind, there in kinds.items() if there]
        if not present:
            return None
        if len(present) > 1:
            raise self.error(
                f"module {module!r} has parts of {' and '.join(present)}",
                next(iter(parts.values())),
            )
        kind = present[0]
        prefix = {"lora": ("up", "down", "mid"), "loha": ("hada_",), "lokr": ("lokr_",)}[kind]
        own = {p: parts.pop(p) for p in list(parts) if p.startswith(prefix) and p != "up_bias"}
        for part in _FACTORS.get(kind, ()):
            if part not in own:
                have = next(iter(own.values()))
                raise self.error(
                    f"half an adapter: tensor {have!r} of module {module!r} has no {part} beside "
                    "it",
                    have,
                )
        rows, width, rank = {"lora": self.lora, "loha": self.loha, "lokr": self.lokr}[kind](own)
        alpha = parts.pop("alpha", None)
        magnitude = parts.pop("magnitude", None)
        scale = self.scale(module, second, rank, kind, alpha, next(iter(own.values())))
        if magnitude is not None:
            shape = self.info(magnitude).shape
            if math.prod(shape) not in (rows, width):
                raise self.error(
                    f"tensor {magnitude!r} has shape {list(shape)}; magnitudes of {module!r} are "
                    f"[{rows}, 1] or [1, {width}]",
                    magnitude,
                )
            own["magnitude"] = magnitude
        return Change(kind, own, (rows, width), scale, rank)

    def scale(
        self, module: str, second: bool, rank: int, kind: str, alpha: str | None, example: str
    ) -> float:
        """alpha / rank; 1 where no alpha is known, or where there is no rank to divide by."""
        if alpha is not None:
            value = self.number(alpha)
            return value / rank if rank else 1.0
        told = self.told.scale(module, second)
        if told is None:
            return 1.0
        scale, said = told
        if kind == "lora" and said != rank:
            raise self.error(
                f"the rank of {module!r} is {rank} in its tensors and {said} in the configuration "
                f"of {self.told.where.name}",
                example,
            )
        return scale

    def lora(self, own: Mapping[str, str]) -> tuple[int, int, int]:
        up, down = self.info(own["up"]).shape, self.info(own["down"]).shape
        if len(up) < 2 or len(down) < 2 or 0 in (*up, *down) or math.prod(up[2:]) != 1:
            raise self.error(
                f"tensors {own['up']!r} {list(up)} and {own['down']!r} {list(down)} are no pair of "
                "[out, rank] and [rank, in]",
                own["up"],
            )
        width, inner = math.prod(down[1:]), down[0]
        if "mid" in own:
            mid = self.info(own["mid"]).shape
            if len(mid) < 3 or mid[1] != down[0] or math.prod(down[2:]) != 1:
                raise self.error(
                    f"tensor {own['mid']!r} {list(mid)} is no core [rank, rank, ...] between "
                    f"{list(up)} and {list(down)}",
                    own["mid"],
                )
            width, inner = down[1] * math.prod(mid[2:]), mid[0]
        if up[1] != inner:
            raise self.error(
                f"the rank of {own['up']!r} {list(up)} is {up[1]}, and of {own['down']!r} "
                f"{list(down)} {inner}",
                own["up"],
            )
        return up[0], width, down[0]

    def loha(self, own: Mapping[str, str]) -> tuple[int, int, int]:
        sizes = set()
        for n in (1, 2):
            a, b = (own[f"hada_w{n}_{part}"] for part in "ab")
            core = own.get(f"hada_t{n}")
            rows, width, rank = self.pair(a, b, core)
            sizes.add((rows, width))
        if len(sizes) > 1:
            raise self.error(f"the factors of {a!r} are of {sizes}: they do not fit", a)
        return rows, width, rank

    def lokr(self, own: Mapping[str, str]) -> tuple[int, int, int]:
        sizes, rank = [], 0
        for n in (1, 2):
            whole = own.get(f"lokr_w{n}")
            a, b = own.get(f"lokr_w{n}_a"), own.get(f"lokr_w{n}_b")
            example = whole or a or b or next(iter(own.values()))
            if (whole is None) == (a is None or b is None) or (whole is None) != (a is not None):
                raise self.error(
                    f"half an adapter: beside {example!r} there must be lokr_w{n}, or lokr_w{n}_a "
                    f"and lokr_w{n}_b",
                    example,
                )
            if whole is not None:
                shape = self.matrix(whole)
                sizes.append((shape[0], math.prod(shape[1:])))
            else:
                assert a is not None
                assert b is not None
                core = own.get("lokr_t2") if n == 2 else None
                rows, width, rank = self.pair(a, b, core)
                sizes.append((rows, width))
        if "lokr_t2" in own and "lokr_w2_a" not in own:
            raise self.error(f"tensor {own['lokr_t2']!r} has no lokr_w2_a", own["lokr_t2"])
        return sizes[0][0] * sizes[1][0], sizes[0][1] * sizes[1][1], rank

    def pair(self, a: str, b: str, core: str | None) -> tuple[int, int, int]:
        """Rows, width and rank of a product, or of a core with two factors."""
        left, right = self.matrix(a), self.matrix(b)
        if core is None:
            if left[1] != right[0] or len(left) != 2:
                raise self.error(f"{a!r} {list(left)} and {b!r} {list(right)} do not multiply", a)
            return left[0], math.prod(right[1:]), right[0]
        mid = self.matrix(core)
        if mid[:2] != (left[0], right[0]) or len(left) != 2 or len(right) != 2:
            raise self.error(
                f"{core!r} {list(mid)} is no core of {a!r} {list(left)} and {b!r} {list(right)}",
                core,
            )
        return left[1], right[1] * math.prod(mid[2:]), left[0]

    def difference(self, kind: str, name: str) -> Change:
        shape = self.info(name).shape
        if not shape or 0 in shape:
            raise self.error(f"tensor {name!r} has shape {list(shape)}", name)
        return Change(kind, {kind: name}, (shape[0], math.prod(shape[1:])), stored=shape)

    def matrix(self, name: str) -> tuple[int, ...]:
        shape = self.info(name).shape
        if len(shape) < 2 or 0 in shape:
            raise self.error(f"tensor {name!r} has shape {list(shape)}; it is a matrix", name)
        return shape

    def info(self, name: str) -> TensorInfo:
        info = self.weights.info(name)
        if not info.dtype.is_floating_point:
            raise self.error(f"tensor {name!r} is {info.dtype}; adapters are floating-point", name)
        return info

    def number(self, name: str) -> float:
        info = self.weights.info(name)
        if math.prod(info.shape) != 1:
            raise self.error(f"tensor {name!r} has shape {list(info.shape)}; it is a number", name)
        value = float(self.weights.read(name, dtype=torch.float32).reshape(()))
        if not math.isfinite(value):
            raise self.error(f"tensor {name!r} is {value}", name)
        return value

    def error(self, message: str, name: str) -> CheckpointError:
        path = self.weights.path_of(name) if name in self.weights else self.weights.path
        return CheckpointError(message, path=path, tensor=name)
