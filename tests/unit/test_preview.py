"""Previews: the map is the one that least squares finds, and its file is checked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from sora_engine.denoise.preview import FILE, LatentPreview, pooled_colours
from sora_engine.errors import CheckpointError


def test_the_fit_finds_the_map_that_made_the_colours(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, generator=generator)
    bias = torch.rand(3, generator=generator)
    latents = [torch.randn(5, t, 4, 6, generator=generator) for t in (1, 3)]
    colours = [
        torch.einsum("kc,cthw->kthw", weight, x) + bias[:, None, None, None] for x in latents
    ]
    fitted = LatentPreview.fit(list(zip(latents, colours, strict=True)))
    torch.testing.assert_close(fitted.weight, weight, atol=1e-5, rtol=0)
    torch.testing.assert_close(fitted.bias, bias, atol=1e-5, rtol=0)

    fitted.write(tmp_path)
    read = LatentPreview.read(tmp_path, channels=5)
    assert read is not None
    torch.testing.assert_close(read.colours(latents[1]), colours[1], atol=1e-3, rtol=0)
    frames = read.frames(latents[1])
    want = (colours[1].clamp(0, 1) * 255).permute(1, 2, 3, 0).numpy()
    assert frames.shape == (3, 4, 6, 3)
    assert frames.dtype == np.uint8
    assert np.abs(frames - want).max() < 1


def test_colours_are_means_over_the_pixels_and_frames_of_a_latent():
    frames = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    pooled = pooled_colours(torch.from_numpy(frames), 4, (2, 3))
    assert pooled.shape == (3, 3, 2, 3)
    spans = [slice(0, 1), slice(1, 5), slice(5, 9)]
    for t, span in enumerate(spans):
        for y in range(2):
            for x in range(3):
                patch = frames[span, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
                want = patch.reshape(-1, 3).mean(axis=0) / 255
                np.testing.assert_allclose(pooled[:, t, y, x].numpy(), want, atol=1e-5)
    assert pooled_colours(torch.from_numpy(frames[:1]), 4, (2, 3)).shape == (3, 1, 2, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight": [[0.0] * 4] * 3}, "needs weight and bias"),
        ({"weight": [[0.0] * 3] * 3, "bias": [0.0] * 3}, r"\[3, 3\].*must be \[3, 4\]"),
        ({"weight": [["x"] * 4] * 3, "bias": [0.0] * 3}, "needs weight and bias"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, content, message):
    assert LatentPreview.read(tmp_path, channels=4) is None
    (tmp_path / FILE).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        LatentPreview.read(tmp_path, channels=4)
