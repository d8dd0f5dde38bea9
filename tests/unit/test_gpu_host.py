"""What the host does for a GPU between two kernels, on the shadow device: no more than it must."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

import sora_engine as sora
from sora_engine.denoise import packing
from sora_engine.denoise.conditioning import Context, KeyValues
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.distributed.sequence import ring_attention
from sora_engine.distributed.shard import shard_tokens
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.runtime.executor import LocalExecutor
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import REQUESTS, Sizes, build, load
from sora_engine.testing.tensors import ShadowTensor, host, modes
from tests.parity.oracles import TINY_TRANSFORMER

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_a_ring_step_brings_nothing_to_the_device():
    """Its offsets are the layout's: a copy in each step of each layer would end the overlap of an
    exchange and the attention before it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 10, 2, 8).unbind(0)
    shares = (slice(0, 5), slice(5, 10))

    class Ring:
        size, index = 2, 0

        def start(self, send, receive):
            for peer, place in receive.items():
                theirs = torch.stack((k[shares[peer]], v[shares[peer]]))
                place.copy_(ShadowTensor(theirs, CUDA))
            return SimpleNamespace(wait=lambda: receive)

    one = SimpleNamespace(size=1, index=0)
    mesh = SimpleNamespace(ring=Ring(), ulysses=one, sequence=SimpleNamespace(size=2, index=0))
    with shadow_device() as shadow, torch.inference_mode():
        shard = shard_tokens(mesh, [0, 10], [(1, 1, 10)], CUDA)
        own = [ShadowTensor(x[shares[0]].clone(), CUDA) for x in (q, k, v)]
        for layer in ("first layer", "later layer"):
            with shadow.trace.phase(layer):
                out = ring_attention(*own, shard, backend="auto")
        crossings = {n: sum(t.figures().values()) for n, t in shadow.trace.phases.items()}
        waits = {n: t.waits for n, t in shadow.trace.phases.items()}
    assert crossings["later layer"] == 0
    assert set(waits.values()) == {0}
    scores = torch.einsum("qhd,khd->hqk", q[:5].double(), k.double()) / math.sqrt(8)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v.double())
    torch.testing.assert_close(host(out).double(), expected, rtol=1e-5, atol=1e-6)


def a_segment(size, levels, contexts, num_anchors=0):
    return Segment(torch.randn(5, *size), levels, contexts, num_anchors=num_anchors)


def a_context(pooled=None):
    keys = torch.randn(1, 3, 2, 4)
    return Context({"text": KeyValues(keys, keys)}, pooled=pooled)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 1, 2)])
def test_rows_of_tokens_are_worked_out_by_frame(monkeypatch, pooled, patch):
    """Against a loop over the tokens. The host looks at frames where those have one level: a 720p
    batch has 150,000 tokens, at each step."""
    torch.manual_seed(0)
    pt = patch[0]
    a, b = (a_context(torch.randn(4) if pooled else None) for _ in range(2))
    size = (4, 4, 6)
    T, H, W = (n // p for n, p in zip(size, patch, strict=True))
    by_frame = torch.tensor([0.0, 0.0, 500.0, 500.0])
    by_token = torch.where(torch.rand(4, H, W) > 0.5, 500.0, 250.0)
    segments = [
        a_segment(size, torch.full((4,), 500.0), ((a, 4),)),
        a_segment(size, by_frame, ((b, 2), (a, 2))),
        a_segment(size, by_token, ((a, 4),)),
        a_segment(size, by_frame, ((b, 4),), num_anchors=2),
    ]
    looked_at = []
    unique = torch.unique

    def counted(values, **options):
        looked_at.append(values.shape[-1])
        return unique(values, **options)

    monkeypatch.setattr(packing.torch, "unique", counted)
    batch = Packer(patch, CPU).pack(segments)
    assert looked_at == [3 * T + T * H * W]

    levels, vectors = [], []
    for segment in segments:
        frames = [context for context, n in segment.contexts for _ in range(n)]
        for t in range(T):
            for h in range(H):
                for w in range(W):
                    own = segment.timesteps[t * pt]
                    levels.append(float(own if own.ndim == 0 else own[h, w]))
                    vectors.append(frames[t * pt].pooled)
    rows = batch.video.rows
    assert rows.dtype == torch.int64
    assert batch.timesteps[rows].tolist() == levels
    assert len(batch.timesteps) == len({(x, id(y)) for x, y in zip(levels, vectors, strict=True)})
    if pooled:
        assert torch.equal(batch.pooled[rows], torch.stack(vectors))
    else:
        assert batch.timesteps.tolist() == sorted(set(levels))


def test_known_frames_are_levels_of_frames(tmp_path, monkeypatch):
    """A first frame that is known whole, as in image to video, needs no level for each token."""
    looked_at = []
    unique = torch.unique

    def counted(values, **options):
        looked_at.append(values.shape[-1])
        return unique(values, **options)

    monkeypatch.setattr(packing.torch, "unique", counted)
    with sora.Engine.from_pretrained(build("ti2v-5b", tmp_path), device="cpu") as engine:
        engine.generate(REQUESTS["known"](Sizes(engine.loaded_model)))
        of_frames, tokens = max(looked_at), 2 * 3 * 4
        looked_at.clear()
        engine.generate(REQUESTS["inpaint"](Sizes(engine.loaded_model)))
    assert of_frames == 2 * 3  # branches, latent frames
    assert max(looked_at) == tokens


def launches_of(num_layers):
    """What a forward pass of so many layers queues on the device, by operation."""
    torch.manual_seed(0)
    config = WanConfig(**{**TINY_TRANSFORMER, "num_layers": num_layers})
    model = WanTransformer(config).to(torch.bfloat16).requires_grad_(False)
    with shadow_device() as shadow, torch.inference_mode():
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    there = ShadowTensor(parameter.detach(), CUDA)
                    module._parameters[name] = torch.nn.Parameter(there, requires_grad=False)
        (context,) = model.encode_contexts([model.example_embedding(5, CUDA)])
        latents = torch.randn(16, 2, 4, 4).to(CUDA)
        batch = Packer((1, 2, 2), CUDA).pack(
            [Segment(latents, torch.tensor([0.0, 500.0]), ((context, 2),))]
        )
        with shadow.trace.phase("forward"):
            assert host(model(batch)).isfinite().all()
        tally = shadow.trace.phases["forward"]
    assert sum(tally.figures().values()) == 0  # and nothing crosses within
    return tally.launches


def test_tables_of_modulation_are_one_sum():
    """And not one for each block, behind a cast: 80 tiny launches of a 14B model's pass.

    What is left of sums is the padding's, one in each cross-attention.
    """
    two, four = launches_of(2), launches_of(4)
    assert two["sora::packed_attention"] == 4
    assert four["sora::packed_attention"] == 8
    assert four["aten::add"] - two["aten::add"] <= 2


class InShadow(LocalExecutor):
    """An executor whose thread has the shadow device too."""

    def __init__(self, model, shadow):
        super().__init__(model)
        self.shadow, self.devices = shadow, set()

    def make_current(self):
        for mode in modes(self.shadow):
            mode.__enter__()  # for as long as the thread lives
        super().make_current()

    def step(self, canvases, max_tokens):
        self.devices.add(torch.cuda.current_device())
        return super().step(canvases, max_tokens)


def test_an_engine_on_the_second_gpu_launches_there(tmp_path):
    """Every thread begins at the first device, and Triton launches where the thread is."""
    with shadow_device(2) as shadow:
        model = load(build("t2v", tmp_path), shadow, "cuda:1")
        executor = InShadow(model, shadow)
        with sora.Engine(replicas=[executor]) as engine:
            video = engine.generate(REQUESTS["plain"](Sizes(model)))
        assert executor.devices == {1}
        assert shadow.current == 0  # the caller's own
    assert video.latents.isfinite().all()
    assert video.receipt.device == "cuda:1"
