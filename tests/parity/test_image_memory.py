"""What a CLIP image encoder holds while it encodes, as it is promised."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

import sora_engine as sora
from sora_engine.text import ImageEncoder
from sora_engine.text.image import usual_processor
from sora_engine.vae.meter import StorageMeter
from tests.parity.metering import measured
from tests.parity.oracles import tiny_pipeline

SHAPES = [
    (20, 24, 3, 28, 14),
    (64, 256, 12, 224, 14),  # what a layer makes of its input is the most
    (128, 160, 2, 224, 14),  # queries, keys and values are
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("images", [1, 2])
def test_the_most_that_encoding_holds(shape, dtype, images):
    hidden, middle, layers, size, patch = shape
    config = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=middle,
        num_hidden_layers=layers,
        num_attention_heads=2,
        image_size=size,
        patch_size=patch,
    )
    encoder = ImageEncoder(CLIPVisionModel(config).eval().to(dtype), usual_processor(size))
    pictures = [np.zeros((40, 64, 3), np.uint8)] * images
    with StorageMeter(encoder.model.parameters()) as meter:
        encoder.encode(pictures)
    assert 0.9 * encoder.activation_bytes(images) <= meter.peak
    assert meter.peak <= encoder.activation_bytes(images)


def test_a_small_video_from_a_picture_keeps_its_promise(tmp_path, monkeypatch):
    """The image encoder's size is its own: beside a small video it takes the most."""
    pipe = tiny_pipeline("i2v", 0)
    values = pipe.image_encoder.config.to_dict() | {"image_size": 224, "num_hidden_layers": 12}
    torch.manual_seed(0)
    pipe.image_encoder = CLIPVisionModel(CLIPVisionConfig.from_dict(values)).eval()
    pipe.image_processor = usual_processor(224)
    pipe.save_pretrained(tmp_path)
    picture = sora.Clip(np.zeros((1, 16, 16, 3), np.uint8))
    request = sora.VideoRequest(
        "a", clips=(picture,), width=16, height=16, num_frames=5, num_inference_steps=2, seed=1
    )
    video, peak = measured(monkeypatch, tmp_path, request, request, "float32")
    assert 0.7 * video.receipt.promised_bytes <= peak <= video.receipt.promised_bytes
