"""Faults that a CPU forgives and a GPU does not, planted one at a time: the shadow tells of each.

Without a fault it has nothing to tell (`test_the_code_as_it_is_has_none`), so what a mutant's test
finds is the mutant.
"""

from __future__ import annotations

import re

import pytest
import torch

from sora_engine.denoise import canvas as canvas_module
from sora_engine.denoise import denoise as denoise_module
from sora_engine.denoise import known as known_module
from sora_engine.denoise import packing, windows
from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.windows import Window
from sora_engine.models import attention
from sora_engine.models.wan import blocks
from sora_engine.models.wan import model as model_module
from sora_engine.models.wan.blocks import WanBlock
from sora_engine.models.wan.model import WanTransformer
from sora_engine.testing.crossings import KINDS as CROSSINGS
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import REQUESTS, Sizes, walk
from sora_engine.vae import decoding
from tests import shadow_cases


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return shadow_cases.Models(tmp_path_factory.mktemp("kinds"))


def told(models, case, device="cuda"):
    """What the shadow device has to say of a request: an error, more waits than the table has, or
    attention in another dtype."""
    kind, task = case.split(": ")
    table = shadow_cases.committed()["now"][case]
    with shadow_device(2) as shadow:
        with torch.cuda.device(device):
            model = models.of(kind, shadow, device)
            shadow.trace.dtypes.clear()
            try:
                made = walk(
                    model,
                    REQUESTS[task](Sizes(model)),
                    shadow,
                    decode=task in shadow_cases.DECODED,
                )
            except (RuntimeError, TypeError) as error:
                return f"{type(error).__name__}: {error}"
        for name, tally in made.summary().items():
            figures = tally.figures()
            for what in CROSSINGS:
                if figures[what] > table[name][what]:
                    return f"{name}: {what} {figures[what]} > {table[name][what]}: {tally.sites()}"
        dtypes = {dtype for op, dtype in shadow.trace.dtypes if "attention" in op}
        if dtypes != {"torch.bfloat16"}:
            return f"attention in {sorted(dtypes)}"
    return None


def around(monkeypatch, owner, name, change):
    """Replace a function by what `change` makes of it."""
    monkeypatch.setattr(owner, name, change(getattr(owner, name)))


def cpu_index(patch):
    """Indices of a window that stay on the host."""
    patch.setattr(
        Window,
        "of",
        lambda self, canvas, dim: (
            canvas if self.covers_all else canvas.index_select(dim, self.indices())
        ),
    )


def forgotten_to(patch):
    """Coordinates of tokens that are never brought to the device."""
    patch.setattr(packing, "to_device", lambda tensor, device: tensor)


def noise_on_the_host(patch):
    """Fresh noise that is drawn on the host and used there."""
    patch.setattr(denoise_module, "to_device", lambda tensor, device: tensor)


def item_in_forward(patch):
    """A noise level that is read back to decide something."""

    def change(forward):
        def changed(self, batch):
            assert batch.timesteps.max().item() >= 0
            return forward(self, batch)

        return changed

    around(patch, WanTransformer, "forward", change)


def nonzero_in_advance(patch):
    """A selection by a mask, whose size only the device knows."""

    def change(advance):
        def changed(canvas, *arguments):
            advance(canvas, *arguments)
            assert canvas.latents[canvas.latents > 0].numel() > 0

        return changed

    around(patch, denoise_module, "advance", change)


def sync_in_a_block(patch):
    """A wait in every block."""

    def change(forward):
        def changed(self, *arguments, **named):
            if arguments[0].is_cuda:
                torch.cuda.synchronize()
            return forward(self, *arguments, **named)

        return changed

    around(patch, WanBlock, "forward", change)


def wide_attention(patch):
    """Queries, keys and values that slip to float32."""

    def change(attend):
        def changed(q, k, v, stream, **named):
            return attend(q.float(), k.float(), v.float(), stream, **named).to(q.dtype)

        return changed

    around(patch, blocks, "self_attention", change)


def mixed_linear(patch):
    """An input that slips to float32 before a layer in bfloat16."""

    def change(embed):
        return lambda tokens, patch: embed(tokens.float(), patch)

    around(patch, model_module, "embed_patches", change)


def pageable_copy(patch):
    """A copy to the device from memory that is not pinned."""
    patch.setattr(packing, "to_device", lambda tensor, device: tensor.to(device))


def unpinned_without_waiting(patch):
    """The same that believes itself not to wait."""
    patch.setattr(packing, "to_device", lambda x, device: x.to(device, non_blocking=True))


def constants_from_the_host(patch):
    """Numbers that are made on the host at each step."""

    def change(tables):
        def changed(coords, config, places):
            scale = torch.tensor([1.0, 1.0, 1.0], device=coords.device)
            return tables((coords * scale).long(), config, places)

        return changed

    around(patch, model_module, "rope_tables", change)


def mask_read_back(patch):
    """The mask of known frames, read back for every window and branch (finding B6)."""

    def change(timesteps):
        def changed(self, window):
            assert self.known.mask.cpu().any()
            return timesteps(self, window)

        return changed

    around(patch, Canvas, "_timesteps", change)


def weights_by_window(patch):
    """Blend weights that cross one window at a time, and are waited for (finding B6)."""

    def changed(predictions, among, plan, *, wraps):
        total = predictions[0].new_zeros(
            len(predictions[0]), among[0].total, *predictions[0].shape[2:]
        )
        for window, prediction in zip(among, predictions, strict=True):
            weights = windows.window_weights(plan, window, wraps=wraps).to(total)
            total.index_add_(
                1, window.indices().to(total.device), prediction * weights[:, None, None]
            )
        return total

    patch.setattr(windows, "weighted_sum", changed)


def numpy_of_frames(patch):
    """Frames that are made arrays where they are."""
    patch.setattr(decoding, "to_uint8", lambda frames: torch.from_numpy(frames.float().numpy()))


def repeated_by_the_device(patch):
    """Rows that are repeated by counts which the device holds: the host waits for their sum."""

    def changed(rows, grids, device):
        numbers = packing.to_device(torch.cat(list(rows)), device)
        sizes = [t * h * w // len(own) for own, (t, h, w) in zip(rows, grids, strict=True)]
        counts = torch.tensor([n for n, own in zip(sizes, rows, strict=True) for _ in own])
        return numbers.repeat_interleave(packing.to_device(counts, device))

    patch.setattr(packing, "token_rows", changed)


def whole_mask_from_the_host(patch):
    """Known content that is put into the sample by a mask on the host."""

    def change(known):
        return lambda mode, **content: known(mode, **{**content, "mask": content["mask"].to("cpu")})

    around(patch, known_module, "Known", change)


def another_current_device(patch):
    """Attention that is launched on whichever device is current (finding A4)."""

    def change(attend):
        def changed(*arguments, **named):
            with torch.cuda.device(0):
                return attend(*arguments, **named)

        return changed

    around(patch, attention, "packed_attention", change)


ON_THE_SAME = "RuntimeError: Expected all tensors to be on the same device"
MUTANTS = {
    cpu_index: ("t2v: windows", ON_THE_SAME),
    forgotten_to: ("t2v: plain", ON_THE_SAME),
    noise_on_the_host: ("t2v: ddpm", ON_THE_SAME),
    item_in_forward: ("t2v: plain", "first step: wait 3 > 2"),
    nonzero_in_advance: ("t2v: plain", "first step: wait 3 > 2"),
    sync_in_a_block: ("t2v: plain", "first step: wait 4 > 2"),
    wide_attention: ("t2v: plain", r"attention in \['torch.bfloat16', 'torch.float32'\]"),
    mixed_linear: ("t2v: plain", "RuntimeError: .*dtype"),
    pageable_copy: ("t2v: plain", "first step: wait"),
    unpinned_without_waiting: ("t2v: plain", "first step: wait"),
    constants_from_the_host: ("t2v: plain", "first step: wait 3 > 2"),
    mask_read_back: ("ti2v-5b: known", "first step: wait 4 > 2: .*Canvas.segment"),
    weights_by_window: ("t2v: windows", "first step: wait 18 > 2: .*windows.py:blend.: 18"),
    numpy_of_frames: ("t2v: plain", "TypeError: can't convert cuda:0"),
    repeated_by_the_device: ("ti2v-5b: known", "first step: wait 3 > 2"),
    whole_mask_from_the_host: ("ti2v-5b: known", ON_THE_SAME),
}
"""By the fault: the request that meets it, and what the shadow device says of it."""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_planted_fault_is_told(models, monkeypatch, mutant):
    case, expected = MUTANTS[mutant]
    models.get_ready(case.split(": ")[0])
    mutant(monkeypatch)
    answer = told(models, case)
    assert answer is not None
    assert re.search(expected, answer), answer


def test_a_kernel_on_another_device_is_told(models, monkeypatch):
    models.get_ready("t2v", "cuda:1")
    another_current_device(monkeypatch)
    answer = told(models, "t2v: plain", "cuda:1")
    assert "sora::packed_attention: its tensors are on cuda:1, and cuda:0 is current" in answer


@pytest.mark.parametrize("case", sorted({case for case, _ in MUTANTS.values()}))
def test_the_code_as_it_is_has_none(models, case):
    assert told(models, case) is None
    assert told(models, case, "cuda:1") is None


def test_there_are_ten_faults_and_more():
    assert len(MUTANTS) >= 10
    assert canvas_module.to_device is packing.to_device  # what the mutants replace is one mechanism
