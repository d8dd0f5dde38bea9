"""A picture on the time line, or a clip shorter than a latent frame: seen where it was put."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

import sora_engine as sora

SIZE = 32


@pytest.fixture(scope="module")
def engine() -> Iterator[sora.Engine]:
    with sora.Engine.from_pretrained("sprites", device="cpu") as made:
        yield made


def picture(colour: tuple[int, int, int], left: int) -> np.ndarray:
    """A square of a colour on white."""
    frame = np.full((SIZE, SIZE, 3), 255, np.uint8)
    frame[8:22, left : left + 14] = colour
    return frame


RED, BLUE = picture((220, 20, 30), 2), picture((20, 40, 210), 16)


def made(engine: sora.Engine, line: dict[int, list[np.ndarray]], **settings: object) -> sora.Video:
    clips = [sora.Clip(np.stack(frames), at=at) for at, frames in line.items()]
    return engine.generate(
        sora.VideoRequest(
            "a square",
            clips=clips,
            **{"height": SIZE, "width": SIZE, "num_frames": 17, "seed": 1, **settings},
            num_inference_steps=3,
        )
    )


@pytest.mark.parametrize("at", [13, 15, 16])
def test_a_video_leads_from_one_picture_to_another(engine: sora.Engine, at: int) -> None:
    video = made(engine, {0: [RED], at: [BLUE]})
    for frame, wanted in ((0, RED), (13, BLUE), (16, BLUE)):
        wrong = np.abs(video.frames[frame].astype(float) - wanted).mean()
        other = np.abs(video.frames[frame].astype(float) - (RED if wanted is BLUE else BLUE)).mean()
        assert wrong < 16 < other, (frame, wrong, other)


@pytest.mark.parametrize(
    ("placed", "whole", "settings"),
    [
        ({0: [RED], 15: [BLUE]}, {0: [RED], 13: [BLUE] * 4}, {}),
        ({3: [RED, BLUE]}, {1: [RED, RED, RED, BLUE]}, {}),
        ({0: [RED] * 6, 8: [BLUE]}, {0: [RED] * 7, 7: [BLUE] * 2}, {}),
        ({5: [RED], 8: [BLUE]}, {5: [RED, RED, BLUE, BLUE]}, {}),
        ({2: [RED]}, {0: [RED] * 4}, {"loop": True, "num_frames": 16}),
        ({0: [RED], 17: [BLUE]}, {0: [RED], 17: [BLUE] * 2}, {"num_frames": 19}),
    ],
    ids=["late", "two frames", "beside a clip", "two pictures", "in a loop", "off the grid"],
)
def test_it_stands_still_in_its_latent_frame(
    engine: sora.Engine,
    placed: dict[int, list[np.ndarray]],
    whole: dict[int, list[np.ndarray]],
    settings: dict[str, object],
) -> None:
    """As its still would that was put there by hand."""
    still = made(engine, placed, **settings)
    assert torch.equal(still.latents, made(engine, whole, **settings).latents)
