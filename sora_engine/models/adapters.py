"""Adapters and the transformers that they fit: whose parameters change, and which model it is."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.adapters import (
    AdapterFile,
    ModuleChange,
    read_adapter,
    some,
)
from sora_engine.io.weights.changes import Change
from sora_engine.io.weights.merging import Applied, Merge
from sora_engine.models.family import Family, Shapes
from sora_engine.models.registry import families
from sora_engine.request.lora import EXPERTS, Lora, LoraRecord, checked_loras

logger = logging.getLogger(__name__)

_KINDS = {
    "lora": "LoRA",
    "loha": "LoHa",
    "lokr": "LoKr",
    "dora": "DoRA",
    "diff": "differences",
    "set": "whole values",
}
_MODULATION = ("modulation", "scale_shift_table")


def merges_of(
    loras: Sequence[Lora], family: Family, shapes: Shapes, num_experts: int
) -> tuple[list[Merge | None], tuple[LoraRecord, ...]]:
    """What adapters change of each expert, and how results name them.

    shapes: of a transformer's parameters; experts are built alike. Raises CheckpointError for an
    adapter that cannot be used, RequestError for a bad value.
    """
    merged: list[dict[str, list[Applied]]] = [{} for _ in range(num_experts)]
    records = []
    for lora in checked_loras(loras, num_experts):
        file = read_adapter(lora.path_or_name)
        _warn_of_names(lora, num_experts)
        records.append(LoraRecord(lora.name, file.sha256, lora.strength, lora.expert))
        for expert, changes in enumerate(fit(file, family, shapes, num_experts)):
            if lora.strength and lora.serves(expert, num_experts):
                for name, change in changes.items():
                    applied = Applied(change, file.path, lora.strength)
                    merged[expert].setdefault(name, []).append(applied)
    return [Merge(changes) if changes else None for changes in merged], tuple(records)


def fit(
    file: AdapterFile, family: Family, shapes: Shapes, num_experts: int
) -> list[dict[str, Change]]:
    """By expert and parameter what an adapter changes of it.

    Raises CheckpointError that lists what maps to nothing, or says which model the adapter fits.
    """
    found: list[dict[str, Change]] = [{} for _ in range(num_experts)]
    unknown: list[str] = []
    dropped: list[str] = []
    for each in file.changes:
        if each.second and num_experts == 1:
            raise CheckpointError(
                f"tensor {each.change.example!r} is of a second expert, and this checkpoint has one"
                " transformer",
                path=file.path,
                tensor=each.change.example,
            )
        name = parameter(each, family, shapes)
        if name is None:
            named = own_name(each, family)
            further = named is not None and family.is_further_input(named)
            (dropped if further else unknown).append(each.change.example)
            continue
        experts = range(num_experts) if not file.both else [int(each.second)]
        for expert in experts:
            if name in found[expert]:
                raise CheckpointError(
                    f"tensors {found[expert][name].example!r} and {each.change.example!r} both "
                    f"change {name}",
                    path=file.path,
                    tensor=each.change.example,
                )
            found[expert][name] = each.change
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} changes are of nothing in this model: {some(unknown)}; "
            f"{_whose(file, family, shapes)}",
            path=file.path,
            tensor=unknown[0],
        )
    for changes in found:
        for name, change in changes.items():
            _check_shape(file, family, shapes, name, change)
    if dropped:
        logger.warning(
            "%s: %d changes are of an input that this model has not, and are left out: %s",
            file.path.name,
            len(dropped),
            some(dropped, 3),
        )
    return found


def own_name(each: ModuleChange, family: Family) -> str | None:
    """The module or parameter that a change is of, by the engine's name."""
    if each.leaf != "modulation":
        return family.own_name(each.module)
    for leaf in _MODULATION:
        for joint in (".", "_"):
            name = family.own_name(f"{each.module}{joint}{leaf}")
            if name is not None and name.endswith("scale_shift_table"):
                return name
    return None


def parameter(each: ModuleChange, family: Family, shapes: Shapes) -> str | None:
    """The parameter of a model that a change is of; None where the model has none such."""
    name = own_name(each, family)
    if name is None:
        return None
    candidates = [f"{name}.bias"] if each.leaf == "bias" else [f"{name}.weight", name]
    return next((full for full in candidates if full in shapes), None)


def which_models(file: AdapterFile) -> list[str]:
    """The models that an adapter fits, for people."""
    found = []
    for family in families():
        named = [own_name(each, family) for each in file.changes]
        sizes = {
            name: each.change.shape
            for name, each in zip(named, file.changes, strict=True)
            if name is not None and each.leaf == "weight"
        }
        described = family.describe_adapter(sizes)
        if described is not None:
            found.append(described)
    return found


def describe(file: AdapterFile) -> str:
    """What an adapter is, for people: kinds, rank, layout, targets, and which model it fits."""
    named = [
        own_name(each, family) or each.module for family in families()[:1] for each in file.changes
    ]
    targets = list(dict.fromkeys(re.sub(r"^\w*blocks\.\d+\.", "", name) for name in named))
    ranks = file.ranks
    rank = "" if not ranks else f" of rank {ranks[0]}"
    if len(ranks) > 1:
        rank = f" of ranks {ranks[0]} to {ranks[-1]}"
    models = which_models(file)
    fits = f"goes with {' or '.join(models)}" if models else "goes with no model known here"
    kinds = " and ".join(_KINDS[kind] for kind in file.kinds)
    return (
        f"{kinds}{rank}, as {file.layout} names it: {len(file.changes)} changes of "
        f"{some(targets, 12)}; {fits}"
    )


def _check_shape(
    file: AdapterFile, family: Family, shapes: Shapes, name: str, change: Change
) -> None:
    shape = shapes[name]
    rows, width = shape[0], math.prod(shape[1:])
    same = change.shape == (rows, width)
    if change.stored is not None:  # differences may lack dimensions of 1
        own = [n for n in change.stored if n != 1]
        same = own == [n for n in shape if n != 1]
    if same:
        return
    stored = change.stored or change.shape
    raise CheckpointError(
        f"tensor {change.example!r} changes {name} of shape {list(stored)}, the model's has "
        f"{list(shape)}; {_whose(file, family, shapes)}",
        path=file.path,
        tensor=change.example,
    )


def _whose(file: AdapterFile, family: Family, shapes: Shapes) -> str:
    """Which model an adapter fits, and which this one is."""
    models = which_models(file)
    fits = f"the adapter fits {' and '.join(models)}" if models else "it fits no model known here"
    mine = {
        name.removesuffix(".weight"): (shape[0], math.prod(shape[1:]))
        for name, shape in shapes.items()
        if name.endswith(".weight")
    }
    described = family.describe_adapter(mine)
    return fits if described is None else f"{fits}, and this model is {described}"


def _warn_of_names(lora: Lora, num_experts: int) -> None:
    """Files for one of two experts come in pairs, and say so in their names."""
    if num_experts < 2 or lora.expert is not None:
        return
    for expert in EXPERTS:
        if f"{expert}noise" in lora.name.lower().replace("_", "").replace("-", ""):
            logger.warning(
                "%s is named for %s noise and is applied to both experts; expert=%r would apply it "
                "to that one",
                lora.name,
                expert,
                expert,
            )
