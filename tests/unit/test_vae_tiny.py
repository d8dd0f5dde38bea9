"""The tiny decoder against its description, a whole clip at once in float64, on random weights."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import sora_engine as sora
from sora_engine import Limits, VideoRequest
from sora_engine.denoise.preview import DecodedPreview
from sora_engine.errors import BackendError, CheckpointError
from sora_engine.models.inspection import inspect_file
from sora_engine.models.registry import open_checkpoint
from sora_engine.testing.shadow import run_again
from sora_engine.vae.cuda_graph import GraphedVAE
from sora_engine.vae.decoding import to_uint8
from sora_engine.vae.meter import StorageMeter
from sora_engine.vae.rehearsal import decode_memory
from sora_engine.vae.tiny import load_tiny_vae
from sora_engine.vae.tiny_config import TinyVAEConfig
from tests.parity.oracles import tiny_pipeline

# kind: channels of latents, widths, side of a patch, the "super" form
KINDS = {
    "taew2_1": (16, (8, 6, 4, 4), 1, False),
    "taew2_2": (48, (8, 6, 4, 4), 2, False),
    "taew2_2_super": (48, (8, 6, 4, 4), 2, True),
}


def weights(kind, extra=0):
    """The tensors of a file. extra: further frames that the last growth in time makes."""
    z, widths, patch, deep = KINDS[kind]
    torch.manual_seed(5)
    found = {}

    def conv(name, out, into, side, bias=True):
        found[f"{name}.weight"] = torch.randn(out, into, side, side) / (into * side**2) ** 0.5
        if bias:
            found[f"{name}.bias"] = torch.randn(out) * 0.1

    if deep:
        conv("decoder.0", widths[0], z, 1, bias=False)
        for stage, first in enumerate((1, 8, 15)):
            own, nxt = widths[stage : stage + 2]
            for i in range(first, first + 3):
                conv(f"decoder.{i}.conv.0", 2 * own, 1, 7, bias=False)
                conv(f"decoder.{i}.conv.1", 4 * own, 2 * own, 1)
                conv(f"decoder.{i}.conv.3", own, 4 * own, 1, bias=False)
            conv(f"decoder.{first + 3}", 4 * nxt, own, 3)
            conv(f"decoder.{first + 6}.conv", (1, 2, 2 + extra)[stage] * nxt, nxt, 1, bias=False)
    else:
        conv("decoder.1", widths[0], z, 3)
        for stage, first in enumerate((3, 9, 15)):
            own, nxt = widths[stage : stage + 2]
            for i in range(first, first + 3):
                for j, into in ((0, 2 * own), (2, own), (4, own)):
                    conv(f"decoder.{i}.conv.{j}", own, into, 3)
            conv(f"decoder.{first + 4}.conv", (1, 2, 2 + extra)[stage] * own, own, 1, bias=False)
            conv(f"decoder.{first + 5}", nxt, own, 3, bias=False)
    conv("decoder.22", 3 * patch**2, widths[3], 3)
    found["decoder.22.weight"] *= 0.4 if deep else 1.0  # else most values would be cut off
    found["decoder.22.bias"] += 0.5
    conv("encoder.0", 64, 3, 3)  # not read
    return found


def reference(latents, tensors, kind):
    """`[B, z, T, h, w]` to frames `[B, 3, n, H, W]` in 0 to 1, all frames together."""
    _, widths, patch, deep = KINDS[kind]
    batch = latents.shape[0]
    x = latents.double().movedim(2, 1).flatten(0, 1)

    def conv(name, x, groups=1):
        weight, bias = tensors[f"{name}.weight"].double(), tensors.get(f"{name}.bias")
        side = weight.shape[-1] // 2
        return F.conv2d(x, weight, None if bias is None else bias.double(), 1, side, 1, groups)

    def before(x):
        frames = x.unflatten(0, (batch, -1))
        return torch.cat([torch.zeros_like(frames[:, :1]), frames[:, :-1]], 1).flatten(0, 1)

    def grow(i, x, stride):
        weight = tensors[f"decoder.{i}.conv.weight"].double()[-stride * x.shape[1] :]
        return F.conv2d(x, weight).reshape(-1, *x.shape[1:])

    if deep:
        x = conv("decoder.0", x)
    else:
        x = conv("decoder.1", torch.tanh(x / 3) * 3).relu()
    for stage, stride in enumerate((1, 2, 2)):
        first = 1 + 7 * stage if deep else 3 + 6 * stage
        for i in range(first, first + 3):
            name, both = f"decoder.{i}.conv", torch.cat([x, before(x)], 1)
            if deep:
                inner = conv(f"{name}.1", conv(f"{name}.0", both, 2 * widths[stage])).relu()
                x = x + conv(f"{name}.3", inner)
            else:
                inner = conv(f"{name}.2", conv(f"{name}.0", both).relu()).relu()
                x = (x + conv(f"{name}.4", inner)).relu()
        if deep:
            x = F.pixel_shuffle(conv(f"decoder.{first + 3}", x).relu(), 2)
            x = grow(first + 6, x, stride)
        else:
            x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            x = conv(f"decoder.{first + 5}", grow(first + 4, x, stride))
    x = conv("decoder.22", x if deep else x.relu())
    x = F.pixel_shuffle(x, patch) if patch > 1 else x
    return x.clamp(0, 1).unflatten(0, (batch, -1))[:, 3:].movedim(1, 2)


def saved(tmp_path, kind, **options):
    path = tmp_path / f"{kind}.safetensors"
    save_file(weights(kind, **options), path)
    return path


def loaded(tmp_path, kind, **options):
    return load_tiny_vae(saved(tmp_path, kind, **options), "cpu", torch.float32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "length", "extra"), [(1, 1, 0), (2, 4, 0), (1, 3, 2)])
def test_frames_are_those_of_the_whole_clip(tmp_path, kind, batch, length, extra):
    vae = loaded(tmp_path, kind, extra=extra)
    latents = torch.randn(batch, KINDS[kind][0], length, 5, 6)
    want = reference(latents, weights(kind, extra), kind)
    found = vae.decode(latents)
    factor = 8 * KINDS[kind][2]
    assert found.shape == (batch, 3, 4 * length - 3, 5 * factor, 6 * factor)
    assert want.std() > 0.05
    assert ((want > 0) & (want < 1)).double().mean() > 0.5  # most are not cut off
    assert ((found.double() + 1) / 2 - want).abs().max() < 1e-5
    together = vae.decode(latents, latents_per_call=None)
    assert (together - found).abs().max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_any_chunking_gives_the_same_bits(tmp_path, kind):
    vae = loaded(tmp_path, kind)
    latents = torch.randn(1, KINDS[kind][0], 5, 4, 4)
    whole = vae.decode(latents)
    state, parts = None, []
    for part in latents.split([1, 2, 2], dim=2):
        frames, state = vae.decode_chunk(part, state, consume=True)
        parts.append(frames)
    assert torch.equal(torch.cat(parts, 2), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_steady_steps_can_be_recorded(tmp_path, kind):
    """As CUDA graphs are: the same places in memory for every step, here by running it again."""
    vae = loaded(tmp_path, kind)
    latents = torch.randn(1, KINDS[kind][0], 9, 4, 4)
    graphed = GraphedVAE(vae, required=True, recorder=run_again)
    assert torch.equal(graphed.decode(latents), vae.decode(latents))


@pytest.mark.parametrize("kind", KINDS)
def test_it_takes_what_was_rehearsed(tmp_path, kind):
    vae = loaded(tmp_path, kind)
    latents = torch.randn(1, KINDS[kind][0], 6, 16, 20)
    planned = decode_memory(vae.config, 16, 20)
    with torch.no_grad(), StorageMeter([latents, *vae.parameters()]) as meter:
        state, held = None, []
        for part in latents.split(1, dim=2):
            frames, state = vae.decode_chunk(part, state, consume=True)  # the last ones are held
            held.append(state.nbytes)
        del frames
    assert 0.9 * planned.peak <= meter.peak <= planned.peak
    assert len(set(held)) == 1  # whatever the length
    assert held[-1] == planned.cache == meter.now


# In an engine.

REQUEST = VideoRequest(
    "red circle", height=32, width=32, num_frames=9, num_inference_steps=2, seed=1
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("wan")
    tiny_pipeline("t2v", 0).save_pretrained(path)
    return path


def test_a_video_by_the_tiny_decoder(folder, tmp_path):
    file = saved(tmp_path, "taew2_1")
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        own, plan = engine.generate(REQUEST), engine.plan(REQUEST)
    given = {"tiny_vae": file}
    with sora.Engine.from_pretrained(
        folder, device="cpu", vae_backend="tiny", components=given
    ) as engine:
        job = engine.submit(REQUEST)
        video = job.result()
        vae = engine.loaded_model.vae
        normalised = vae.normalise(video.latents[None])
        promised = engine.plan(REQUEST)
    assert torch.equal(video.latents, own.latents)  # only frames differ
    want = to_uint8(reference(normalised, weights("taew2_1"), "taew2_1")[0].float() * 2 - 1)
    assert (torch.from_numpy(video.frames).int() - want.int()).abs().max() <= 1
    assert (video.receipt.vae, own.receipt.vae) == ("TinyDecoder", "WanVAE")
    assert promised.decode != plan.decode
    assert promised.encode == plan.encode  # clips are encoded by the model's own
    pictures = job.preview
    assert pictures.shape == (3, 32, 32, 3)
    assert abs(pictures.astype(int) - video.frames[[0, 4, 8]].astype(int)).max() <= 1


def test_previews_while_the_own_decoder_serves(folder, tmp_path):
    file = saved(tmp_path, "taew2_1")
    with sora.Engine.from_pretrained(folder, device="cpu", components={"tiny_vae": file}) as engine:
        job = engine.submit(REQUEST)
        video = job.result()
        assert isinstance(engine.loaded_model.preview, DecodedPreview)
        normalised = engine.loaded_model.vae.normalise(video.latents[None])
        with_preview = engine.plan(REQUEST)
    assert video.receipt.vae == "WanVAE"
    want = to_uint8(reference(normalised, weights("taew2_1"), "taew2_1")[0].float() * 2 - 1)
    assert (torch.from_numpy(job.preview).int() - want[[0, 4, 8]].int()).abs().max() <= 1
    with sora.Engine.from_pretrained(folder, device="cpu") as engine:
        assert engine.generate(REQUEST).frames.tobytes() == video.frames.tobytes()
        assert engine.plan(REQUEST).decode < with_preview.decode  # pictures are counted


def test_loops_and_little_memory(folder, tmp_path):
    """A loop's laps end; frames that do not fit are decoded in tiles, which the receipt says."""
    given = {"tiny_vae": saved(tmp_path, "taew2_1")}
    options = {"device": "cpu", "vae_backend": "tiny", "components": given}
    loop = VideoRequest("a", height=32, width=32, num_frames=12, num_inference_steps=1, loop=True)
    with sora.Engine.from_pretrained(folder, **options) as engine:
        assert engine.generate(loop).frames.shape[0] == 12
    wide = VideoRequest("a", height=256, width=256, num_frames=5, num_inference_steps=1)
    limits = Limits(vae_memory_bytes=10 << 20)
    with sora.Engine.from_pretrained(folder, **options, limits=limits) as engine:
        assert engine.generate(wide).receipt.vae_tiles.keys() == {"decode"}


def test_what_does_not_go_with_the_model(folder, tmp_path):
    def load(**options):
        return sora.Engine.from_pretrained(folder, device="cpu", vae_backend="tiny", **options)

    with pytest.raises(BackendError, match=r"needs a tiny .* --tiny-vae\); .* taew2_1\.safe"):
        load()
    other = saved(tmp_path, "taew2_2")
    with pytest.raises(CheckpointError, match=r"for latents of 48 channels, .* 16; taew2_1") as e:
        load(components={"tiny_vae": other})
    assert e.value.path == other
    with pytest.raises(CheckpointError, match="no such file for the tiny_vae"):
        load(components={"tiny_vae": tmp_path / "none"})
    tensors = weights("taew2_1")
    for spoil, says, tensor in (
        (lambda t: t.pop("decoder.22.bias"), "not a tiny autoencoder .* it holds decoder", None),
        (lambda t: t.pop("decoder.8.weight"), "is missing; a tiny .* convolution there",
         "decoder.8.weight"),
        (lambda t: t.update({"decoder.22.weight": torch.ones(48, 4, 3, 3)}), "makes 48 channels",
         "decoder.22.weight"),
        (lambda t: t.pop("decoder.5.conv.2.bias"), "missing tensors: decoder.5.conv.2.bias",
         "decoder.5.conv.2.bias"),
        (lambda t: t.update({"decoder.4.skip.weight": torch.ones(1)}), "unexpected tensors",
         "decoder.4.skip.weight"),
    ):  # fmt: skip
        spoiled = dict(tensors)
        spoil(spoiled)
        path = tmp_path / "bad.safetensors"
        save_file(spoiled, path)
        with pytest.raises(CheckpointError, match=says) as caught:
            load(components={"tiny_vae": path})
        assert (caught.value.path, caught.value.tensor) == (path, tensor)
    with pytest.raises(CheckpointError, match="of others it takes tiny_vae alone"):
        open_checkpoint(folder, {"vae": folder / "vae"})


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("taew2_1", "tiny autoencoder (TAEHV) for 16 latent channels"),
        ("taew2_2_super", "tiny autoencoder (TAEHV, super) for 48 latent channels"),
    ],
)
def test_inspect_names_it(tmp_path, kind, says):
    assert inspect_file(saved(tmp_path, kind)).kinds == (says,)


def test_published_sizes():
    """Tensors and parameters of the published decoders, which no file here has."""
    from sora_engine.vae.tiny import TinyVAE

    for config, tensors, millions in (
        (TinyVAEConfig(16), 64, 9.84),
        (TinyVAEConfig(48, (512, 256, 128, 64), 2, deep=True), 48, 19.0),
    ):
        with torch.device("meta"):
            state = TinyVAE(config).state_dict()
        assert len(state) == tensors
        count = sum(value.numel() for value in state.values()) / 1e6
        assert abs(count - millions) < 0.06, count
