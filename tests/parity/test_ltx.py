"""LTX-Video against diffusers: the transformer, texts, whole pipelines, packed batches, folders."""

from __future__ import annotations

from concurrent.futures import Future

import numpy as np
import pytest
import torch
from diffusers import LTXConditionPipeline, LTXImageToVideoPipeline, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from PIL import Image

import sora_engine as sora
from sora_engine import tasks
from sora_engine.denoise.packing import Packer, Segment
from sora_engine.errors import JobCancelledError
from sora_engine.models.ltx.config import LTXConfig
from sora_engine.models.ltx.model import LTXTransformer
from sora_engine.vae.decoding import decoding
from tests.parity.ltx_models import packed, tiny_ltx, tiny_ltx_pipeline
from tests.parity.vae_models import relative

TOLERANCE = 1e-4
STEPS, SCALE = 3, 3.0
PROMPT, NEGATIVE_PROMPT = "A red panda eats Bamboo", "ugly"
SIZE = {"height": 32, "width": 64, "num_frames": 17}
LATENTS = (3, 4, 8)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pipelines():
    kinds = (LTXPipeline, LTXImageToVideoPipeline, LTXConditionPipeline)
    versions = ("0.9.0", "0.9.0", "0.9.5")
    return {k: tiny_ltx_pipeline(k, v) for k, v in zip(kinds, versions, strict=True)}


@pytest.fixture(scope="module")
def folders(pipelines, tmp_path_factory):
    paths = {}
    for kind, pipeline in pipelines.items():
        paths[kind] = tmp_path_factory.mktemp("ltx")
        pipeline.save_pretrained(paths[kind])
    return paths


@pytest.fixture(scope="module")
def engines(folders):
    limits = sora.Limits(pack_tokens=10_000)
    made = {
        kind: sora.Engine.from_pretrained(path, device="cpu", limits=limits)
        for kind, path in folders.items()
    }
    yield made
    for engine in made.values():
        engine.close()


@pytest.fixture(scope="module")
def engine(engines):
    return engines[LTXPipeline]


def ours_of(oracle) -> LTXTransformer:
    config = {name: value for name, value in oracle.config.items() if name[0] != "_"}
    ours = LTXTransformer(LTXConfig.from_dict(config))
    ours.load_state_dict(oracle.state_dict())
    return ours.eval().requires_grad_(False)


def request(prompt=PROMPT, **settings) -> sora.VideoRequest:
    values = {
        "num_inference_steps": STEPS, "guidance_scale": SCALE, "seed": 3,
        "negative_prompt": NEGATIVE_PROMPT, **SIZE, **settings,
    }  # fmt: skip
    return sora.VideoRequest(prompt, **values)


@pytest.mark.parametrize(("heads", "dim"), [(4, 8), (5, 8), (5, 64)])
def test_the_transformer_equals_diffusers(heads, dim):
    """Packed, at frame rates that differ, with frames at noise level 0 among the others."""
    oracle = tiny_ltx(
        num_attention_heads=heads, attention_head_dim=dim, cross_attention_dim=dim * heads
    )
    ours = ours_of(oracle)
    videos = [((3, 4, 6), 500.0, 5, 25.0), ((1, 2, 4), 37.0, 3, 25.0), ((2, 6, 4), 999.0, 7, 12.0)]
    samples = [torch.randn(8, *size) for size, *_ in videos]
    texts = [torch.randn(128, 32) for _ in videos]
    contexts = ours.encode_contexts(
        [
            {"text": text, "count": torch.tensor(count)}
            for text, (_, _, count, _) in zip(texts, videos, strict=True)
        ]
    )
    levels = [torch.full(size[:1], level) for size, level, *_ in videos]
    levels[0][0] = 0.0
    packer = Packer((1, 1, 1), torch.device("cpu"))
    batch = packer.pack(
        [
            Segment(sample, level, ((context, size[0]),), fps=fps)
            for sample, level, context, (size, _, _, fps) in zip(
                samples, levels, contexts, videos, strict=True
            )
        ]
    )
    made = packer.unpack(ours(batch), batch, 8)
    for got, sample, text, level, ((T, H, W), _, count, fps) in zip(
        made, samples, texts, levels, videos, strict=True
    ):
        want = oracle(
            packed(sample[None]),
            encoder_hidden_states=text[None],
            timestep=level.repeat_interleave(H * W)[None],
            encoder_attention_mask=(torch.arange(128) < count)[None].float(),
            num_frames=T,
            height=H,
            width=W,
            rope_interpolation_scale=(8 / fps, 32, 32),
        ).sample
        want = LTXPipeline._unpack_latents(want, T, H, W)[0]
        assert relative(got, want) < 1e-5


@pytest.mark.parametrize("kind", [LTXPipeline, LTXConditionPipeline])
@pytest.mark.parametrize("prompt", [PROMPT, "", "a " * 300])
def test_texts_equal_diffusers(pipelines, engines, kind, prompt):
    want, mask, _, _ = pipelines[kind].encode_prompt(
        prompt, do_classifier_free_guidance=False,
        max_sequence_length=256 if kind is LTXConditionPipeline else 128,
    )  # fmt: skip
    (text,) = engines[kind].loaded_model.prompt_encoder.encode([prompt])
    count = int(text["count"])
    assert count == int(mask.sum())
    assert relative(text["text"][:count], want[0][:count].detach()) < 1e-5


def want_of(pipeline, noise, **arguments) -> torch.Tensor:
    """What diffusers makes, as `Video.latents` has it."""
    latents = pipeline(
        latents=packed(noise) if type(pipeline) is not LTXConditionPipeline else None,
        output_type="latent", **{**SIZE, **arguments},
    ).frames  # fmt: skip
    if latents.ndim == 3:
        latents = LTXPipeline._unpack_latents(latents, *LATENTS)
    vae = pipeline.vae
    return pipeline._denormalize_latents(
        latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )[0]


@pytest.fixture
def noise():
    return torch.randn(1, 8, *LATENTS, generator=torch.Generator().manual_seed(1))


def test_the_whole_pipeline_equals_diffusers(pipelines, engine, noise):
    pipeline = pipelines[LTXPipeline]
    arguments = {"negative_prompt": NEGATIVE_PROMPT, "num_inference_steps": STEPS}
    for scale in (SCALE, 1.0):
        got = engine.generate(request(latents=noise[0], guidance_scale=scale))
        want = want_of(pipeline, noise, prompt=PROMPT, guidance_scale=scale, **arguments)
        assert relative(got.latents, want) < TOLERANCE
        frames = pipeline.vae.decode(got.latents[None]).sample[0].permute(1, 2, 3, 0)
        frames = ((frames / 2 + 0.5).clamp(0, 1) * 255).round()
        assert (frames - torch.as_tensor(got.frames).float()).abs().max() <= 1
    want = want_of(pipeline, noise, prompt=PROMPT, guidance_scale=SCALE, **arguments)
    # Leaving out the text, guidance, or the frame rate of the positions, would be noticed.
    others = (
        request("", latents=noise[0]),
        request(latents=noise[0], guidance_scale=1.0),
        request(latents=noise[0], fps=8),
        request(latents=noise[0], shift=1.0),
    )
    for other in others:
        assert relative(engine.generate(other).latents, want) > 100 * TOLERANCE


def picture(seed: int = 0) -> Image.Image:
    pixels = torch.randint(0, 256, (32, 64, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(pixels.byte().numpy())


def test_a_picture_as_the_first_frame_equals_diffusers(pipelines, engines, noise, monkeypatch):
    """As its pipeline for that has it: the picture's latents are the posterior's mean here."""
    pipeline = pipelines[LTXImageToVideoPipeline]
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)[None, :, None]
    mean = pipeline.vae.encode(pixels.float() / 127.5 - 1).latent_dist.mean
    first = pipeline._normalize_latents(mean, pipeline.vae.latents_mean, pipeline.vae.latents_std)
    start = torch.cat([first, noise[:, :, 1:]], dim=2)
    mask = torch.zeros(1, 1, *LATENTS)
    mask[:, :, 0] = 1.0

    def prepared(*_, **__):
        return packed(start), LTXPipeline._pack_latents(mask).squeeze(-1)

    monkeypatch.setattr(pipeline, "prepare_latents", prepared)
    arguments = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_inference_steps": STEPS,
        "guidance_scale": SCALE,
    }  # fmt: skip
    want = want_of(pipeline, noise, image=picture(), **arguments)
    engine = engines[LTXImageToVideoPipeline]
    made = tasks.animate(
        engine.model, picture(), PROMPT, negative_prompt=NEGATIVE_PROMPT, num_inference_steps=STEPS,
        guidance_scale=SCALE, latents=noise[0], **SIZE,
    )  # fmt: skip
    assert relative(engine.generate(made).latents, want) < TOLERANCE
    plain = engine.generate(request(latents=noise[0]))
    assert relative(plain.latents, want) > 100 * TOLERANCE


@pytest.mark.parametrize("known", [0, 1, 9])
def test_frames_that_are_given_equal_diffusers(pipelines, engines, noise, known, monkeypatch):
    """Of the pipeline of 0.9.5 and later: none, a picture, or nine frames to begin with."""
    pipeline = pipelines[LTXConditionPipeline]
    module = "diffusers.pipelines.ltx.pipeline_ltx_condition"
    monkeypatch.setattr(f"{module}.randn_tensor", lambda *_, **__: noise.clone())
    monkeypatch.setattr(f"{module}.retrieve_latents", lambda out, **_: out.latent_dist.mean)
    arguments = {
        "prompt": PROMPT, "negative_prompt": NEGATIVE_PROMPT, "num_inference_steps": STEPS,
        "guidance_scale": SCALE, "image_cond_noise_scale": 0.0,
    }  # fmt: skip
    clips = []
    if known:
        frames = [picture(i) for i in range(known)]
        arguments["conditions"] = [LTXVideoCondition(video=frames, frame_index=0)]
        clips = [sora.Clip(np.stack([np.array(frame) for frame in frames]))]
    want = want_of(pipeline, noise, **arguments)
    engine = engines[LTXConditionPipeline]
    got = engine.generate(request(latents=noise[0], clips=clips))
    assert relative(got.latents, want) < TOLERANCE
    others = [request(latents=noise[0], clips=clips, sigmas=[1.0, 0.66, 0.33])]
    others += [request(latents=noise[0])] if known else []
    for other in others:
        assert relative(engine.generate(other).latents, want) > 100 * TOLERANCE


def test_company_changes_nothing(engine):
    requests = [
        request(),
        request("a blue cube", height=16, width=24, num_frames=9, seed=4, fps=12),
        request("waves", num_frames=1, num_inference_steps=5, seed=5),
        request("a dog", clips=[sora.Clip(picture())], guidance_scale=1.0, seed=6),
    ]
    alone = [engine.generate(one) for one in requests]
    together = engine.generate(requests)
    assert together[0].receipt.most_in_company == 4
    for one, other in zip(alone, together, strict=True):
        assert relative(other.latents, one.latents) < 1e-5
    shots = request(shots=[sora.Shot("a red cube", 8), sora.Shot("the sea at night", 9)])
    assert relative(engine.generate(shots).latents, alone[0].latents) > 100 * TOLERANCE


def test_a_job_goes_on_from_its_savepoint(engine, folders, tmp_path):
    """Stopped behind its second step, with a picture given, and taken up by another engine."""
    given = request(clips=[sora.Clip(picture())], fps=12)
    want = engine.generate(given)
    place, submitted = tmp_path / "job.safetensors", Future()

    def stop(progress):
        if progress.steps_done == 2:
            submitted.result(60).cancel()

    job = engine.submit(given, save_to=place, on_progress=stop)
    submitted.set_result(job)
    with pytest.raises(JobCancelledError):
        job.result(60)
    with sora.Engine.from_pretrained(folders[LTXPipeline], device="cpu") as other:
        made = other.resume(place).result(60)
    assert made.receipt.resumed_at == 2
    assert relative(made.latents, want.latents) < 1e-5


def test_loops_are_decoded_round_their_seam(engine):
    """The decoder sees ahead: what it sees behind a loop's end is its beginning. Turned by a latent
    frame, a loop's latents give the same frames, turned by eight."""
    made = engine.generate(request(num_frames=24, loop=True))
    vae = engine.loaded_model.vae
    latents = vae.normalise(made.latents[None])[0]
    frames = [
        torch.cat([part for part in decoding(
            turned, vae, dtype=torch.float32, device=torch.device("cpu"), wraps=True
        ) if part is not None])
        for turned in (latents, latents.roll(1, 1))
    ]  # fmt: skip
    assert frames[0].shape == (24, 32, 64, 3)
    difference = frames[0].roll(8, 0).int() - frames[1].int()
    assert difference.abs().max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["ulysses", "ring", "guidance", "window"])
def test_two_ranks_equal_one(folders, engines, axis):
    """Positions in seconds, given frames and decoders that look ahead among them."""
    folder, engine = folders[LTXConditionPipeline], engines[LTXConditionPipeline]
    requests = [
        request(clips=[sora.Clip(picture())]),
        request("a blue cube", height=16, width=24, num_frames=9, seed=4, fps=12),
        request("waves", window=sora.WindowPlan(2, 1), seed=5),
    ]
    alone = engine.generate(requests)
    parallel = sora.ParallelConfig(**{axis: 2})
    with sora.Engine.from_pretrained(folder, device="cpu", parallel=parallel) as ranks:
        for one, other in zip(alone, ranks.generate(requests), strict=True):
            assert relative(other.latents, one.latents) < 1e-5
            assert np.abs(one.frames.astype(int) - other.frames).max() <= 1
