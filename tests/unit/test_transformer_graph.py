"""Small passes of a transformer that are recorded once and replayed, by a stand-in for CUDA graphs:
they give the bits of the passes that they stand for, and live as long as their composition."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import pytest
import torch

from sora_engine.bench.models import WAN_1_3B, WAN_14B
from sora_engine.config import Limits
from sora_engine.denoise.packing import VIDEO, PackedBatch, Packer, Segment
from sora_engine.errors import BackendError
from sora_engine.models import cuda_graph, loading
from sora_engine.models.cuda_graph import EAGER_PASSES, MOST_GRAPHS, GraphedPasses
from sora_engine.models.loading import load_video_model
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer, transformer_shape
from sora_engine.request import VideoRequest, resolve_request
from sora_engine.runtime.memory import MemoryPlanner
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import REQUESTS, Sizes, build, load, walk
from sora_engine.vae.recording import record
from tests.parity.oracles import TINY_TRANSFORMER, tiny_transformer
from tests.recorder import WORKSPACE, Recorder

CPU = torch.device("cpu")


class Setting:
    """A tiny transformer beside one that replays, contexts, and a packer."""

    def __init__(self, **options):
        weights = tiny_transformer(0).state_dict()
        self.plain, self.replaying = (
            WanTransformer(WanConfig(**TINY_TRANSFORMER)).eval().requires_grad_(False)
            for _ in range(2)
        )
        for model in (self.plain, self.replaying):
            model.load_state_dict(weights)
        self.recorder = options.pop("recorder", Recorder())
        self.replaying.replay_passes(recorder=self.recorder, **options)
        torch.manual_seed(0)
        texts = [{"text": torch.randn(n, 32)} for n in (3, 7, 32)]
        self.contexts = self.plain.encode_contexts(texts)
        self.packer = Packer((1, 2, 2), CPU)

    @property
    def graphs(self) -> GraphedPasses:
        assert self.replaying.graphs is not None
        return self.replaying.graphs

    def batch(self, *which, levels=None, step=0, size=(3, 4, 6)) -> PackedBatch:
        """Segments with these contexts, at a step's noise level or at given ones."""
        generator = torch.Generator().manual_seed(step)
        timesteps = torch.full(size[:1], 900.0 - step) if levels is None else torch.tensor(levels)
        return self.packer.pack(
            [
                Segment(
                    torch.randn(16, *size, generator=generator).to(self.packer.device),
                    timesteps,
                    ((self.contexts[i], 3),),
                )
                for i in which
            ]
        )

    def check(self, batch) -> torch.Tensor:
        """The same bits by both; returns the predictions."""
        predictions = self.replaying(batch)
        assert torch.equal(predictions, self.plain(batch))
        return predictions


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_replayed_passes_are_the_same_bits():
    made = Setting()
    kept = []
    for step in range(EAGER_PASSES + 4):
        batch = made.batch(0, 1, step=step)
        kept.append((made.check(batch), batch))
    assert (made.recorder.recordings, made.recorder.replays) == (1, 4)
    for predictions, batch in kept:  # what was given is not written over
        assert torch.equal(predictions, made.plain(batch))


def test_compositions_take_turns():
    made = Setting()
    compositions = [(0,), (1,), (2, 0)]
    for step in range(EAGER_PASSES + 2):
        for which in compositions:
            made.check(made.batch(*which, step=step))
    assert made.recorder.recordings == len(compositions)
    assert made.recorder.replays == 2 * len(compositions)


def test_noise_levels_of_another_number_are_another_graph():
    made = Setting()
    for step in range(EAGER_PASSES + 2):
        made.check(made.batch(0, step=step))
        made.check(made.batch(0, step=step, levels=[0.0, 900.0 - step, 900.0 - step]))
        made.check(made.batch(0, step=step, levels=[900.0 - step, 0.0, 0.0]))  # rows change places
    assert made.recorder.recordings == 2
    steps = EAGER_PASSES + 2
    assert made.recorder.replays == steps - EAGER_PASSES + 2 * steps - EAGER_PASSES


def test_a_graph_lives_as_long_as_its_composition():
    made = Setting()
    for which in ((0,), (1,)):
        for step in range(EAGER_PASSES + 1):
            made.check(made.batch(*which, step=step))
    assert made.graphs.num_graphs == 2
    assert made.graphs.workspace_bytes == 2 * WORKSPACE
    made.packer.clear()
    gc.collect()
    assert made.graphs.num_graphs == 0
    assert made.graphs.workspace_bytes == 0
    made.check(made.batch(0))  # begins again
    assert made.recorder.recordings == 2


def test_the_oldest_graph_makes_room():
    made = Setting()
    made.packer.max_layouts = MOST_GRAPHS + 2
    compositions = [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)][: MOST_GRAPHS + 1]
    for which in compositions[:MOST_GRAPHS]:
        for step in range(EAGER_PASSES + 1):
            made.check(made.batch(*which, step=step))
    made.check(made.batch(*compositions[0], step=9))  # so that the second is the oldest
    for step in range(EAGER_PASSES + 1):
        made.check(made.batch(*compositions[-1], step=step))
    assert made.graphs.num_graphs == MOST_GRAPHS
    recordings = made.recorder.recordings
    made.check(made.batch(*compositions[0], step=10))
    assert made.recorder.recordings == recordings
    for step in range(EAGER_PASSES + 1):
        made.check(made.batch(*compositions[1], step=step))
    assert made.recorder.recordings == recordings + 1


def test_weights_that_were_changed_are_asked_for():
    made = Setting()
    for step in range(EAGER_PASSES + 1):
        made.check(made.batch(0, step=step))
    for model in (made.plain, made.replaying):
        model.blocks[0].attn1.to_q.weight.data = model.blocks[0].attn1.to_q.weight.data * 2
    made.graphs.clear()
    for step in range(EAGER_PASSES + 2):
        made.check(made.batch(0, step=step))
    assert made.recorder.recordings == 2


def refuse(step, device):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_pass_that_cannot_be_recorded_runs_as_it_is(caplog):
    made = Setting(recorder=refuse)
    with caplog.at_level(logging.WARNING):
        for which in ((0,), (1,)):
            for step in range(EAGER_PASSES + 3):
                made.check(made.batch(*which, step=step))
    assert caplog.text.count("cannot be a CUDA graph: operation not permitted") == 1
    assert made.graphs.num_graphs == 0
    required = Setting(recorder=refuse, required=True)
    for step in range(EAGER_PASSES):
        required.check(required.batch(0, step=step))
    with pytest.raises(BackendError, match=r"over 18 tokens cannot be a CUDA graph: operation not"):
        required.replaying(required.batch(0, step=9))


def others(batch: PackedBatch) -> dict[str, PackedBatch]:
    """Batches that are not recorded, by the reason."""
    video = batch.video

    def with_video(**changes):
        return replace(batch, streams={"video": replace(video, **changes)})

    everything = tuple(torch.ones(t, t, dtype=torch.bool) for t, _, _ in video.grids)
    return {
        "no layout": replace(batch, layout=None),
        "sparse": with_video(sees=everything),
        "ranks": with_video(attend=lambda q, k, v, stream, *, backend: q),
        "another stream": replace(batch, streams={"video": video, "text": video}),
    }


@pytest.mark.parametrize("reason", ["no layout", "sparse", "ranks", "another stream"])
def test_other_passes_run_as_they_are(reason):
    made = Setting()
    for step in range(EAGER_PASSES + 3):
        made.check(others(made.batch(0, 1, step=step))[reason])
    assert made.recorder.recordings == 0


def test_what_a_batch_carries_beside_is_not_passed_over(monkeypatch):
    """A field that a batch has and a graph does not know of: the pass runs as it is."""
    made = Setting()
    monkeypatch.setattr(cuda_graph, "_UNKNOWN", {"pooled": None})
    for step in range(EAGER_PASSES + 3):
        made.check(replace(made.batch(0, step=step), pooled=("adapters",)))
    assert made.recorder.recordings == 0
    for step in range(EAGER_PASSES + 3):
        made.check(made.batch(0, step=step))
    assert made.recorder.recordings == 1


def test_large_passes_are_not_recorded(monkeypatch):
    made = Setting()
    flop = cuda_graph.block_flop(made.plain.shape)
    monkeypatch.setattr(cuda_graph, "MOST_BLOCK_FLOP", 19 * flop)  # 18 tokens a segment
    for step in range(EAGER_PASSES + 3):
        made.check(made.batch(0, 1, step=step))
    assert made.recorder.recordings == 0
    for step in range(EAGER_PASSES + 3):
        made.check(made.batch(0, step=step))
    assert made.recorder.recordings == 1
    assert Setting(required=True).graphs.replays(1 << 30)


def test_gradients_are_not_recorded():
    made = Setting()
    with torch.inference_mode(False), torch.enable_grad():
        for step in range(EAGER_PASSES + 3):
            made.check(made.batch(0, step=step))
    assert made.recorder.recordings == 0


# An engine's model.


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return build("t2v", tmp_path_factory.mktemp("t2v"))


@pytest.mark.parametrize(
    ("options", "replays"),
    [
        ({}, True),
        ({"cuda_graphs": "on"}, True),
        ({"cuda_graphs": "off"}, False),
        ({"offload": "blocks"}, False),  # weights come and go
        ({"alone": False}, False),  # ranks
        ({"device": "cpu"}, False),
    ],
    ids=str,
)
def test_passes_are_replayed_where_weights_stay_on_one_device(
    pipeline, options, replays, monkeypatch
):
    for offload in ("offload_blocks", "offload_encoder"):  # there are no streams here
        monkeypatch.setattr(loading, offload, lambda *args, **kwargs: None)
    with shadow_device():
        model = load_video_model(pipeline, **{"device": "cuda", **options})
        assert (model.transformer(0).graphs is not None) == replays


@pytest.mark.parametrize("task", ["plain", "windows", "sparse"])
def test_a_request_on_a_shadow_device_is_the_same(pipeline, task):
    """All that the host does for it; sparse attention is planned anew in each step."""
    with shadow_device() as shadow:
        model = load(pipeline, shadow)
        transformer = model.transformer(0)
        request = REQUESTS[task](Sizes(model))
        ran = []

        def recorder(step, device):
            ran.append(device)
            return step, 0

        found = {}
        for replays in (True, False):
            if replays:
                transformer.replay_passes(recorder=recorder)
            else:
                del transformer.forward
            found[replays] = walk(model, request, shadow, decode=False).latents
            gc.collect()
            assert transformer.graphs.num_graphs == 0  # the compositions are gone
        assert torch.equal(found[True], found[False])
        assert bool(ran) == (task != "sparse")
        assert {str(device) for device in ran} <= {"cuda:0"}


def test_what_a_graph_works_in_is_in_the_promise(pipeline, monkeypatch):
    """It stays reserved between two steps, as long as other jobs compute."""
    model = load_video_model(pipeline, device="cpu")
    request = resolve_request(VideoRequest("a ball", height=32, width=32), model, Limits())
    monkeypatch.setattr(MemoryPlanner, "_decode", lambda *args: (0, 0))

    def plan():
        return MemoryPlanner(model, 1 << 20, None).plan(request)

    plain = plan()
    model.transformer(0).replay_passes(recorder=Recorder())
    replayed = plan()
    assert plain.held < plain.denoise
    assert replayed.held == replayed.denoise == plain.denoise


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_equal_the_passes_that_they_record():
    made = Setting(recorder=record, required=True)
    made.packer = Packer((1, 2, 2), torch.device("cuda"))
    for model in (made.plain, made.replaying):
        model.cuda().bfloat16().prepare()
    texts = [{"text": torch.randn(n, 32, device="cuda")} for n in (3, 7)]
    made.contexts = made.plain.encode_contexts(texts)
    for step in range(EAGER_PASSES + 3):
        for which in ((0,), (0, 1), (1, 0, 1)):
            made.check(made.batch(*which, step=step))
    assert made.graphs.num_graphs == 3
    assert made.graphs.workspace_bytes > 0
    made.packer.clear()
    gc.collect()
    assert made.graphs.num_graphs == 0


def test_the_arithmetic_of_a_block_is_that_of_its_weights():
    """Against the layers themselves, and the sizes at which it draws the line."""
    most = {}
    for name, sizes in (("1.3B", WAN_1_3B), ("14B", WAN_14B)):
        config = WanConfig.from_dict({**sizes.transformer_config(), "num_layers": 1})
        with torch.device("meta"):
            block = WanTransformer(config).blocks[0]
        layers = {
            layer: module.weight.numel()
            for layer, module in block.named_modules()
            if isinstance(module, torch.nn.Linear) and layer not in ("attn2.to_k", "attn2.to_v")
        }
        shape = transformer_shape(config, 512)
        assert cuda_graph.block_flop(shape) == 2 * sum(layers.values())
        most[name] = int(cuda_graph.MOST_BLOCK_FLOP / cuda_graph.block_flop(shape))
    assert 3000 < most["1.3B"] < 4500
    assert 400 < most["14B"] < 800


def test_what_is_added_to_tokens_is_read_anew():
    """Passes that a camera adds to run as they are: no graph has another step's windows in it."""
    setting = Setting()
    for step in range(EAGER_PASSES + 3):
        batch = setting.batch(0, 1, step=step)
        added = torch.randn(len(batch.video.tokens), 24)
        video = replace(batch.video, control=added)
        made = setting.check(replace(batch, streams={VIDEO: video}))
        assert not torch.allclose(made, setting.plain(batch))
    assert setting.graphs.num_graphs == 0
