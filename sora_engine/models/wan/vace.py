"""VACE's control blocks in a file of their own, laid over a text to video transformer.

WanVideoWrapper's modules (`Wan2_1-VACE_module_14B_fp8_scaled`) have `vace_blocks.*` and
`vace_patch_embedding` alone. They go with the transformer that they were trained beside.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.selected import under_prefix
from sora_engine.io.weights.source import WeightSource
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.names import PREFIXES, is_vace_module, to_diffusers_name

OVERLAYS = ("vace", "vace_2")
"""Components that are laid over the transformers: over the first, and over the second."""

_PATCHES = "vace_patch_embedding.weight"
_FIRST = ("proj_in.weight", "proj_in.bias")
"""What the first block alone has."""


def open_vace_module(path: Path) -> WeightSource:
    """The tensors of a module. Raises CheckpointError for any other file."""
    opened = open_weights(path)
    try:
        weights = under_prefix(opened, [prefix for prefix in PREFIXES if prefix])
        if not is_vace_module(weights):
            names = [to_diffusers_name(name) for name in weights]
            seen = ", ".join(list(weights)[:3])
            whole = any(name.startswith("vace_blocks.") for name in names)
            raise CheckpointError(
                "a whole VACE transformer; give it as the model, without another one"
                if whole
                else f"no VACE module: it holds {seen}; a module holds vace_blocks and "
                "vace_patch_embedding, such as Wan2_1-VACE_module_14B_fp8_scaled.safetensors",
                path=path,
            )
    except BaseException:
        opened.close()
        raise
    return weights


def with_module(base: WanConfig, path: Path, transformer: Path) -> WanConfig:
    """The configuration of a transformer with a module laid over it. Raises CheckpointError where
    the two do not go together."""
    if base.vace_layers is not None:
        raise CheckpointError(
            f"a VACE module for {transformer.name}, which has VACE blocks of its own; leave the "
            "module out",
            path=path,
        )
    with open_vace_module(path) as weights:
        shapes = {to_diffusers_name(name): weights.info(name).shape for name in weights}
    found = shapes.get(_PATCHES, ())
    if len(found) != 5:
        raise CheckpointError(
            f"a VACE module has a tensor {_PATCHES!r} of 5 dimensions; here it has {len(found)}",
            path=path,
            tensor=_PATCHES,
        )
    if found[0] != base.inner_dim:
        raise CheckpointError(
            f"the VACE module is {found[0]} wide and {transformer.name} {base.inner_dim}; 1.3B's "
            "is 1536 wide, 14B's 5120",
            path=path,
            tensor=_PATCHES,
        )
    count = _count_of_blocks(set(shapes), path)
    if count > base.num_layers:
        raise CheckpointError(
            f"the VACE module has {count} blocks, {transformer.name} {base.num_layers} layers",
            path=path,
        )
    return replace(base, vace_layers=spread(count, base.num_layers), vace_in_channels=found[1])


def describe_module(path: Path) -> str:
    """What a module is, for people."""
    with open_vace_module(path) as weights:
        shapes = {to_diffusers_name(name): weights.info(name).shape for name in weights}
    blocks = _count_of_blocks(set(shapes), path)
    width = (shapes.get(_PATCHES) or (0,))[0]
    return (
        f"VACE module: {blocks} blocks, {width} wide; laid over a t2v transformer as wide "
        "(components={'vace': ...}, --vace)"
    )


def spread(blocks: int, layers: int) -> tuple[int, ...]:
    """The layers that so many control blocks add to. They stand at even distances: 8 over 40
    layers, 15 over 30."""
    return tuple(range(0, layers, max(1, layers // blocks)))


def _count_of_blocks(names: set[str], path: Path) -> int:
    """How many blocks there are. Raises CheckpointError where one is missing, or a part of one."""
    leaves: dict[int, set[str]] = defaultdict(set)
    for name in names:
        block = re.fullmatch(r"vace_blocks\.(\d{1,6})\.(.+)", name)
        if block is not None:
            leaves[int(block[1])].add(block[2])
    whole = set().union(*leaves.values())
    for number in range(max(leaves, default=-1) + 1):
        own = whole if number == 0 else whole.difference(_FIRST)
        missing = sorted(own - leaves.get(number, set()))
        if missing:
            name = f"vace_blocks.{number}.{missing[0]}"
            raise CheckpointError(
                f"half a VACE module: no tensor {name!r} and {len(missing) - 1} more of block "
                f"{number}",
                path=path,
                tensor=name,
            )
    if not leaves:
        raise CheckpointError("a VACE module without blocks", path=path)
    return len(leaves)
