"""Weights that wait in host memory: the same results, and two blocks on the device at a time."""

from __future__ import annotations

import copy
import ctypes
import random
import shutil
import subprocess
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sora_engine as sora
from sora_engine.errors import BackendError, LayoutError
from sora_engine.models import loading, offload, video_model
from sora_engine.models.offload import OffloadedModules, level_that_fits
from sora_engine.models.registry import open_checkpoint
from sora_engine.runtime.engine import default_peak
from tests.parity.oracles import tiny_pipeline

CPU = torch.device("cpu")
SIZE = {"height": 32, "width": 32, "num_frames": 9, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def folder(kind: str):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_pipeline(kind, seed=3).save_pretrained(made[kind])
        return made[kind]

    return folder


class Absent(OffloadedModules):
    """Weights that cannot be read where they wait: on a CPU nothing else would tell."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._at_home = [[torch.full_like(t, float("nan")) for t in ts] for ts in self._tensors]
        for tensors, nothing in zip(self._tensors, self._at_home, strict=True):
            offload._point(tensors, nothing)


@pytest.mark.parametrize("level", ["text", "blocks"])
@pytest.mark.parametrize("kind", ["t2v", "i2v", "a14b-t2v", "vace"])
def test_results_are_the_same_bit_for_bit(folders, kind, level, monkeypatch):
    monkeypatch.setattr(offload, "OffloadedModules", Absent)
    clips = [] if kind != "i2v" else [sora.Clip(torch.rand(1, 32, 32, 3).mul(255).byte().numpy())]
    request = sora.VideoRequest(prompt="a red circle moves left", seed=1, clips=clips, **SIZE)
    videos = {}
    for chosen in ("none", level):
        with sora.Engine.from_pretrained(folders(kind), offload=chosen) as engine:
            assert engine.model.offload == chosen
            videos[chosen] = [engine.generate(request) for _ in range(2)]
    for video in videos[level]:
        assert torch.equal(video.latents, videos["none"][0].latents)
        assert (video.frames == videos["none"][0].frames).all()


class Scaled(nn.Module):
    """A module whose weights are seen when its work is done, not when it is asked for."""

    def __init__(self, value: float, size: int, device: Device) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.full((size,), value), requires_grad=False)
        self.second = nn.Parameter(torch.full((3,), -value), requires_grad=False)
        self.device = device

    def forward(self) -> None:
        first, second = self.first.data, self.second.data
        self.device.give("main", lambda: self.device.seen.append((first.clone(), second.clone())))


class Device:
    """Two queues of work, done in any order that the waits between them leave open."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.queues: dict[str, list] = {"main": [], "copies": []}
        self.events: set[int] = set()
        self.count = 0
        self.seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def give(self, queue, work, after=None) -> int:
        self.count += 1
        self.queues[queue].append((self.count, work, after))
        return self.count

    def run(self) -> None:
        while any(self.queues.values()):
            ready = [
                queue
                for queue in self.queues.values()
                if queue and (queue[0][2] is None or queue[0][2] in self.events)
            ]
            number, work, _ = self.rng.choice(ready).pop(0)
            work()
            self.events.add(number)

    # As `StreamCopies`.

    def start(self, target, source, after):
        return self.give("copies", lambda: target.copy_(source), after)

    def wait(self, copy):
        self.give("main", lambda: None, copy)

    def so_far(self):
        return self.give("main", lambda: None)


@pytest.mark.parametrize("seed", range(40))
def test_copies_beside_the_work_come_in_time_and_not_too_soon(seed):
    rng, device = random.Random(seed), Device(seed)
    modules = [Scaled(i + 1.0, rng.randrange(1, 900), device) for i in range(rng.randrange(1, 6))]
    OffloadedModules(modules, CPU, copies=device)
    # Mostly in turn, as blocks run; at times not.
    order = [
        i if rng.random() < 0.8 else rng.randrange(len(modules))
        for _ in range(6)
        for i in range(len(modules))
    ]
    for i in order:
        modules[i]()
    device.run()
    assert len(device.seen) == len(order)
    for i, (first, second) in zip(order, device.seen, strict=True):
        assert torch.equal(first, torch.full_like(modules[i].first, i + 1.0))
        assert torch.equal(second, torch.full_like(modules[i].second, -(i + 1.0)))


class Nested(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), value), requires_grad=False)

    def forward(self, fail: bool = False) -> tuple[int, torch.Tensor]:
        if fail:
            raise RuntimeError("in the middle")
        return self.weight.data_ptr(), self.other()

    def other(self) -> torch.Tensor:
        return self.weight.clone()


def test_two_places_whatever_the_number_of_modules():
    modules = [Nested(float(i)) for i in range(5)]
    visits = OffloadedModules(modules, CPU, methods=("forward", "other"))
    at_home = [module.weight.data_ptr() for module in modules]
    places = set()
    for _ in range(3):
        for i, module in enumerate(modules):
            place, weight = module()
            assert torch.equal(weight, torch.full((4,), float(i)))
            places.add(place)
            assert module.weight.data_ptr() == at_home[i] != place
    assert len(places) == 2
    assert (visits.device_bytes, visits.host_bytes) == (2 * 256, 5 * 256)


def test_an_error_leaves_the_weights_at_home():
    modules = [Nested(1.0), Nested(2.0)]
    OffloadedModules(modules, CPU, methods=("forward", "other"))
    home = modules[0].weight.data_ptr()
    with pytest.raises(RuntimeError, match="in the middle"):
        modules[0](fail=True)
    assert modules[0].weight.data_ptr() == home
    assert torch.equal(modules[1]()[1], torch.full((4,), 2.0))
    assert torch.equal(modules[0]()[1], torch.full((4,), 1.0))


def test_weights_that_are_trained_stay():
    with pytest.raises(ValueError, match="gradient"):
        OffloadedModules([nn.Linear(2, 2)], CPU)


def test_an_expert_that_is_let_go_takes_no_memory(folders, monkeypatch):
    monkeypatch.setattr(video_model.VideoModel, "_fits", lambda model, expert: False)
    with sora.Engine.from_pretrained(folders("a14b-t2v"), offload="blocks") as engine:
        first = engine.model.transformer(0)
        weight = weakref.ref(first.blocks[0].ffn.get_submodule("net.2").weight)
        del first
        engine.model.transformer(1)
        assert weight() is None


def test_the_lowest_level_that_fits():
    sizes = {"text": 10, "transformers": 30, "rest": 5}
    found = [level_that_fits(free, **sizes) for free in (45, 44, 35, 34, 0)]
    assert found == ["none", "text", "text", "blocks", "blocks"]


def test_auto_keeps_a_usual_request_free(folders, monkeypatch):
    # Planned is a request of the checkpoint's default size, which takes more than the weights of so
    # small a model.
    with sora.Engine.from_pretrained(folders("t2v"), offload="auto") as engine:
        loaded = engine.model
        assert loaded.offload == "none"  # a CPU has but one memory
        needed = engine.plan(sora.VideoRequest(prompt="a red circle")).peak
    text = sum(weight.nbytes for weight in loaded.prompt_encoder.modules[0].parameters())
    transformers = loaded.experts[0].size_bytes
    assert needed > 10 * (text + transformers)

    def chosen(free: int) -> tuple[str, int]:
        told = []

        def plan(hollow):
            assert {p.device.type for p in hollow.prompt_encoder.modules[0].parameters()} == {
                "meta"
            }
            assert {p.device.type for p in hollow.transformer(0).parameters()} == {"meta"}
            told.append(default_peak(hollow, sora.Limits()))
            return told[-1]

        monkeypatch.setattr(loading, "free_bytes", lambda device: free)
        checkpoint, _ = open_checkpoint(folders("t2v"))
        encoder = loading.load_prompt_encoder(checkpoint, CPU, torch.float32, "auto")
        hollow = replace(
            loaded,
            prompt_encoder=encoder,
            experts=[
                replace(e, transformer=copy.deepcopy(e.transformer).to("meta"))
                for e in loaded.experts
            ],
        )
        return loading._level_for(hollow, plan), told[0]

    _, planned = chosen(0)
    assert 0.8 * needed < planned < 1.25 * needed
    for more, level in ((text + transformers, "none"), (transformers, "text"), (0, "blocks")):
        assert chosen(int((planned + more + 100) / 0.9))[0] == level


def test_bad_levels_are_refused(folders):
    with pytest.raises(BackendError, match="offload must be auto, none, text, blocks, got 'disk'"):
        sora.Engine.from_pretrained(folders("t2v"), offload="disk")
    with pytest.raises(LayoutError, match="shard_weights"):
        sora.Engine.from_pretrained(
            folders("t2v"),
            offload="blocks",
            device="cpu",
            parallel=sora.ParallelConfig(guidance=2),
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("level", ["text", "blocks"])
def test_on_a_gpu_too(folders, level):
    request = sora.VideoRequest(prompt="a red circle moves left", seed=1, **SIZE)
    latents = {}
    for chosen in ("none", level):
        with sora.Engine.from_pretrained(
            folders("t2v"), device="cuda", dtype="float32", offload=chosen
        ) as engine:
            latents[chosen] = [engine.generate(request).latents for _ in range(3)]
    for got in latents[level]:
        assert torch.equal(got, latents["none"][0])


RUNTIME = """
static int last = 2;
int cudaGetLastError(void) { int error = last; last = 0; return error; }
"""


def test_memory_that_cannot_be_pinned_leaves_no_error_behind(tmp_path, monkeypatch, caplog):
    """The next kernel's launch would raise it. A stand-in of the library holds the error."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    (tmp_path / "runtime.c").write_text(RUNTIME)
    library = tmp_path / "libcudart.so.13"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", library, tmp_path / "runtime.c"], check=True
    )
    loaded = ctypes.CDLL(str(library))
    refuses = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refuses)
    assert offload._pin(torch.zeros(16, dtype=torch.uint8)) is None
    assert "cannot be pinned (CUDA error 2)" in caplog.text
    assert loaded.cudaGetLastError() == 0
