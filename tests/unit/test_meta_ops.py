"""Operations on meta tensors, against torch's own on the host."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch

from sora_engine.vae.meta_ops import on_meta
from sora_engine.vae.meter import StorageMeter

aten = torch.ops.aten
SHAPE = (2, 3, 4)


def layouts(dtype):
    """Tensors of one shape, or that broadcast to it, laid out in all ways that models have."""
    return {
        "whole": torch.ones(SHAPE, dtype=dtype),
        "permuted": torch.ones(4, 3, 2, dtype=dtype).permute(2, 1, 0),
        "cut": torch.ones(2, 5, 4, dtype=dtype)[:, :3],
        "every other": torch.ones(2, 3, 8, dtype=dtype)[..., ::2],
        "a row": torch.ones(4, dtype=dtype),
        "channels": torch.ones(3, 1, 1, dtype=dtype)[:, 0],
        "a table": torch.ones(4, 3, dtype=dtype).T,
        "a column of a table": torch.ones(3, 2, dtype=dtype)[:, :1],
        "a column": torch.ones(3, 1, dtype=dtype),
        "expanded": torch.ones(2, 1, 4, dtype=dtype).expand(SHAPE),
        "single": torch.ones((), dtype=dtype),
    }


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def facts(tensor):
    """Shape, dtype, and strides of the axes that have any."""
    strides = tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    return tuple(tensor.shape), tensor.dtype, strides


def as_meta(tensor):
    """With its strides, which `to` does not keep where there are holes between elements."""
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    assert empty.stride() == tensor.stride()
    return empty


def check(func, *args, **kwargs):
    want = func(*args, **kwargs)
    given = [as_meta(a) if isinstance(a, torch.Tensor) else a for a in args]
    got = facts(on_meta(func, given, kwargs))
    if got != facts(want):  # torch itself lays some mixtures out differently on meta
        assert got == facts(func(*given, **kwargs))


@pytest.mark.parametrize(
    "func",
    [aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.lt.Tensor, aten.maximum.default],
)
def test_two_operands(func):
    for first, second in itertools.product(DTYPES, DTYPES):
        if func is aten.maximum.default and torch.bool in (first, second):
            continue
        for a, b in itertools.product(layouts(first).values(), layouts(second).values()):
            check(func, a, b)


@pytest.mark.parametrize("func", [aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor])
@pytest.mark.parametrize("number", [2, 0.5, True])
def test_a_number(func, number):
    for dtype in DTYPES:
        for x in layouts(dtype).values():
            check(func, x, number)


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten.cos.default, ()),
        (aten.neg.default, ()),
        (aten.silu.default, ()),
        (aten.exp.default, ()),
        (aten.clamp_min.default, (0,)),
        (aten.clamp.default, (0, 1.5)),
        (aten.remainder.Scalar, (3,)),
        (aten.round.default, ()),
    ],
)
def test_one_operand(func, args):
    for dtype in (torch.float32, torch.bfloat16):
        for x in layouts(dtype).values():
            check(func, x, *args)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_choice_between_a_tensor_and_a_number(dtype):
    for x in layouts(dtype).values():
        for number in (1, 0.5):
            check(aten.where.ScalarOther, x > 0, x, number)
            check(aten.where.ScalarSelf, x > 0, number, x)


def test_none_of_these_imports_the_compiler():
    """In a process of its own, since another test may have."""
    script = """
import sys, torch
from sora_engine.vae.meta_ops import on_meta
aten = torch.ops.aten
which, x, half = (
    torch.empty(4, 3, device="meta", dtype=d) for d in (torch.bool, torch.float32, torch.bfloat16)
)
on_meta(aten.where.ScalarOther, (which, x, 1), {})
on_meta(aten.where.ScalarSelf, (which, 1, x), {})
on_meta(aten.linalg_vector_norm.default, (half, 2, [1], True), {"dtype": torch.float32})
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_gelu_keeps_its_approximation():
    check(aten.gelu.default, torch.ones(SHAPE), approximate="tanh")


def test_in_place():
    x = torch.empty(SHAPE, device="meta")
    assert on_meta(aten.add_.Tensor, (x, torch.empty(4, device="meta")), {}) is x


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_cat(axis):
    for a, b in itertools.product(layouts(torch.float32).items(), layouts(torch.bfloat16).items()):
        if len(a[1].shape) == len(b[1].shape) == 3:
            check_cat([a[1], b[1]], axis)
            check_cat([x[1][None].expand(2, 2, 3, 4) for x in (a, b)], axis)
    videos = [torch.ones(2, 3, 2, 4, 4), torch.ones(2, 2, 4, 4, 3).movedim(-1, 1)]
    for a, b in itertools.product(videos, videos):
        check_cat([a, b], axis)
    longer = list(SHAPE)
    longer[axis] = 7
    check_cat([torch.ones(SHAPE), torch.ones(longer), torch.ones(SHAPE)], axis)


def check_cat(tensors, axis):
    want = aten.cat.default(tensors, axis)
    got = on_meta(aten.cat.default, ([as_meta(t) for t in tensors], axis), {})
    assert facts(got) == facts(want)


@pytest.mark.parametrize("numbers", [(0, 9, 2), (3, 9, 2), (9, 2, -3)])
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float64}])
def test_arange(numbers, options):
    func = aten.arange.start_step
    got = on_meta(func, numbers, {**options, "device": torch.device("meta")})
    assert facts(got) == facts(func(*numbers, **options, device=torch.device("cpu")))


@pytest.mark.parametrize("func", [aten.stack.default])
def test_stack(func):
    for x in layouts(torch.float32).values():
        got = on_meta(func, ([as_meta(x)] * 3,), {})
        assert facts(got) == facts(func([x] * 3))


def test_what_torch_refuses_is_refused():
    x, y = (torch.empty(size, device="meta") for size in (SHAPE, (2, 3, 5)))
    for func, args in (
        (aten.add.Tensor, (x, y)),
        (aten.cat.default, ([x, y], 0)),
        (aten.linear.default, (x, y[0])),
    ):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            on_meta(func, args, {})


def test_norms_and_linear_layers():
    x = torch.ones(2, 3, 4)
    for axes in ([1], [-1], [0, 2]):
        check(aten.linalg_vector_norm.default, x, 2, axes, True)
        check(aten.linalg_vector_norm.default, x.permute(2, 0, 1), 2, axes, True)
    check(aten.linalg_vector_norm.default, x, 2, [1], False)
    for given in (x, x.bfloat16()):
        check(aten.linalg_vector_norm.default, given, 2, [1], True, dtype=torch.float32)
    for bias in (None, torch.ones(5)):
        check(aten.linear.default, x, torch.ones(5, 4), bias)
    for bias in (torch.ones(5), torch.ones(3, 5), torch.ones(1, 1)):
        check(aten.addmm.default, bias, x[0], torch.ones(5, 4).T)
    for axes, kept in (([1], False), ([-1], True), ([0, 2], False)):
        check(aten.mean.dim, x, axes, kept)


def test_a_model_holds_what_it_held():
    """Of a stretch of layers, the bytes alive and their peak, against sums by hand."""

    def run(x):
        gate = torch.nn.functional.silu(x @ x.transpose(0, 1))
        return torch.stack([gate, gate * 2]).sum(0) / 3 + gate.softmax(-1)

    with torch.inference_mode():
        with StorageMeter() as meter:
            kept = run(torch.empty(64, 32, device="meta"))
        assert meter.now == kept.nbytes
        # x, scores, gate (in place of none), a pair of them, their stack: counted by hand.
        square = 64 * 64 * 4
        assert meter.peak == 64 * 32 * 4 + 2 * square + 3 * square - square
