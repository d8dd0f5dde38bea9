"""Adapters that are loaded beside a model, for requests that ask for them.

One by a name stays until it is unloaded. One by its file stays as long as something refers to it: a
job that has it.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch

from sora_engine.errors import CheckpointError, RequestError
from sora_engine.io.safetensors import Weights
from sora_engine.io.weights.adapters import AdapterFile, adapter_path, read_adapter
from sora_engine.io.weights.changes import Change
from sora_engine.models.adapters import fit
from sora_engine.models.family import Family, Shapes
from sora_engine.models.lora import AdapterSet, LayerChange
from sora_engine.models.low_rank import as_product, is_product, pays
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.request.lora import Lora, LoraRecord, checked_loras

Layers = dict[str, LayerChange]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoadedAdapter:
    """An adapter's tensors on the model's device. name: of its file. layers: by expert and layer
    what it changes. path: where it was read from."""

    name: str
    sha256: str
    layers: tuple[Layers, ...]
    path: Path

    @property
    def nbytes(self) -> int:
        seen = {
            id(tensor): tensor.nbytes
            for layers in self.layers
            for change in layers.values()
            for tensor in change.tensors
        }
        return sum(seen.values())


class AdapterStore:
    """The adapters of one model. Safe to use from several threads.

    build: makes a transformer on the meta device; experts are built alike.
    """

    def __init__(
        self,
        family: Family,
        build: Callable[[], DiffusionTransformer],
        num_experts: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.family, self.num_experts = family, num_experts
        self.device, self.dtype = device, dtype
        self._build = build
        self._listener: weakref.WeakMethod[Callable[[int], None]] | None = None
        self._named: dict[str, LoadedAdapter] = {}
        self._alive: weakref.WeakValueDictionary[str, LoadedAdapter] = weakref.WeakValueDictionary()
        self._of_file: weakref.WeakValueDictionary[tuple[object, ...], LoadedAdapter] = (
            weakref.WeakValueDictionary()
        )
        self._widest_sets: tuple[object, list[AdapterSet | None]] = ((), [])
        self._lock = threading.RLock()

    def tell(self, listener: Callable[[int], None]) -> None:
        """Tell a method how many bytes adapters take more, or less; it may raise for more. It is
        held weakly: an object that counts a model's memory holds the model, and so this store."""
        self._listener = weakref.WeakMethod(listener)

    def _on_change(self, size: int) -> None:
        listener = None if self._listener is None else self._listener()
        if listener is not None:
            listener(size)

    @cached_property
    def _hollow(self) -> DiffusionTransformer:
        return self._build()

    @cached_property
    def shapes(self) -> Shapes:
        """Of a transformer's parameters."""
        return {name: tuple(value.shape) for name, value in self._hollow.state_dict().items()}

    @property
    def adaptable(self) -> str:
        """The pattern of the layers that can have adapters by rows, by name."""
        return self._hollow.adaptable

    @property
    def names(self) -> tuple[str, ...]:
        """Of those that were loaded by name."""
        return tuple(self._named)

    @property
    def nbytes(self) -> int:
        """What all of them take."""
        return sum(adapter.nbytes for adapter in list(self._alive.values()))

    def load(self, path: str | os.PathLike[str], name: str) -> None:
        """Load an adapter under a name. Raises CheckpointError, or RequestError for a name that is
        taken; nothing is loaded then."""
        with self._lock:
            if name in self._named:
                raise RequestError(
                    f"an adapter {name!r} is loaded; unload it, or take another name"
                )
            self._named[name] = self._read(path)

    def unload(self, name: str) -> None:
        """Forget a name; its memory is free once no job has it. RequestError for an unknown one."""
        with self._lock:
            if self._named.pop(name, None) is None:
                raise RequestError(f"no adapter {name!r} is loaded; {self._known()}")

    def take(self, loras: Sequence[Lora]) -> tuple[tuple[LoraRecord, ...], list[LoadedAdapter]]:
        """What requests ask for, by name or by file, and the adapters, which stay for as long as
        they are held. Raises RequestError or CheckpointError."""
        records, held = [], []
        for lora in checked_loras(loras, self.num_experts):
            with self._lock:
                adapter = self._named.get(os.fspath(lora.path_or_name))
                if adapter is None:
                    if not Path(lora.path_or_name).exists():
                        raise RequestError(
                            f"no adapter {lora.path_or_name!r}: no such file, and {self._known()}"
                        )
                    adapter = self._read(lora.path_or_name)
            records.append(LoraRecord(adapter.name, adapter.sha256, lora.strength, lora.expert))
            held.append(adapter)
        return tuple(records), held

    @property
    def hashes(self) -> list[str]:
        """The sha256 of all that are loaded."""
        return list(self._alive)

    def hold(self, path: str, sha256: str) -> LoadedAdapter:
        """The adapter in a file, which stays for as long as it is held. Raises CheckpointError
        where it is not the one of that hash."""
        with self._lock:
            adapter = self._alive.get(sha256) or self._read(path)
        if adapter.sha256 != sha256:
            raise CheckpointError(
                "the adapter has changed since the job was taken: its sha256 is "
                f"{adapter.sha256[:12]} and was {sha256[:12]}",
                path=path,
            )
        return adapter

    def held(self, records: Sequence[LoraRecord]) -> list[LoadedAdapter]:
        """The adapters that a saved job had. Raises CheckpointError for one that is not loaded."""
        return [self._adapter(record) for record in records]

    def sets(
        self, records: Sequence[LoraRecord], *, hollow: bool = False
    ) -> list[AdapterSet | None]:
        """For each expert what these change of it. hollow: as if every layer that may have adapters
        had the largest ranks of any, on the meta device: what they take is no less then."""
        key = tuple(records)
        if hollow and self._widest_sets[0] == key:
            return self._widest_sets[1]
        sets: list[AdapterSet | None] = []
        for expert in range(self.num_experts):
            layers: dict[str, list[tuple[LayerChange, float]]] = {}
            for record in records:
                lora = Lora(record.name, record.strength, record.expert)
                if not lora.serves(expert, self.num_experts) or not record.strength:
                    continue
                for name, change in self._adapter(record).layers[expert].items():
                    layers.setdefault(name, []).append((change, record.strength))
            if layers and hollow:
                layers = self._widest(layers)
            sets.append(AdapterSet(layers) if layers else None)
        if hollow:
            self._widest_sets = key, sets
        return sets

    def _known(self) -> str:
        return f"loaded are {', '.join(self._named)}" if self._named else "none is loaded"

    def _adapter(self, record: LoraRecord) -> LoadedAdapter:
        adapter = self._alive.get(record.sha256)
        if adapter is None:
            raise CheckpointError(
                f"the adapter {record.name} (sha256 {record.sha256[:12]}) is not loaded; "
                "Engine.load_lora loads it"
            )
        return adapter

    def _read(self, path: str | os.PathLike[str]) -> LoadedAdapter:
        """An adapter from its file; the one that is there already, where it is the same."""
        status = adapter_path(path).stat()
        known = (os.path.realpath(path), status.st_size, status.st_mtime_ns)
        present = self._of_file.get(known)
        if present is not None:
            return present
        file = read_adapter(path)
        present = self._alive.get(file.sha256)
        if present is not None:
            return present
        fitted = fit(file, self.family, self.shapes, self.num_experts)
        own = fitted[: None if file.both else 1]
        with file.open() as weights:
            needed = sum(self._check(file, changes, weights) for changes in own)
        self._on_change(needed)
        try:
            layers = self._layers(file, fitted)
            adapter = LoadedAdapter(file.path.name, file.sha256, layers, Path(path).absolute())
        except BaseException:
            self._on_change(-needed)
            raise
        weakref.finalize(adapter, partial(_give_back, weakref.ref(self), needed))
        self._alive[file.sha256] = self._of_file[known] = adapter
        return adapter

    def _check(self, file: AdapterFile, changes: dict[str, Change], weights: Weights) -> int:
        """What the changes will take. CheckpointError for one that cannot be made by rows."""
        taken = 0
        for name, change in changes.items():
            layer, _, leaf = name.rpartition(".")
            fits = re.fullmatch(self.adaptable, layer) if self.adaptable else None
            if fits and change.kind == "diff" and leaf == "bias":
                taken += change.shape[0]
                continue
            kind = "DoRA" if change.decorated else change.kind
            why = f"changes {name} by {kind}, which cannot differ from request to request"
            if fits and leaf == "weight" and is_product(change):
                parts = {
                    part: torch.empty(weights.info(tensor).shape, device="meta")
                    for part, tensor in change.tensors.items()
                }
                down, up = as_product(change, parts)
                if change.kind == "lora" or pays(change, down, up):
                    taken += down.numel() + up.numel()
                    continue
                why = (
                    f"changes {name} by {kind} of rank {len(down)} as a product, which takes more "
                    "than the weight itself"
                )
            raise CheckpointError(
                f"tensor {change.example!r} {why}; Engine.from_pretrained(loras=...) merges it on "
                "loading",
                path=file.path,
                tensor=change.example,
            )
        return taken * self.dtype.itemsize

    def _layers(self, file: AdapterFile, fitted: Sequence[dict[str, Change]]) -> tuple[Layers, ...]:
        """Reads the factors; experts with the same changes share them."""
        read: dict[int, Layers] = {}
        made = []
        with file.open() as weights:
            for changes in fitted:
                key = id(changes) if file.both else 0
                if key not in read:
                    layers: dict[str, dict[str, object]] = {}
                    for name, change in changes.items():
                        layer, _, leaf = name.rpartition(".")
                        exact = self.dtype if change.kind in ("lora", "diff") else torch.float32
                        parts = {
                            part: weights.read(tensor, device=self.device, dtype=exact)
                            for part, tensor in change.tensors.items()
                        }
                        own = layers.setdefault(layer, {})
                        if leaf == "bias":
                            own["bias"] = parts["diff"].flatten().mul_(change.scale)
                        else:
                            down, up = (f.to(self.dtype) for f in as_product(change, parts))
                            own |= {"down": down, "up": up, "scale": change.scale}
                    read[key] = {name: LayerChange(**own) for name, own in layers.items()}  # type: ignore[arg-type]
                made.append(read[key])
        return tuple(made)

    def _widest(
        self, layers: dict[str, list[tuple[LayerChange, float]]]
    ) -> dict[str, list[tuple[LayerChange, float]]]:
        rank = max(
            sum(0 if change.down is None else len(change.down) for change, _ in changes)
            for changes in layers.values()
        )
        found: dict[str, list[tuple[LayerChange, float]]] = {}
        for name, shape in self.shapes.items():
            layer = name.removesuffix(".weight")
            if layer == name or len(shape) != 2 or not re.fullmatch(self.adaptable, layer):
                continue
            meta = partial(torch.empty, dtype=self.dtype, device="meta")
            change = LayerChange(
                meta(max(1, rank), shape[1]), meta(shape[0], max(1, rank)), bias=meta(shape[0])
            )
            found[layer] = [(change, 1.0)]
        return found


def _give_back(store: weakref.ref[AdapterStore], size: int) -> None:
    alive = store()
    if alive is not None:
        alive._on_change(-size)
