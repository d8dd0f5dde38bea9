"""The ranks of one engine as a mesh: guidance x window x ring x Ulysses, on `DeviceMesh`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sora_engine.config import ParallelConfig
from sora_engine.distributed.comm import Channel, Traffic

AXES = ("guidance", "window", "ring", "ulysses")


@dataclass(frozen=True, slots=True, eq=False)
class Mesh:
    """Where this rank stands, and the channels to those beside it.

    Ranks count with Ulysses innermost: neighbours, which share the fastest links, exchange most.

    ulysses, ring: the two axes of one forward pass; sequence: both as one, ring outermost;
    weights: the same ranks, over which weights are sharded where the layout asks for it.
    cells: the same place in every cell (a cell is the ranks of one forward pass).
    replica: all ranks.
    """

    config: ParallelConfig
    rank: int
    ulysses: Channel
    ring: Channel
    sequence: Channel
    weights: Channel
    cells: Channel
    replica: Channel
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def cell(self) -> int:
        """Of `guidance * window` cells, the one that this rank belongs to."""
        return self.cells.index

    @classmethod
    def create(cls, config: ParallelConfig, device_type: str = "cpu") -> Mesh:
        """Over the first ranks of the default process group, on which every rank must call this.

        The mesh of a rank beyond the layout's belongs to nobody and must not be used.
        """
        rank = dist.get_rank() if config.num_ranks > 1 else 0
        traffic = Traffic()
        shape = (config.guidance, config.window, config.ring, config.ulysses)
        fine = _groups(device_type, shape, AXES)
        coarse = _groups(device_type, (config.cells, config.sequence), ("cells", "sequence"))
        whole = _groups(device_type, (config.num_ranks,), ("replica",))

        def channel(
            name: str, purpose: str, groups: dict[str, dist.ProcessGroup], size: int, index: int
        ) -> Channel:
            return Channel(groups.get(name), size, index, purpose, traffic)

        place = rank % config.sequence
        cell = rank // config.sequence % config.cells
        return cls(
            config=config,
            rank=rank,
            ulysses=channel("ulysses", "ulysses", fine, config.ulysses, place % config.ulysses),
            ring=channel("ring", "ring", fine, config.ring, place // config.ulysses),
            sequence=channel("sequence", "gather", coarse, config.sequence, place),
            weights=channel("sequence", "weights", coarse, config.sequence, place),
            cells=channel("cells", "blend", coarse, config.cells, cell),
            replica=channel("replica", "decode", whole, config.num_ranks, rank),
            traffic=traffic,
        )


def _groups(
    device_type: str, shape: tuple[int, ...], names: tuple[str, ...]
) -> dict[str, dist.ProcessGroup]:
    """This rank's process group along each axis longer than one."""
    axes = [(name, size) for name, size in zip(names, shape, strict=True) if size > 1]
    if not axes:
        return {}
    ranks = torch.arange(math.prod(shape)).view([size for _, size in axes])
    mesh = DeviceMesh(device_type, ranks, mesh_dim_names=tuple(name for name, _ in axes))
    if mesh.get_coordinate() is None:
        return {}
    return {name: mesh.get_group(name) for name, _ in axes}
