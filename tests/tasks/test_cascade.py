"""Cascades on sprites and on a tiny Latte: stages, one progress, one plan, one receipt."""

from __future__ import annotations

import subprocess
import sys
import weakref
from concurrent.futures import Future

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine import tasks
from sora_engine.cli import main
from sora_engine.errors import JobCancelledError, MemoryLimitError, RequestError
from sora_engine.request.cascade import Stage, spread, staged
from sora_engine.runtime import cascade as cascade_of_runtime
from tests.parity.latent_models import tiny_latte_pipeline

BASE = sora.VideoRequest(
    "a big red circle moves left on a blue background",
    height=32, width=32, num_frames=9, num_inference_steps=4, seed=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def engine():
    with sora.Engine.from_pretrained("sprites", device="cpu") as made:
        yield made


def test_it_is_what_its_passes_are_by_themselves(engine):
    stages = [
        Stage(scale=2, strength=0.5, steps=4),
        Stage(frames=2, strength=0.75, steps=4, guidance_scale=1.0),
    ]
    told = []
    job = sora.submit_cascade(tasks.cascade(BASE, stages), engine, on_progress=told.append)
    made = job.result(120)
    # By hand, each pass a request of its own.
    first = engine.generate(BASE)
    larger = {"height": 64, "width": 64, "num_inference_steps": 4}
    second = engine.generate(
        sora.VideoRequest(BASE.prompt, num_frames=9, seed=3, init=first, strength=0.5, **larger)
    )
    frames = second.frames.astype(np.float64)
    between = np.empty((17, 64, 64, 3))
    between[::2], between[1::2] = frames, (frames[:-1] + frames[1:]) / 2
    third = engine.generate(
        sora.VideoRequest(
            BASE.prompt, num_frames=17, seed=3, init=between.round().astype(np.uint8),
            strength=0.75, guidance_scale=1.0, fps=16, **larger,
        )
    )  # fmt: skip
    assert made.frames.shape == (17, 64, 64, 3)
    assert made.fps == 2 * first.fps
    assert np.array_equal(made.frames, third.frames)
    # One progress: it only rises, over the steps of all passes.
    counts = [progress.steps_done for progress in told]
    assert counts == sorted(counts)
    assert counts[-1] == told[0].num_steps == 4 + 2 + 3
    assert told[-1].state is sora.JobState.COMPLETED
    assert told[-1].frames_decoded == told[-1].num_frames == 17
    # One plan and one receipt.
    assert len(job.plan.passes) == len(job.requests) == 3
    assert job.plan.handed == (0, 9 * 32 * 32 * 3, (9 + 17) * 64 * 64 * 3)
    decodes = max(plan.decode for plan in job.plan.passes)
    assert job.plan.peak == decodes  # what was handed on is gone by then
    assert made.receipt.promised_bytes == job.plan.peak
    assert len(made.receipt.stages) == 2
    assert made.receipt.to_dict()["stages"][0]["seed"] == 3
    assert set(made.timings_s) >= {"denoising", "decoding"}


def test_nobody_holds_a_pass_s_video_once_the_next_has_encoded_it(engine, monkeypatch):
    given, left = [], []

    def watched(*arguments):
        request = staged(*arguments)
        if arguments[2] is not None:
            start = request.init if isinstance(request.init, np.ndarray) else request.init.frames
            given.extend(weakref.ref(array) for array in (start, arguments[2].frames))
        return request

    def look(progress):
        if progress.state is sora.JobState.DENOISING and given:
            left.append(sum(ref() is not None for ref in given))

    monkeypatch.setattr(cascade_of_runtime, "staged", watched)
    stages = [Stage(scale=2, strength=0.5), Stage(frames=2, strength=0.5)]
    sora.submit_cascade(tasks.cascade(BASE, stages), engine, on_progress=look).result(120)
    assert len(given) == 4
    assert len(left) > 4
    assert not any(left)


def test_stages_may_have_engines_of_their_own(engine):
    with sora.Engine.from_pretrained("sprites", device="cpu", dtype="bfloat16") as other:
        stage = Stage(scale=2, strength=0.5, steps=2, engine="half")
        job = sora.submit_cascade(tasks.cascade(BASE, [stage]), engine, {"half": other})
        made = job.result(60)
    assert made.receipt.dtype == "bfloat16"
    assert made.receipt.stages[0]["dtype"] == "float32"


def test_known_frames_stay_where_latents_hold_one_frame_each(tmp_path):
    """Frames between are made round them: they are not noised and taken back."""
    tiny_latte_pipeline().save_pretrained(tmp_path)
    base = sora.VideoRequest(
        "waves", height=16, width=16, num_frames=2, num_inference_steps=2, guidance_scale=1.0,
        seed=1,
    )  # fmt: skip
    with sora.Engine.from_pretrained(tmp_path, device="cpu") as engine:
        small = engine.generate(base)
        stage = Stage(frames=2, steps=2)
        made = sora.submit_cascade(tasks.cascade(base, [stage]), engine).result(60)
        pixels = torch.from_numpy(small.frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        vae = engine.loaded_model.vae
        kept = torch.cat([vae.encode(frame) for frame in pixels.split(1, dim=2)], dim=2)
        kept = vae.denormalise(kept)[0]
    assert made.frames.shape == (3, 16, 16, 3)
    assert torch.allclose(made.latents[:, ::2], kept, atol=1e-4)
    assert not torch.allclose(made.latents[:, 1], kept[:, 0], atol=1e-2)


def test_what_cannot_be_is_told_before_any_work(engine):
    def submit(*stages, base=BASE, **options):
        return sora.submit_cascade(tasks.cascade(base, list(stages)), engine, **options)

    cases = [
        (lambda: tasks.cascade(BASE, []), "has one Stage or more after its base"),
        (lambda: tasks.cascade(BASE, ["scale=2"]), "has one Stage or more after its base"),
        (lambda: Stage(scale=0.5), "scale 0.5: a stage's is from 1 to 8"),
        (lambda: Stage(frames=9), "frames 9: a stage makes 1 to 8 of one"),
        (lambda: Stage(strength=1.5), "strength 1.5 of a stage"),
        (lambda: Stage(upsampler=3), "upsampler 3 of a stage must be a path"),
        (lambda: Stage.parse("scale=two"), "scale 'two' is no number"),
        (lambda: Stage.parse("size=2"), "'size=2' is none of NAME=VALUE"),
        (lambda: Stage.parse("scale=2,scale=3"), "'scale=3' is none of NAME=VALUE"),
        (lambda: submit(Stage(scale=2, engine="other")), "names the engine 'other'.*: none"),
        (lambda: submit(Stage(scale=2, steps=0)), "stage 1 of the cascade: num_inference_steps"),
        (
            lambda: tasks.cascade(sora.VideoRequest("a", loop=True), [Stage(scale=2)]),
            "loop: a cascade carries none",
        ),
    ]
    for run, message in cases:
        with pytest.raises(RequestError, match=message):
            run()
    assert engine.num_queued == engine.num_running == 0


def test_its_peak_is_below_that_of_one_pass_at_the_full_size(engine):
    """As `examples/sprites/cascade.py` makes its videos."""
    large = sora.VideoRequest(BASE.prompt, height=128, width=128, num_frames=33)
    small = sora.VideoRequest(BASE.prompt, height=64, width=64, num_frames=17)
    stages = [Stage(scale=2, strength=0.4), Stage(frames=2, strength=0.3, guidance_scale=1.0)]
    job = sora.submit_cascade(tasks.cascade(small, stages), engine)
    job.cancel()
    assert job.plan.passes[-1].decode > job.plan.passes[0].decode
    assert job.plan.peak < engine.plan(large).peak


def test_a_stage_beyond_the_memory_is_refused_before_the_base_is_made():
    limits = sora.Limits(memory_bytes=12 << 20)
    with sora.Engine.from_pretrained("sprites", device="cpu", limits=limits) as small:
        assert small.plan(BASE).peak < 12 << 20
        with pytest.raises(MemoryLimitError, match="stage 1 of the cascade"):
            sora.submit_cascade(tasks.cascade(BASE, [Stage(scale=4)]), small)


def test_it_stops_when_it_is_told(engine):
    submitted = Future()

    def stop(progress):
        if progress.steps_done == 5:
            submitted.result(60).cancel()

    stages = [Stage(scale=2, strength=1.0, steps=20)]
    job = sora.submit_cascade(tasks.cascade(BASE, stages), engine, on_progress=stop)
    submitted.set_result(job)
    with pytest.raises(JobCancelledError):
        job.result(60)
    assert job.state is sora.JobState.CANCELLED
    assert job.progress.steps_done < 20


def test_frames_go_over_evenly_from_one_to_the_next():
    frames = np.array([0, 30, 0], np.uint8)[:, None, None, None] * np.ones((3, 2, 2, 3), np.uint8)
    out, known = spread(frames, 3)
    assert out[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 20, 10, 0]
    assert known.tolist() == [True, False, False] * 2 + [True]


def test_the_command_makes_one(tmp_path):
    """In a fresh process: what it imports, it imports by itself."""
    command = [
        sys.executable, "-m", "sora_engine", "generate", BASE.prompt, "--frames", "5", "--size",
        "32x32", "--steps", "2", "--cascade", "scale=2,strength=0.5,steps=2", "--cascade",
        "frames=2,strength=1,steps=2", "-o", str(tmp_path / "out.mp4"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "64x64, 9 frames at 16 fps" in done.stderr + done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cascade", "scale=2", "--draft"], "--cascade says which passes there are"),
        (["--cascade", "scale=two"], "scale 'two' is no number"),
        (["--cascade", "scale=2", "--loop"], "a cascade carries none from stage to stage"),
    ],
)
def test_the_command_refuses_what_cannot_be(options, message, capsys):
    assert main(["generate", "a ball", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
