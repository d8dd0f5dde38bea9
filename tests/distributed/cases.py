"""What the ranks of a fleet do. Each function runs at every rank and returns what JSON can hold."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import fields, replace
from pathlib import Path
from types import ModuleType
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from sora_engine.config import Limits, ParallelConfig
from sora_engine.denoise.denoise import denoise_step, prepare
from sora_engine.denoise.packing import Packer, Stream
from sora_engine.distributed.attention import ShardedAttention
from sora_engine.distributed.comm import Channel
from sora_engine.distributed.layout import bounds
from sora_engine.distributed.mesh import Mesh
from sora_engine.distributed.sequence import sharded_attention
from sora_engine.distributed.shard import shard_tokens
from sora_engine.distributed.step_sharing import RankSharing
from sora_engine.distributed.vae import SplitVAE, shared_copy
from sora_engine.distributed.weights import WeightShards
from sora_engine.io.safetensors import SafetensorsFile
from sora_engine.models.attention import self_attention
from sora_engine.models.family import ExpertSource
from sora_engine.models.loading import hollow_transformer, load_transformer
from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.models.wan.checkpoint import TransformerSource
from sora_engine.models.wan.model import WanTransformer, transformer_shape
from sora_engine.request import Clip, Shot, SparsePlan, VideoRequest, WindowPlan, resolve_request
from sora_engine.vae.decoding import decoding as decode
from tests.distributed.tiny import CPU, Z_DIM, tiny_camera_model, tiny_config, tiny_model, tiny_vae

_meshes: dict[ParallelConfig, Mesh] = {}


def mesh_of(layout: dict[str, int]) -> Mesh | None:
    """This rank's mesh, kept until another is asked for; None for a rank that is left out.

    Each thread of gloo, of which every group has some, wakes 100 times a second.
    """
    config = ParallelConfig(**layout)
    if config not in _meshes:
        for mesh in _meshes.values():
            forget(mesh)
        _meshes.clear()
        _meshes[config] = Mesh.create(config)
    return _meshes[config] if dist.get_rank() < config.num_ranks else None


def forget(mesh: Mesh) -> None:
    channels = (getattr(mesh, field.name) for field in fields(mesh))
    groups = {channel.group for channel in channels if isinstance(channel, Channel)}
    for group in groups - {None, dist.group.WORLD}:
        dist.destroy_process_group(group)


def attention(layout, lengths, heads=5, head_dim=8, dtype="float32", backend="auto"):
    """Sharded attention against dense attention in fp64: largest error, bytes that were sent."""
    mesh = mesh_of(layout)
    if mesh is None:
        return None
    offsets = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(sum(lengths))
    wide = torch.randn(3, offsets[-1], heads, head_dim, generator=generator, dtype=torch.float64)
    shard = shard_tokens(mesh, offsets, [(1, 1, n) for n in lengths], CPU)
    before = dict(mesh.traffic.sent_bytes)
    q, k, v = wide[:, shard.tokens].to(getattr(torch, dtype))
    out = sharded_attention(q, k, v, shard, backend=backend)
    expected = torch.cat([_dense(*part) for part in wide.split(list(lengths), dim=1)])
    error = (out.double() - expected[shard.tokens]).abs().amax().item() if len(out) else 0.0
    sent = {k: n - before.get(k, 0) for k, n in mesh.traffic.sent_bytes.items()}
    return {"error": error / expected.abs().max().item(), "sent": sent, "tokens": len(out)}


def _dense(q, k, v, mask=None):
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


def sparse_attention(layout, grids, reach, heads=5, head_dim=8):
    """Attention of frames to the first one and those within reach, against dense attention in fp64
    under a mask of tokens: largest error, bytes sent, and keys of others that tokens here see."""
    mesh = mesh_of(layout)
    if mesh is None:
        return None
    grids = [tuple(grid) for grid in grids]
    lengths = [t * h * w for t, h, w in grids]
    offsets = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(sum(lengths))
    wide = torch.randn(3, offsets[-1], heads, head_dim, generator=generator, dtype=torch.float64)
    shard = shard_tokens(mesh, offsets, grids, CPU)
    sees = []
    for frames, _, _ in grids:
        at = torch.arange(frames)
        sees.append(((at[:, None] - at).abs() <= reach) | (at == 0))
    stream = Stream(
        tokens=wide[0], rows=None, coords=torch.zeros(offsets[-1], 3, dtype=torch.int64),
        cu_seqlens=torch.tensor(offsets, dtype=torch.int32), max_seqlen=max(lengths),
        grids=tuple(grids), attend=ShardedAttention(shard), sees=tuple(sees),
    )  # fmt: skip
    q, k, v = wide[:, shard.tokens].float()
    before = dict(mesh.traffic.sent_bytes)
    out = self_attention(q, k, v, stream, backend="auto")
    sent = {k: n - before.get(k, 0) for k, n in mesh.traffic.sent_bytes.items()}
    mask = torch.block_diag(
        *(
            sight.repeat_interleave(h * w, 0).repeat_interleave(h * w, 1).int()
            for sight, (_, h, w) in zip(sees, grids, strict=True)
        )
    )
    expected = _dense(*wide, mask.bool())
    block = shard.own_block
    seen = mask[block.start : block.stop].any(0)
    seen[block.start : block.stop] = False
    error = (out.double() - expected[shard.tokens]).abs().amax().item() if len(out) else 0.0
    error /= expected.abs().max().item()
    return {"error": error, "sent": sent.get("ring", 0), "foreign": int(seen.sum())}


_rng = np.random.default_rng(0)
FRAMES = _rng.integers(0, 255, (5, 24, 40, 3), dtype=np.uint8)
WINDOWS = WindowPlan(3, 1)

REQUESTS = {
    # 3 x 3 x 5 patches: 45 tokens a branch.
    "guided": [VideoRequest("a cat", seed=1)],
    # 1 x 1 x 7 and 1 x 1 x 13 patches: prime token counts.
    "prime": [
        VideoRequest("a", seed=2, height=8, width=56, num_frames=1, guidance_scale=1.0),
        VideoRequest("b", seed=3, height=8, width=104, num_frames=1, guidance_scale=1.0),
    ],
    "few": [VideoRequest("a", seed=2, height=8, width=24, num_frames=1, guidance_scale=1.0)],
    "mixed": [
        VideoRequest("a cat", seed=4, height=8, width=40, num_frames=3),
        VideoRequest("a dog", seed=5, num_frames=5, guidance_scale=1.0, solver="euler"),
        VideoRequest("a cow", seed=6, clips=[Clip(FRAMES[0], at=0)]),
    ],
    "windows": [VideoRequest("a cat", seed=8, height=16, width=24, num_frames=13, window=WINDOWS)],
    "moving": [
        VideoRequest(
            "a cat",
            seed=8,
            height=16,
            width=24,
            num_frames=15,
            guidance_scale=1.0,
            window=WindowPlan(3, 2, weights="overlap", schedule="moving"),
        )
    ],
    # Frames that see only some others, beside a video whose frames all see each other.
    "sparse": [
        VideoRequest(
            "a cat", seed=11, height=16, width=24, num_frames=21, window=SparsePlan(1, num_keys=1)
        ),
        VideoRequest("a dog", seed=12, height=8, width=40, num_frames=3, guidance_scale=1.0),
    ],
    "loop": [VideoRequest("a cat", seed=9, height=16, num_frames=6, loop=True)],
    "windowed loop": [
        VideoRequest("a", seed=9, height=16, width=24, num_frames=10, loop=True, window=WINDOWS)
    ],
    # Beside a video of which nothing is said of the camera.
    "camera": [
        VideoRequest("a cat", seed=13, camera="pan left + acw x3, zoom in x5"),
        VideoRequest("a dog", seed=14, height=8, width=40, num_frames=3),
        VideoRequest(
            "a", seed=15, height=16, width=24, num_frames=13, camera="zoom out x5", window=WINDOWS
        ),
    ],
    "shots": [VideoRequest("", seed=10, num_frames=5, shots=[Shot("x", 3), Shot("a long y", 2)])],
}


def canvases_of(name, model):
    return [prepare(resolve_request(request, model, Limits()), model) for request in REQUESTS[name]]


_expected: dict[tuple[str, VideoModel], list[torch.Tensor]] = {}


def reference(name, model):
    """The final latents that one rank makes."""
    key = name, model
    if key not in _expected:
        canvases = canvases_of(name, model)
        while not canvases[0].finished:
            denoise_step(canvases, model, Packer(model.grid.patch, CPU), 10**6)
        _expected[key] = [canvas.latents for canvas in canvases]
    return _expected[key]


def denoise(layout, request, heads=5, max_tokens=10**6, weights=None, dtype="float32"):
    """Whole denoising runs over a layout: the relative error at rank 0, a digest at every rank.

    weights: the transformer's file, of which each rank loads its own rows, as `dtype`.
    """
    mesh = mesh_of(layout)
    if mesh is None:
        return None
    whole = model = (tiny_camera_model if request == "camera" else tiny_model)(heads)
    held = {}
    if weights is not None:
        if dtype != "float32":
            whole = with_transformer(model, load(weights, heads, dtype))
        transformer, held["read"] = sharded_transformer(weights, heads, dtype, mesh)
        model = with_transformer(model, transformer)
    canvases = canvases_of(request, model)
    packer, sharing = Packer(model.grid.patch, CPU), RankSharing(mesh)
    before = dict(mesh.traffic.sent_bytes)
    while not canvases[0].finished:
        denoise_step(canvases, model, packer, max_tokens, sharing)
    made = [canvas.latents for canvas in canvases]
    digest = hashlib.sha256(b"".join(x.numpy().tobytes() for x in made)).hexdigest()
    sent = {k: n - before.get(k, 0) for k, n in mesh.traffic.sent_bytes.items()}
    error = None
    if mesh.rank == 0:
        pairs = zip(made, reference(request, whole), strict=True)
        error = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    if weights is not None:
        held["live"] = live_bytes([transformer])
    steps = canvases[0].step
    return {"error": error, "digest": digest, "sent": sent, "steps": steps, **held}


def load(weights, heads, dtype, sharder=None):
    config = tiny_config(heads)
    files = TransformerSource(Path(weights), config)
    source = ExpertSource(
        path=files.path,
        shape=transformer_shape(config, 16),
        num_parameters=files.num_parameters,
        build=lambda backend: WanTransformer(config, text_tokens=16, attention_backend=backend),
        fill=files.load,
    )
    hollow = hollow_transformer(source, getattr(torch, dtype), "auto")
    return load_transformer(source, hollow, CPU, sharder=sharder)


def with_transformer(model, transformer):
    return replace(model, experts=[Expert(lambda: transformer, 0.0, 1, transformer)])


def sharded_transformer(weights, heads, dtype, mesh):
    """The tiny transformer over a mesh's ranks, and how many bytes of the file's blocks it took."""
    read = 0
    whole_read = SafetensorsFile.read

    def counted(file, name, **options):
        nonlocal read
        value = whole_read(file, name, **options)
        read += value.nbytes if name.startswith("blocks.") else 0
        return value

    with mock.patch.object(SafetensorsFile, "read", counted):
        return load(weights, heads, dtype, WeightShards(mesh)), read


def live_bytes(modules):
    """Memory of all tensors that are reached from modules, through whatever holds them."""
    found, seen, left = {}, set(), list(modules)
    while left:
        thing = left.pop()
        if id(thing) in seen or isinstance(thing, (type, ModuleType, dist.ProcessGroup, Mesh)):
            continue
        seen.add(id(thing))
        if isinstance(thing, DTensor):
            thing = thing.to_local()
        if isinstance(thing, torch.Tensor):
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(thing, dict):
            left += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            left += thing
        else:
            left += vars(thing).values() if hasattr(thing, "__dict__") else ()
    return sum(found.values())


def decoding(layout, shape, residual=False, wraps=False):
    """Frames decoded over ranks against one rank's: largest error, rows of this rank."""
    mesh = mesh_of(layout)
    if mesh is None:
        return None
    generator = torch.Generator().manual_seed(sum(shape))
    latents = torch.randn(Z_DIM, *shape, generator=generator)
    vae = tiny_vae(residual)
    split = SplitVAE(shared_copy(vae), mesh.replica)
    how = {"dtype": torch.float32, "device": CPU, "wraps": wraps}
    active = split.num_active(shape[1])
    if mesh.rank >= active:
        return {"rows": 0}
    made, whole = (
        torch.cat([x for x in decode(latents, coder, **how) if x is not None])
        for coder in (split, vae)
    )
    scale = vae.scale_factor_spatial
    cuts = bounds(shape[1], active)
    expected = whole[:, cuts[mesh.rank] * scale : cuts[mesh.rank + 1] * scale]
    return {
        "rows": made.shape[1],
        "equal": bool(torch.equal(made, expected)),
        "error": (made.int() - expected.int()).abs().max().item(),
        "levels": len(expected.unique()),
        "sent": mesh.traffic.sent_bytes["decode"],
    }
