"""FlashAttention, xformers and FlexAttention as backends of packed attention.

FlexAttention runs here. The others run on CUDA alone: stand-ins with their signatures check what
they are called with and answer with the reference, so what comes back is checked as well.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from attention_checks import attention_cases, attention_inputs, check_attention, padding_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import sora_kernels as sk
from sora_kernels.attention import api, flash, flex
from sora_kernels.attention import xformers as xf
from sora_kernels.attention.operands import Operands
from sora_kernels.dispatch import Case
from sora_kernels.testing import generator, offsets

pytestmark = pytest.mark.usefixtures("poisoned_outputs")


@settings(max_examples=settings().max_examples // 2)
@given(attention_cases(max_length=150, head_dims=(16, 40, 64, 128)))
def test_flex(case):
    from torch.nn.attention.flex_attention import flex_attention

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "compiled", lambda: flex_attention)
        # Which runs on a CPU.
        patch.setattr(flex, "unsupported", lambda case: None)
        patch.setattr(api, "OP", replace(api.OP, _chosen={}))
        check_attention(case, "flex")


def test_flex_is_not_served_on_a_cpu():
    q, cu = torch.randn(4, 1, 16), offsets([4])
    with pytest.raises(sk.KernelUnavailableError, match="on CUDA, not on cpu"):
        sk.packed_attention(q, q, q, cu, cu, max_seqlen_q=4, max_seqlen_k=4, backend="flex")


@given(st.data())
def test_flex_sees_the_blocks_that_torch_finds(data):
    """Equal to FlexAttention's own `create_block_mask`, which makes the whole mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    count = data.draw(st.integers(1, 4))
    lengths = st.sampled_from([0, 1, 64, 127, 128, 129, 256, 384, 400])
    both = [data.draw(st.lists(lengths, min_size=count, max_size=count)) for _ in range(2)]
    if any(sum(lens) == 0 for lens in both):
        return
    q_offsets, k_offsets = (tuple(offsets(lens).tolist()) for lens in both)
    host = torch.device("cpu")
    ours = flex.block_mask.__wrapped__(q_offsets, k_offsets, host)
    torchs = create_block_mask(
        ours.mask_mod, None, None, q_offsets[-1], k_offsets[-1], device=host, BLOCK_SIZE=flex.BLOCK
    )
    assert ours.seq_lengths == torchs.seq_lengths
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(ours, name), getattr(torchs, name)), name


def test_flex_makes_no_mask_of_all_pairs():
    """16,384 tokens are 268 million pairs, and 16,384 pairs of blocks."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
                    assert self.elements <= 1 << 24, "a mask of pairs of tokens"
            return result

    with Largest() as largest:
        flex.block_mask.__wrapped__((0, 10_000, 16_384), (0, 10_000, 16_384), torch.device("cpu"))
    assert largest.elements <= 2 * 16_384


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_flex_compiled():
    case = {"q_lens": [3, 200, 0, 64], "k_lens": [7, 130, 5, 0], "heads": 2, "head_dim": 64,
            "dtype": torch.float32, "seed": 4, "layout": "dense", "magnitude": 1.0,
            "scale": None}  # fmt: skip
    inputs = [x.cuda() for x in attention_inputs(case)]
    lengths = {"max_seqlen_q": 200, "max_seqlen_k": 130, "return_lse": True}
    out, lse = sk.packed_attention(*inputs, **lengths, backend="flex")
    expected, expected_lse = reference(*inputs, None)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-3, atol=1e-3)


def reference(q, k, v, cu_q, cu_k, scale, padding=None):
    most_q, most_k = (int(cu.diff().max()) for cu in (cu_q, cu_k))
    return sk.packed_attention(
        q, k, v, cu_q, cu_k, max_seqlen_q=most_q, max_seqlen_k=most_k, scale=scale,
        padding=padding, return_lse=True, backend="reference",
    )  # fmt: skip


def varlen_stand_in(seen, blind_lse, tuple_always=False):
    """With the arguments of FlashAttention 2 and 3, in their order, and the layout of their lse."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal,
        return_attn_probs,
    ):  # fmt: skip
        assert not causal
        for tensor in (q, k, v):
            assert tensor.stride(-1) == 1
        for cu in (cu_seqlens_q, cu_seqlens_k):
            assert cu.dtype == torch.int32
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k == int(cu_seqlens_k.diff().max())
        seen.append(softmax_scale)
        out, lse = reference(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
        lse = torch.where(lse == float("-inf"), blind_lse, lse).T.contiguous()
        return (out, lse, None) if return_attn_probs or tuple_always else out

    return flash_attn_varlen_func


@pytest.mark.parametrize("blind_lse", [float("inf"), float("-inf")])
@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("tuple_always", [False, True])
def test_flash_is_called_as_documented(blind_lse, return_lse, tuple_always):
    case = {"q_lens": [3, 20, 0, 6], "k_lens": [7, 13, 5, 0], "heads": 2, "head_dim": 16,
            "dtype": torch.bfloat16, "seed": 4, "layout": "gaps", "magnitude": 1.0}  # fmt: skip
    q, k, v, cu_q, cu_k = attention_inputs(case)
    seen = []
    function = varlen_stand_in(seen, blind_lse, tuple_always)
    call = Operands(q, k, v, cu_q.long(), cu_k.long(), 20, 13, 0.3, return_lse=return_lse)
    out, lse = flash.serve(function, call)
    expected, expected_lse = reference(q, k, v, cu_q, cu_k, 0.3)
    assert seen == [0.3]
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse if return_lse else lse.new_empty(0))
    assert lse.is_contiguous()


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("k_lens", [[7, 13, 5, 0], [0, 0, 0, 0]])
def test_flash_has_padding_from_its_log_sum_exp(k_lens, return_lse):
    case = {"q_lens": [3, 20, 0, 6], "k_lens": k_lens, "heads": 2, "head_dim": 16, "seed": 4,
            "dtype": torch.float32, "layout": "gaps", "magnitude": 1.0,
            "padding": [472, 0, 3, 1]}  # fmt: skip
    q, k, v, cu_q, cu_k = attention_inputs(case)
    padding, function = padding_of(case), varlen_stand_in([], float("inf"))
    call = Operands(
        q, k, v, cu_q, cu_k, 20, max(k_lens), 0.3, return_lse=return_lse, padding=padding
    )
    out, lse = flash.serve(function, call)
    expected, expected_lse = reference(q, k, v, cu_q, cu_k, 0.3, padding)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse if return_lse else lse.new_empty(0))


def test_flash_refuses_a_log_sum_exp_in_another_layout():
    q = torch.randn(4, 2, 16)
    cu = offsets([4])
    padded = lambda *args, **kwargs: (q, torch.zeros(1, 2, 4), None)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"\[1, 2, 4\]"):
        flash.serve(padded, Operands(q, q, q, cu, cu, 4, 4, 1.0, return_lse=True))


@pytest.mark.parametrize("padding", [None, [5, 0, 300, 1]])
@pytest.mark.parametrize("layout", ["dense", "rows"])
@pytest.mark.parametrize(
    ("q_lens", "k_lens"), [([3, 20, 6], [7, 13, 1]), ([3, 20, 0, 6], [7, 13, 5, 0]), ([2], [0])]
)
def test_xformers_is_called_as_documented(q_lens, k_lens, layout, padding):
    padding = padding and padding[: len(q_lens)]
    case = {"q_lens": q_lens, "padding": padding, "k_lens": k_lens, "heads": 2, "head_dim": 16,
            "dtype": torch.float32, "seed": 4, "layout": layout, "magnitude": 1.0}  # fmt: skip
    q, k, v, cu_q, cu_k = attention_inputs(case)

    class BlockDiagonalMask(SimpleNamespace):
        @classmethod
        def from_seqlens(cls, q_seqlen, kv_seqlen=None, *, device=None):
            assert min(q_seqlen) > 0
            assert min(kv_seqlen) > 0
            assert device == q.device
            return cls(q=offsets(q_seqlen), k=offsets(kv_seqlen))

    def forward(query, key, value, attn_bias=None, p=0.0, scale=None):
        assert query.shape[0] == key.shape[0] == value.shape[0] == 1
        return reference(query[0], key[0], value[0], attn_bias.q, attn_bias.k, scale)[0][None]

    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
        memory_efficient_attention_forward=forward,
    )
    padding = padding_of(case)
    most = max(q_lens), max(k_lens)
    out = xf.serve(fmha, Operands(q, k, v, cu_q, cu_k, *most, 0.3, padding=padding))
    torch.testing.assert_close(out, reference(q, k, v, cu_q, cu_k, 0.3, padding)[0])


@pytest.mark.parametrize(
    ("module", "line"), [(flash, "pip install fa3-fwd"), (xf, "pip install xformers")]
)
def test_an_absent_library_is_named_with_its_install_line(module, line, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for cached in (flash.find, xf._fmha):
        cached.cache_clear()
    case = Case("cuda", 0, torch.bfloat16, 128)
    assert line in module.unsupported(case)
    for cached in (flash.find, xf._fmha):
        cached.cache_clear()


def install_version_3(monkeypatch, name, flags):
    """A module of version 3, and the file that says what it was built without."""
    modules = {
        name: SimpleNamespace(flash_attn_varlen_func=f"of {name}"),
        flash.CONFIGURATIONS[name]: SimpleNamespace(CONFIG={"build_flags": flags}),
    }
    known = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in modules else known(name)
    )
    for key, module in modules.items():
        monkeypatch.setitem(sys.modules, key, module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: (9, 0))


@pytest.fixture
def found_anew():
    flash.find.cache_clear()
    yield
    flash.find.cache_clear()


@pytest.mark.parametrize("name", flash.VERSION_3)
@pytest.mark.usefixtures("found_anew")
def test_flash_refuses_what_version_3_was_built_without(name, monkeypatch):
    """The flags are those that hopper/setup.py of flash-attention writes into the file."""
    flags = {f"FLASHATTENTION_DISABLE_HDIM{n}": n > 128 for n in (64, 96, 128, 192, 256)}
    install_version_3(monkeypatch, name, {**flags, "FLASHATTENTION_DISABLE_FP16": True})
    told = {
        (dtype, width): flash.unsupported(Case("cuda", 0, dtype, width))
        for dtype in (torch.bfloat16, torch.float16)
        for width in (128, 192)
    }
    assert told[torch.bfloat16, 128] is None
    assert told[torch.float16, 128] == f"torch.float16; {name} is built without it, and takes bf16"
    assert told[torch.bfloat16, 192] == f"head_dim 192; {name} is built for [64, 96, 128]"


@pytest.mark.usefixtures("found_anew")
def test_flash_takes_fp16_from_a_build_that_has_it(monkeypatch):
    install_version_3(monkeypatch, "flash_attn_interface", {"FLASHATTENTION_DISABLE_FP16": False})
    assert flash.unsupported(Case("cuda", 0, torch.float16, 128)) is None
    assert flash.find((9, 0), torch.float16, 128)[0] == "of flash_attn_interface"


def test_version_3_comes_first_on_hopper_and_nowhere_else():
    assert flash.candidates((9, 0))[0] == "flash_attn_interface"
    assert flash.candidates((9, 0))[-1] == "flash_attn"
    assert flash.candidates((8, 0)) == flash.candidates((10, 0)) == ("flash_attn",)


@pytest.mark.parametrize("backend", ["flash", "xformers"])
def test_a_name_never_falls_back(backend):
    q = torch.randn(4, 2, 16, generator=generator(0)).bfloat16()
    cu = offsets([4])
    with pytest.raises(sk.KernelUnavailableError, match="CUDA devices, not on cpu"):
        sk.packed_attention(q, q, q, cu, cu, max_seqlen_q=4, max_seqlen_k=4, backend=backend)
