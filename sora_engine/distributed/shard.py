"""Where one rank's tokens lie among those of a packed batch.

Rank r of P holds the r-th of P stretches of the packed order, as even as can be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sora_engine.denoise.packing import Grid, Plans
from sora_engine.distributed.layout import bounds, share
from sora_engine.distributed.mesh import Mesh
from sora_kernels.transfer import to_device


@dataclass(frozen=True, slots=True, eq=False)
class TokenShard:
    """Where a rank's tokens lie among all of a batch, as attention needs to know it.

    bounds: offsets `[ranks + 1]` of the ranks' tokens; segments: offsets `[segments + 1]` of the
        segments; grids: the segments' patch grids. All count over the whole batch, on the host.
    cu_seqlens: int32, of the pieces of segments that this rank's ring block holds; max_seqlen: the
        longest piece. A ring block is the tokens of one Ulysses group.
    """

    mesh: Mesh
    bounds: tuple[int, ...]
    segments: tuple[int, ...]
    grids: tuple[Grid, ...]
    cu_seqlens: Tensor
    max_seqlen: int
    plans: Plans = field(default_factory=dict)
    _wholes: dict[int, Tensor] = field(default_factory=dict)

    @property
    def tokens(self) -> slice:
        """This rank's own tokens."""
        place = self.mesh.sequence.index
        return slice(self.bounds[place], self.bounds[place + 1])

    def block(self, ring_index: int) -> range:
        """The tokens of one Ulysses group."""
        width = self.mesh.ulysses.size
        return range(self.bounds[ring_index * width], self.bounds[(ring_index + 1) * width])

    @property
    def own_block(self) -> range:
        return self.block(self.mesh.ring.index)

    @property
    def group_tokens(self) -> list[int]:
        """How many tokens each rank of this rank's Ulysses group has."""
        first = self.mesh.ring.index * self.mesh.ulysses.size
        offsets = self.bounds[first : first + self.mesh.ulysses.size + 1]
        return [b - a for a, b in itertools.pairwise(offsets)]

    def whole(self, length: int) -> Tensor:
        """Offsets int32 `[2]` of one segment of so many tokens.

        Every ring step of every layer asks for them: made anew, each would be a copy to the device
        between two steps that are to overlap.
        """
        if length not in self._wholes:
            offsets = torch.tensor([0, length], dtype=torch.int32)
            self._wholes[length] = to_device(offsets, self.cu_seqlens.device)
        return self._wholes[length]

    def heads(self, num_heads: int) -> list[int]:
        """How many heads each rank of the Ulysses group attends with."""
        return share(num_heads, self.mesh.ulysses.size)


def shard_tokens(
    mesh: Mesh, segments: Sequence[int], grids: Sequence[Grid], device: torch.device
) -> TokenShard:
    """Cut `segments[-1]` tokens, laid end to end with these offsets, over a mesh's ranks."""
    total = segments[-1]
    cuts = bounds(total, mesh.sequence.size)
    width = mesh.ulysses.size
    first, last = cuts[mesh.ring.index * width], cuts[(mesh.ring.index + 1) * width]
    pieces = clip_offsets(segments, first, last)
    return TokenShard(
        mesh=mesh,
        bounds=cuts,
        segments=tuple(segments),
        grids=tuple(grids),
        cu_seqlens=to_device(torch.tensor(pieces, dtype=torch.int32), device),
        max_seqlen=longest(pieces),
    )


def clip_offsets(offsets: Sequence[int], start: int, stop: int) -> list[int]:
    """Offsets as seen from within `start` to `stop`: pieces outside are empty."""
    return [min(max(offset, start), stop) - start for offset in offsets]


def longest(offsets: Sequence[int]) -> int:
    return max((b - a for a, b in itertools.pairwise(offsets)), default=0)
