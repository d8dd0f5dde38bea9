"""The sprites' previews: what they show is what the clip shows, in small."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

import sora_engine as sora
from sora_engine.denoise.preview import LatentPreview

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import fit_preview
import train_vae

FOLDER = Path(sora.__file__).parent / "checkpoints" / "sprites"


def off_by(a: np.ndarray, b: np.ndarray) -> float:
    """The root mean square of the difference."""
    return float(np.sqrt(np.mean((a - b) ** 2)))


def test_latents_of_unseen_clips_look_like_their_frames() -> None:
    """Nearer than any one colour is, and nearer than the same picture moved aside."""
    vae = train_vae.load_vae(FOLDER / "vae")
    preview = LatentPreview.read(FOLDER, vae.z_dim)
    assert preview is not None
    for clip in train_vae.unseen_clips(5):
        latents, colours = fit_preview.pair(vae, clip)
        seen = preview.frames(latents).astype(float) / 255
        want = colours.permute(1, 2, 3, 0).numpy()
        error = off_by(seen, want)
        assert error < 0.14
        assert error < 0.8 * want.std()
        assert error < 0.8 * off_by(seen, np.roll(want, want.shape[2] // 2, axis=2))


def test_a_job_shows_what_becomes_of_it() -> None:
    """Each step has a preview, and the last one is of the latents that are decoded."""
    request = sora.VideoRequest(
        "a red circle moves right on a white background",
        num_frames=9,
        num_inference_steps=6,
        seed=3,
    )
    seen = []
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        job = engine.submit(request, on_progress=lambda _: seen.append(job.preview))
        video = job.result(300)
        latents = engine.model.vae.normalise(video.latents[None])[0]
        channels = len(latents)
    assert job.preview is not None
    assert job.preview.shape == (*latents.shape[1:], 3)
    assert job.preview.dtype == np.uint8
    assert len({preview.tobytes() for preview in seen if preview is not None}) == 6
    preview = LatentPreview.read(FOLDER, channels)
    assert preview is not None
    want = np.einsum("kc,cthw->thwk", preview.weight, latents) + preview.bias.numpy()
    assert np.abs(job.preview - want.clip(0, 1) * 255).max() < 1
