"""Every task is a canvas: what is known stays, what wraps closes, windows change nothing else.

On tiny random weights: the frames show nothing, but what must be equal is equal.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.denoise.packing import Segment
from tests.parity.oracles import relative_error, tiny_pipeline


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipeline(kind, 0) for kind in ("ti2v-5b", "t2v")}


@pytest.fixture(scope="module")
def folders(pipes, tmp_path_factory):
    made = {}
    for kind, pipe in pipes.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        pipe.save_pretrained(made[kind])
    return made


@pytest.fixture(scope="module")
def engines(folders):
    made = {kind: sora.Engine.from_pretrained(path, device="cpu") for kind, path in folders.items()}
    yield made
    for engine in made.values():
        engine.close()


def a_clip(num_frames: int, seed: int = 0, size: int = 32) -> np.ndarray:
    shape = (num_frames, size, size, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def a_request(**values):
    defaults = {"height": 32, "width": 32, "num_frames": 17, "num_inference_steps": 3, "seed": 1}
    return sora.VideoRequest("a red circle", **{**defaults, **values})


def oracle_latents(pipe, frames: np.ndarray) -> torch.Tensor:
    """diffusers' mean latents of frames, as the decoder takes them."""
    video = torch.from_numpy(frames).permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(video).latent_dist.mode()[0]


@pytest.mark.parametrize("kind", ["ti2v-5b", "t2v"])
@pytest.mark.parametrize(
    ("placed", "known"),
    [
        ({0: 1}, [0]),
        ({0: 9}, [0, 1, 2]),
        ({9: 8}, [3, 4]),
        ({0: 5, 13: 4}, [0, 1, 4]),
        ({0: 3, 5: 5}, [0, 2]),
    ],
    ids=["animate", "extend forward", "extend backward", "connect", "fill"],
)
def test_known_frames_are_kept_in_their_place(pipes, engines, kind, placed, known):
    """Known latents are those that diffusers' encoder gives for the time line, and stay."""
    clip = a_clip(17)
    clips = [sora.Clip(clip[at : at + n], at=at) for at, n in placed.items()]
    video = engines[kind].generate(a_request(clips=clips))
    # Unknown frames stand still at the nearest known one while the clips are encoded.
    frames = sorted(at + i for at, n in placed.items() for i in range(n))
    nearest = [min(frames, key=lambda f, i=i: (abs(f - i), f)) for i in range(17)]
    expected = oracle_latents(pipes[kind], clip[nearest])
    plain = engines[kind].generate(a_request())
    for t in range(5):
        if t in known:
            assert relative_error(video.latents[:, t], expected[:, t]) < 1e-4
        else:
            assert relative_error(video.latents[:, t], expected[:, t]) > 1e-2
            assert not torch.equal(video.latents[:, t], plain.latents[:, t])


def test_a_mask_makes_known_what_it_covers_whole(pipes, engines):
    """A token is known where all of its pixels are, and holds nothing of what is not known."""
    clip = a_clip(17, size=64)
    mask = np.zeros((64, 64), bool)
    mask[:, :40] = True
    # What is unknown follows from what is known: here, one colour beside another in each frame.
    clip[:, :, 36:] = np.arange(17, dtype=np.uint8)[:, None, None, None] * 9
    request = a_request(height=64, width=64, clips=[sora.Clip(clip, at=0, mask=mask)])
    video = engines["ti2v-5b"].generate(request)
    changed = clip.copy()
    changed[:, :, 40:] = a_clip(17, seed=5, size=64)[:, :, 40:]
    other = a_request(height=64, width=64, clips=[sora.Clip(changed, at=0, mask=mask)])
    assert torch.equal(engines["ti2v-5b"].generate(other).latents, video.latents)
    from sora_engine.denoise.known import fill_holes

    filled = np.stack([fill_holes(frame, mask) for frame in clip])
    expected = oracle_latents(pipes["ti2v-5b"], filled)
    assert relative_error(video.latents[..., :2], expected[..., :2]) < 1e-4
    assert relative_error(video.latents[..., 2:], expected[..., 2:]) > 1e-2


def test_holes_are_filled_from_round_about():
    """Known pixels stay as they are; a hole in one colour takes it; a hole between two is between;
    and what lay there has no part in it."""
    from sora_engine.denoise.known import fill_holes

    frame = np.full((20, 33, 3), (200, 30, 7), np.uint8)
    known = np.ones((20, 33), bool)
    known[5:12, 8:20] = False
    noisy = frame.copy()
    noisy[~known] = 255
    np.testing.assert_array_equal(fill_holes(noisy, known), frame)
    frame[:, 14:] = (0, 130, 7)
    between = fill_holes(frame, known)[~known].astype(int)
    np.testing.assert_array_equal(fill_holes(frame, known)[known], frame[known])
    assert (between >= (0, 29, 6)).all()
    assert (between <= (201, 131, 8)).all()
    assert between[:, 0].std() > 20
    one = np.zeros((20, 33), bool)
    one[19, 32] = True
    assert (fill_holes(frame, one) == (0, 130, 7)).all()


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (
            [sora.Clip(a_clip(17), mask=np.arange(17) == 3)],
            "cover no whole latent frame.*0, 1-4, 5-8, 9-12",
        ),
        ([sora.Clip(a_clip(5), at=14)], "ends at frame 19; the video has 17: at most 3 fit"),
        (
            [sora.Clip(a_clip(5)), sora.Clip(a_clip(5), at=3)],
            "overlap at frame 3.*begin at frame 5",
        ),
        ([sora.Clip(a_clip(1), mask=np.ones((3, 3), bool))], "mask is bool"),
        ([sora.Clip(np.zeros((1, 32, 32, 3), np.float32))], "uint8"),
        ([sora.Clip(np.zeros((32, 32), np.uint8))], "uint8"),
        ([sora.Clip(7)], "got int"),
        ([sora.Clip("/nowhere.png")], "/nowhere.png"),
    ],
)
def test_bad_clips(engines, clips, message):
    with pytest.raises((sora.RequestError, sora.MediaError), match=message):
        engines["ti2v-5b"].generate(a_request(clips=clips))


@pytest.mark.parametrize("num_frames", [4, 16])
def test_a_loop_is_decoded_closed(pipes, engines, num_frames):
    """Frames are those of a late lap of diffusers' decoder over the latents repeated."""
    video = engines["t2v"].generate(a_request(num_frames=num_frames, loop=True))
    assert video.frames.shape == (num_frames, 32, 32, 3)
    assert video.latents.shape[1] == num_frames // 4
    laps = 56 // (num_frames // 4)
    with torch.no_grad():
        decoded = pipes["t2v"].vae.decode(
            video.latents.repeat(1, laps, 1, 1)[None], return_dict=False
        )[0][0]
    lap = (
        ((decoded[:, -num_frames:] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 3, 0).numpy()
    )
    assert np.abs(video.frames - lap).max() <= 1


def test_one_window_is_the_plain_path_bit_for_bit(engines):
    plain = engines["t2v"].generate(a_request())
    for plan in (sora.WindowPlan(5, 2), sora.WindowPlan(9, 0, "flat", "moving")):
        windowed = engines["t2v"].generate(a_request(window=plan))
        assert torch.equal(windowed.latents, plain.latents)


def beside(segment, anchors):
    """The segment with `anchors` before its own frames, at noise level 0."""
    count, levels = anchors.shape[1], segment.timesteps
    if levels.ndim == 1:
        _, _, H, W = anchors.shape
        levels = levels[:, None, None].expand(-1, H // 2, W // 2)
    ((context, frames),) = segment.contexts
    return Segment(
        torch.cat([anchors, segment.latents], dim=1),
        torch.cat([torch.zeros(count, *levels.shape[1:]), levels]),
        ((context, count + frames),),
        num_anchors=count,
    )


def by_hand(engine, request, plan, order):
    """A chain out of canvases of one window each, `order`ed; latents as the sampler has them."""
    from sora_engine.denoise import denoise
    from sora_engine.denoise.canvas import Known
    from sora_engine.denoise.packing import Packer
    from sora_engine.samplers.noise import initial_noise

    model = engine.model
    resolved = engine.resolve(request)
    shape = model.grid.shape(32, 32, resolved.num_frames, loop=False)
    noise = initial_noise(resolved.seed, shape)
    made, settled = noise.clone(), torch.zeros(shape[1], dtype=torch.bool)
    whole = denoise.prepare(resolved, model)
    if whole.known is not None:
        made = torch.where(whole.known.mask, whole.known.latents, made)
    for start in order:
        window = slice(start, start + plan.length)
        part = replace(
            request, num_frames=4 * (plan.length - 1) + 1, window=None, clips=(), latents=None
        )
        canvas = denoise.prepare(engine.resolve(part), model)
        canvas.latents = canvas.noise = noise[:, window]
        mask = settled[window, None, None].expand(-1, *shape[2:])
        if whole.known is not None:
            mask = mask | whole.known.mask[window]
        canvas.known = Known(model.known_mode, made[:, window], mask)
        packer = Packer(model.grid.patch, model.device)
        with pytest.MonkeyPatch.context() as patch:
            if plan.anchors and settled.any():
                ends = order[0] + plan.length
                anchors = made[:, ends - plan.anchors : ends].clone()
                patch.setattr(
                    denoise,
                    "split",
                    lambda *of, split=denoise.split, anchors=anchors: [
                        replace(part, segment=beside(part.segment, anchors)) for part in split(*of)
                    ],
                )
            while not canvas.finished:
                predictions = denoise.predict([canvas], 0, model, packer, 10_000)
                denoise.advance(canvas, 0, predictions, None)
        lead = 1 if start else 0
        fresh = slice(start + lead, start + plan.length)
        made[:, fresh] = torch.where(settled[fresh, None, None], made[:, fresh],
                                     canvas.latents[:, lead:])  # fmt: skip
        settled[fresh] = True
    return made


FORWARD, BACKWARD = [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]
KNOWN = {
    "nothing known": (None, FORWARD),
    "known at the end": (25, BACKWARD),
    "known at the beginning": (0, FORWARD),
}


def chains():
    """Half of all cases are quick: among them each two of the three meet."""
    of_all = itertools.product(enumerate(KNOWN), range(3), enumerate(("euler", "unipc")))
    for (i, known), anchors, (j, solver) in of_all:
        marks = [pytest.mark.slow] * ((i + anchors + j) % 2)
        yield pytest.param(known, anchors, solver, marks=marks)


@pytest.mark.parametrize(("known", "anchors", "solver"), list(chains()))
@torch.inference_mode()
def test_a_chained_window_knows_what_those_before_it_made(engines, known, anchors, solver):
    """Step for step the canvases that one would make by hand: 8 latent frames in windows of 3."""
    engine, (at, order) = engines["ti2v-5b"], KNOWN[known]
    plan = sora.WindowPlan(3, 2, schedule="chained", anchors=anchors)
    clips = () if at is None else [sora.Clip(a_clip(4 if at else 1, seed=4), at=at)]
    request = a_request(num_frames=29, window=plan, solver=solver, clips=clips)
    job = engine.submit(request)
    made = job.result(300).latents
    assert job.progress.steps_done == job.progress.num_steps == 3 * 6
    expected = by_hand(engine, request, plan, order)
    expected = engine.model.vae.denormalise(expected[None])[0]
    assert relative_error(made, expected) < 1e-5
    static = engine.generate(replace(request, window=sora.WindowPlan(3, 2, free_noise=False)))
    assert relative_error(static.latents, made) > 1e-2
    whole = engine.generate(a_request(window=sora.WindowPlan(5, 2, schedule="chained")))
    assert torch.equal(whole.latents, engine.generate(a_request()).latents)


@torch.inference_mode()
def test_what_is_predicted_for_anchors_is_left_out(engines):
    from sora_engine.denoise import denoise
    from sora_engine.denoise.packing import Packer

    engine, plan = engines["ti2v-5b"], sora.WindowPlan(3, 2, schedule="chained", anchors=2)
    request = a_request(num_frames=29, window=plan, solver="euler", num_inference_steps=1)
    model, packer = engine.model, Packer(engine.model.grid.patch, torch.device("cpu"))
    canvas = denoise.prepare(engine.resolve(request), model)
    while canvas.windows_done < 3:
        predictions = denoise.predict([canvas], 0, model, packer, 10_000)
        denoise.advance(canvas, 0, predictions, None)
    predicted = denoise.predict([canvas], 0, model, packer, 10_000)[id(canvas), True]
    (window,) = canvas.windows()
    batch = packer.pack([canvas.segment(window, 0, conditional=True)])
    whole = packer.unpack(model.transformer(0)(batch), batch, 48)[0]
    assert (window.start, whole.shape[1]) == (3, 2 + 3)
    assert relative_error(predicted[:, 3:6], whole[:, 2:]) < 1e-6


def test_a_chained_loop_closes(engines):
    """Its first window's lead is made by its last one."""
    plan = sora.WindowPlan(3, 2, schedule="chained")
    request = a_request(num_frames=32, loop=True, window=plan, solver="renoise")
    first, again = (engines["ti2v-5b"].generate(request) for _ in range(2))
    assert first.frames.shape[0] == 32
    assert torch.isfinite(first.latents).all()
    assert torch.equal(first.latents, again.latents)


def test_what_cannot_be_chained(engines):
    plan = sora.WindowPlan(3, 2, schedule="chained")
    with pytest.raises(sora.RequestError, match="by replacement: 'static' or 'moving' would work"):
        engines["t2v"].generate(a_request(window=plan))
    with pytest.raises(sora.RequestError, match="start video 'static' or 'moving' would work"):
        engines["ti2v-5b"].generate(a_request(window=plan, init=a_clip(17), strength=0.5))


@pytest.mark.parametrize("loop", [False, True])
def test_how_many_windows_are_packed_at_a_time_changes_nothing(folders, loop, monkeypatch):
    monkeypatch.setattr("sora_engine.runtime.executor.saturation_point", lambda _model, most: most)
    plan = sora.WindowPlan(3, 1, schedule="moving")
    request = a_request(num_frames=28 if loop else 29, window=plan, loop=loop)
    results = []
    for tokens in (1, 13, 100_000):
        limits = sora.Limits(max_batch_tokens=tokens)
        with sora.Engine.from_pretrained(folders["t2v"], device="cpu", limits=limits) as engine:
            results.append(engine.generate(request).latents)
    assert relative_error(results[0], results[2]) < 1e-5
    assert relative_error(results[1], results[2]) < 1e-5


def test_windows_are_packed_up_to_saturation(folders, monkeypatch):
    """A long video's batches are no larger than a short one's, and its result is the same."""
    results = []
    for most, expected in ((10_000, 2 * 14 * 3 * 4), (24, 24)):
        monkeypatch.setattr(
            "sora_engine.runtime.executor.saturation_point", lambda _model, _, n=most: n
        )
        request = a_request(num_frames=113, num_inference_steps=1, window=sora.WindowPlan(3, 1))
        with sora.Engine.from_pretrained(folders["t2v"], device="cpu") as engine:
            results.append(engine.generate(request))
        assert results[-1].receipt.largest_batch_tokens == expected
    assert relative_error(results[1].latents, results[0].latents) < 1e-5


def test_the_order_of_windows_changes_nothing(engines, monkeypatch):
    """Windows packed last to first, and a few at a time: the same video within 1e-5."""
    from sora_engine.denoise import denoise

    engine = engines["t2v"]
    plan = sora.WindowPlan(3, 1, schedule="moving")
    request = a_request(num_frames=29, window=plan)
    plain = engine.generate(request).latents
    split = denoise.split
    seen = []

    def backwards(canvas, expert):
        parts = split(canvas, expert)
        seen.append(len(parts))
        return parts[::-1]

    monkeypatch.setattr(denoise, "split", backwards)
    assert relative_error(engine.generate(request).latents, plain) < 1e-5
    assert min(seen) >= 2 * 4  # windows of both branches were there to be turned round


def test_a_steps_tokens_grow_linearly_and_a_batch_not_at_all(engines):
    """Four times the length: about four times the tokens a step, in batches of one size."""
    from sora_engine.denoise import denoise
    from sora_engine.denoise.packing import Packer

    model = engines["t2v"].model
    plan = sora.WindowPlan(4, 1)
    totals = []
    for frames in (61, 241):
        canvas = denoise.prepare(
            engines["t2v"].resolve(a_request(num_frames=frames, window=plan)), model
        )
        canvas.contexts[0] = model.transformer(0).encode_contexts(canvas.prompts.branches)
        packer = Packer(model.grid.patch, model.device)
        groups = list(denoise.fill(denoise.split(canvas, 0), 100, packer))
        sizes = [sum(packer.num_tokens(part.segment) for part in group) for group in groups]
        assert max(sizes) <= 100
        totals.append(sum(sizes))
    assert totals[1] / totals[0] == pytest.approx(61 / 16, rel=0.1)  # latent frames


def test_shots_read_their_own_text(engines):
    """Two shots of one text are that text; two texts give something else, in both shots."""
    frames = {"num_frames": 17}
    one = engines["t2v"].generate(a_request(**frames))
    same = [sora.Shot("a red circle", 9), sora.Shot("a red circle", 8)]
    twice = engines["t2v"].generate(a_request(shots=same, **frames))
    assert relative_error(twice.latents, one.latents) < 1e-5
    other = [sora.Shot("a red circle", 9), sora.Shot("cat", 8)]
    mixed = engines["t2v"].generate(a_request(shots=other, **frames))
    assert relative_error(mixed.latents, one.latents) > 1e-2


def test_a_start_video_of_full_strength_is_noise_alone(engines):
    """At strength 1 a flow starts at pure noise, whatever the start video shows."""
    clip = a_clip(17)
    full = engines["t2v"].generate(a_request(init=clip, strength=1.0))
    plain = engines["t2v"].generate(a_request())
    assert relative_error(full.latents, plain.latents) < 1e-2
    weak = engines["t2v"].generate(a_request(init=clip, strength=0.4))
    assert relative_error(weak.latents, plain.latents) > 1e-1
    with pytest.raises(sora.RequestError, match="start video has 9 frames; the request makes 17"):
        engines["t2v"].generate(a_request(init=clip[:9]))


@pytest.mark.parametrize("solver", ["euler", "unipc", "dpm++", "dpm++sde", "ddim", "renoise"])
def test_every_solver_runs_by_name(engines, solver):
    video = engines["t2v"].generate(a_request(solver=solver))
    again = engines["t2v"].generate(a_request(solver=solver))
    assert torch.isfinite(video.latents).all()
    assert torch.equal(video.latents, again.latents)


def test_guidance_by_interval_and_kind(engines):
    """A kind that reduces to CFG gives CFG; an interval of nothing is no guidance."""
    engine = engines["t2v"]
    plain = engine.generate(a_request(guidance_scale=3.0))
    same = engine.generate(a_request(guidance=sora.Guidance("apg", scale=3.0)))
    assert relative_error(same.latents, plain.latents) < 1e-5
    never = engine.generate(a_request(guidance=sora.Guidance(scale=3.0, stop=0.0)))
    assert torch.equal(never.latents, engine.generate(a_request(guidance_scale=1.0)).latents)
    for other in (
        sora.Guidance("cfg_zero_star", scale=3.0),
        sora.Guidance("apg", scale=3.0, eta=0.0, momentum=-0.5, norm_threshold=5.0),
        sora.Guidance(scale=3.0, rescale=0.7),
        sora.Guidance(scale=3.0, stop=0.5),
    ):
        changed = engine.generate(a_request(guidance=other))
        assert relative_error(changed.latents, plain.latents) > 1e-4


def test_windows_start_from_the_same_frames_of_noise(engines):
    from sora_engine.denoise.denoise import prepare

    engine = engines["t2v"]
    plan = sora.WindowPlan(4, 2)
    resolved = engine.resolve(a_request(num_frames=45, window=plan))
    noise = prepare(resolved, engine.model).noise
    sums = noise.sum(dim=(0, 2, 3))
    for start in range(2, 9, 2):
        assert sorted(sums[start : start + 4].tolist()) == sorted(sums[:4].tolist())
    apart = sora.WindowPlan(4, 2, free_noise=False)
    resolved = engine.resolve(a_request(num_frames=45, window=apart))
    assert len(set(prepare(resolved, engine.model).noise.sum(dim=(0, 2, 3)).tolist())) == 12
