"""3x3 convolutions of large frames in fewer products: what they give, when they run, and what is
promised of their memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sora_engine.vae import winograd
from sora_engine.vae.kl import KLVAE, PictureConv
from sora_engine.vae.kl_config import KLConfig
from sora_engine.vae.ltx_blocks import LTXConv
from sora_engine.vae.meter import StorageMeter
from sora_engine.vae.native import PackedConv, native_kernels
from sora_engine.vae.rehearsal import decode_memory
from sora_engine.vae.winograd import WinogradConv

pytestmark = pytest.mark.skipif(not native_kernels(), reason="needs the native library")
LAST = torch.channels_last_3d


def videos(*shape: int) -> torch.Tensor:
    return torch.randn(shape).contiguous(memory_format=LAST)


@pytest.mark.parametrize("strip", [winograd.STRIP_BYTES, 1])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(2, 64, 3, 25, 31), (1, 72, 1, 24, 26)])
def test_it_is_no_further_from_float64_than_the_convolution(shape, biased, strip, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP_BYTES", strip)
    torch.manual_seed(0)
    ins, outs, frames = shape[1], 80, min(shape[2], 3)
    x, weight = videos(*shape), torch.randn(outs, ins, frames, 3, 3)
    bias = torch.randn(outs) if biased else None
    beside = videos(shape[0], outs, 1, *shape[3:])
    wide = None if bias is None else bias.double()
    exact = F.conv3d(x.double(), weight.double(), wide, 1, (0, 1, 1)) + beside
    direct = PackedConv(weight, bias, (1, 1, 1), (0, 1, 1))(x, beside.clone())
    fewer = WinogradConv(weight, bias)(x, beside)
    assert fewer.shape == exact.shape
    assert fewer.is_contiguous(memory_format=LAST)
    error = (fewer - exact).norm()
    assert float(error) <= 1.2 * float((direct - exact).norm())


def convolution(ins: int = 64, outs: int = 64) -> PictureConv:
    torch.manual_seed(0)
    conv = PictureConv(ins, outs, 3).requires_grad_(False)
    conv.lay_out(True, onednn=True)
    return conv


@pytest.mark.parametrize(
    ("conv", "x", "fewer"),
    [
        (convolution(), videos(1, 64, 1, 24, 24), True),
        (convolution(), videos(1, 64, 1, 40, 23), False),
        (convolution(), videos(1, 64, 1, 24, 24).bfloat16(), False),
        (convolution(48, 64), videos(1, 48, 1, 24, 24), False),
        (convolution(1024, 256), videos(1, 1024, 1, 24, 24), False),
        (LTXConv(64, 64, causal=True), videos(1, 64, 3, 24, 24), True),
        (LTXConv(64, 64, causal=True, stride=(2, 2, 2)), videos(1, 64, 3, 24, 24), False),
        (PictureConv(64, 64, 1), videos(1, 64, 1, 24, 24), False),
    ],
)
@torch.inference_mode()
def test_large_frames_have_it(conv, x, fewer):
    conv = conv.requires_grad_(False).to(x.dtype)
    conv.lay_out(True, onednn=True)
    want = F.conv3d(
        x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.spatial_padding
    )
    got = conv.valid(x)
    assert (conv.second_bytes > 0) == fewer
    assert float((got - want).norm() / want.norm()) < (3e-6 if x.dtype == torch.float32 else 1e-2)


@torch.inference_mode()
def test_weights_that_are_loaded_later_are_those_that_run():
    conv, x = convolution(), videos(1, 64, 1, 24, 24)
    first = conv.valid(x)
    weight = conv.state_dict()["weight"]
    conv.load_state_dict({"weight": 2 * weight, "bias": 2 * conv.bias})
    assert torch.allclose(conv.valid(x), 2 * first, rtol=1e-5, atol=1e-5)
    assert torch.equal(conv.state_dict()["weight"], 2 * weight)


@pytest.fixture
def threads():
    """Sets how many threads there are, and sets them back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@torch.inference_mode()
def test_threads_take_strips_of_their_own(threads, monkeypatch):
    monkeypatch.setattr(winograd, "STRIP_BYTES", 1 << 20)
    conv, x = convolution(), videos(2, 64, 1, 60, 40)
    made = []
    for count in (1, 2, 3):
        threads(count)
        made.append(conv.valid(x))
        assert torch.get_num_threads() == count
    assert torch.equal(made[1], made[0])
    assert torch.equal(made[2], made[0])


def test_memory_is_what_was_rehearsed(threads):
    threads(1)  # the meter sees what this thread does
    config = KLConfig.from_dict(
        {
            "block_out_channels": (64, 64, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        }
    )
    vae = KLVAE(config).requires_grad_(False).prepare()
    x = torch.randn(1, 4, 1, 24, 20)
    with StorageMeter([x]) as meter, torch.inference_mode():
        vae.decode_chunk(x)
    again = sum(m.second_bytes for m in vae.decoder.modules() if isinstance(m, PictureConv))
    assert again >= 8 * 16 * 64 * 64 * 4  # of the two stages whose frames are large
    promised = decode_memory(config, 24, 20).peak
    assert 0.7 * promised < meter.peak + again <= promised
