"""A convolution's weight is held once, and is all there for whoever asks."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import Tensor

from sora_engine.distributed.vae import shared_copy
from sora_engine.vae.backend import _key
from sora_engine.vae.native import PackableConv3d, PackedConv
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig

CONFIG = WanVAEConfig(base_dim=8, num_res_blocks=1)


@pytest.fixture
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(CONFIG).eval().requires_grad_(False).prepare()


@pytest.fixture
def weights(vae) -> dict[str, Tensor]:
    """The weights before anything has run."""
    return {name: tensor.clone() for name, tensor in vae.state_dict().items()}


def _latents(seed: int = 1) -> Tensor:
    return torch.randn(1, 16, 3, 4, 3, generator=torch.Generator().manual_seed(seed))


def _code(vae: WanVAE) -> tuple[Tensor, Tensor]:
    with torch.inference_mode():
        frames = vae.decode(_latents())
        return frames, vae.encode(frames)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _layers(vae: WanVAE) -> list[PackableConv3d]:
    return [module for module in vae.modules() if isinstance(module, PackableConv3d)]


def _let_go(vae: WanVAE) -> bool:
    """Whether any layer holds its weight in blocks alone."""
    return any(bool(layer._parameters["weight"].isnan().any()) for layer in _layers(vae))


def test_after_coding_weights_are_held_once(vae, weights):
    _code(vae)
    storages = {p.untyped_storage()._cdata: p.untyped_storage() for p in vae.parameters()}
    held = sum(storage.nbytes() for storage in storages.values())
    folded = 0
    for module in vae.modules():
        layouts = getattr(module, "layouts", None)
        for made in layouts._packed.values() if layouts is not None else ():
            # oneDNN's tensors have no storage to ask: channels are padded to blocks of 16 there.
            size = made.weight.numel() if isinstance(made, PackedConv) else made.numel()
            if isinstance(module, PackableConv3d):
                held += 4 * size
            else:
                folded += 4 * size
    once = sum(tensor.nbytes for tensor in weights.values())
    assert _let_go(vae)
    assert once <= held <= once + 4 * len(_layers(vae))  # of each stand-in a single value
    assert folded < once / 10  # of the six 2-D convolutions beside the temporal ones


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("outs", "ins", "kernel"),
    [(48, 32, (3, 3, 3)), (5, 7, (3, 3, 3)), (40, 20, (3, 1, 1)), (9, 9, (1, 1, 1))],
)  # fmt: skip
def test_blocks_give_the_weight_back_bit_for_bit(outs, ins, kernel, dtype):
    weight = torch.randn(outs, ins, *kernel).to(dtype)
    packed = PackedConv(weight, None, (1, 1, 1), (0, 1, 1))
    assert torch.equal(packed.plain_weight(), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["channels last", "channels first", "part of a longer one"])
@pytest.mark.parametrize("onednn", [True, False])
def test_what_stands_beside_a_convolution_is_added(onednn, layout, dtype):
    rng = torch.Generator().manual_seed(3)
    weight, bias = (torch.randn(*s, generator=rng) for s in ((5, 7, 3, 3, 3), (5,)))
    x, beside = (torch.randn(2, c, t, 4, 3, generator=rng) for c, t in ((7, 5), (5, 4)))
    x, weight, bias, beside = (t.to(dtype) for t in (x, weight, bias, beside))
    convolution = PackedConv(weight, bias, (1, 1, 1), (0, 1, 1), onednn=onednn)
    beside, given = beside[:, :, :3], beside[:, :, :3]
    if layout == "channels last":
        given = given.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "channels first":
        given = given.contiguous()
    x = x.contiguous(memory_format=torch.channels_last_3d)
    kept = given.clone()
    made = convolution(x, given)
    exact = torch.nn.functional.conv3d(x.double(), weight.double(), bias.double(), 1, (0, 1, 1))
    exact += beside.double()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(made.double(), exact, rtol=tolerance, atol=10 * tolerance)
    assert torch.equal(given, kept)
    assert torch.equal(made, convolution(x) + beside) or dtype == torch.bfloat16  # rounded once


def test_a_second_video_and_layers_that_keep_their_weights_give_the_same_bits(vae):
    keeping = WanVAE(CONFIG).eval()
    keeping.load_state_dict(vae.state_dict())
    keeping.prepare()  # of weights that may be trained none is let go
    with torch.no_grad():
        frames = keeping.decode(_latents())
        expected = frames, keeping.encode(frames)
    assert not _let_go(keeping)
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(_code(vae), expected, strict=True))


def test_state_dicts_copies_and_pickles_after_coding(vae, weights):
    expected = _code(vae)
    assert _same(vae.state_dict(), weights)
    assert _let_go(vae)  # still
    file = io.BytesIO()
    torch.save(vae, file)
    file.seek(0)
    loaded = WanVAE(CONFIG).eval().requires_grad_(False)
    loaded.load_state_dict(vae.state_dict())
    for other in (
        copy.deepcopy(vae),
        torch.load(file, weights_only=False),
        shared_copy(vae),
        loaded.prepare(),
    ):
        assert _same(other.state_dict(), weights)
        assert all(torch.equal(x, y) for x, y in zip(_code(other), expected, strict=True))


def test_modules_with_the_same_tensors_do_not_lose_them(vae, weights):
    other = shared_copy(vae)
    expected = _code(vae)
    assert _same({n: p.detach() for n, p in other.named_parameters()}, weights)
    assert all(torch.equal(x, y) for x, y in zip(_code(other), expected, strict=True))


def test_reading_moving_casting_loading_and_training_bring_weights_back(vae, weights):
    name = "decoder.conv_in"
    expected = _code(vae)
    layer = vae.get_submodule(name)
    assert torch.equal(layer.weight, weights[f"{name}.weight"])
    assert all(torch.equal(x, y) for x, y in zip(_code(vae), expected, strict=True))

    layer.weight.mul_(2)  # written to, it is what the next run reads
    doubled, _ = _code(vae)
    assert not torch.equal(doubled, expected[0])
    assert torch.equal(layer.state_dict()["weight"], 2 * weights[f"{name}.weight"])

    vae.load_state_dict(weights)
    assert all(torch.equal(x, y) for x, y in zip(_code(vae.prepare()), expected, strict=True))
    vae.decoder.to(torch.float64)
    assert not bool(layer._parameters["weight"].isnan().any())
    for back in (vae.float, vae.train):
        back()
        assert _same({n: p.detach() for n, p in vae.named_parameters()}, weights)
        _code(vae.eval().prepare())
        assert _let_go(vae)


def test_the_name_of_its_exported_graphs_stays(vae):
    before = _key(vae, torch.float32)
    _code(vae)
    assert _key(vae, torch.float32) == before


def test_threads_that_meet_at_the_first_run_get_the_same_bits(vae):
    expected = _code(copy.deepcopy(vae))
    found: list[tuple[Tensor, Tensor]] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        found.append(_code(vae))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    start.wait()
    for _ in range(20):
        vae.get_submodule("decoder.conv_in").weight.sum()  # asked for meanwhile
    for thread in threads:
        thread.join()
    for got in found:
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
    assert len(found) == 2
