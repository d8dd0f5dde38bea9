"""A transformer's weights over the ranks of one forward pass: PyTorch's FSDP2, for inference.

Each rank holds its rows of every matrix of every block, and reads no others from the files. A
block's weights are gathered when it runs and let go of behind it; on a GPU the next block's cross
meanwhile. What lies outside the blocks is small, and whole at every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from sora_engine.distributed.comm import Channel
from sora_engine.distributed.mesh import Mesh
from sora_engine.models.transformer import DiffusionTransformer


@dataclass(frozen=True, slots=True, eq=False)
class WeightShards:
    """Cuts transformers over the ranks of a cell of the mesh."""

    mesh: Mesh

    @property
    def num_ranks(self) -> int:
        return self.mesh.weights.size

    def cut(self, device: torch.device, transformer: nn.Module) -> dict[str, range]:
        """Shard the own parts of each block of a transformer that is on the meta device; its own
        shares are then on `device`, not filled. Returns the rows of them that this rank has, by the
        parameters' names."""
        assert isinstance(transformer, DiffusionTransformer)
        channel = self.mesh.weights
        assert channel.group is not None
        mesh = DeviceMesh.from_group(channel.group, device.type, mesh_dim_names=("weights",))
        gather = _Gather(channel)
        rows: dict[str, range] = {}
        for lists in transformer.block_lists:
            for i, block in enumerate(getattr(transformer, lists)):
                whole = set()
                for name, parameter in block.named_parameters():
                    if name.partition(".")[0] in transformer.own_parts:
                        rows[f"{lists}.{i}.{name}"] = own_rows(len(parameter), channel)
                    else:
                        whole.add(parameter)
                fully_shard(block, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
                block.set_custom_all_gather(gather)
                for method in set(transformer.block_methods) - {"forward"}:
                    register_fsdp_forward_method(block, method)
                block.to_empty(device=device)
        # The root has no weights of its own: by it a block is gathered while another runs.
        fully_shard(transformer, mesh=mesh, ignored_params=set(transformer.parameters()))
        register_fsdp_forward_method(transformer, "encode_contexts")
        return rows


def own_rows(count: int, channel: Channel) -> range:
    """Of `count` rows, those of this rank: as `torch.chunk` cuts, so that the last may have fewer
    or none."""
    each = -(-count // channel.size)
    return range(min(count, channel.index * each), min(count, (channel.index + 1) * each))


class _Gather:
    """FSDP2's `AllGather`, over a channel: what it sends is counted, and its waits are known."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        self._channel.gather_into(output_tensor, input_tensor)
