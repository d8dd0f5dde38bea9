"""What a process of its own finds out about calls that are launched again: `python replays.py`.

Kernels are compiled for a card that is not there, and tensors of the CPU are its tensors. Prints
one JSON object: by the name of a check what it came to.
"""

from __future__ import annotations

import gc
import json
import weakref
from unittest import mock

import torch
from triton import knobs

import sora_kernels as sk
from sora_kernels import checks, replay
from sora_kernels.modulate import api as modulate
from sora_kernels.testing import offsets
from sora_kernels.testing.launches.driver import Driver
from sora_kernels.testing.launches.host import as_card
from sora_kernels.warming import Notes

HEADS, WIDTH = 3, 128
TOKENS, DIM = 24, HEADS * WIDTH


class Recording(Driver):
    """A driver that keeps of each launch the kernel, its grid and its arguments."""

    def __init__(self, arch):
        super().__init__(arch, 1)
        self.kept = []

    def launcher_cls(self, source, metadata):
        def launcher(x, y, z, stream, function, packed, launch_metadata, enter, leave, *values):
            self.kept.append((metadata.hash, (x, y, z), [described(value) for value in values]))

        return launcher

    def take(self):
        kept, self.kept = self.kept, []
        return kept


def described(value):
    """An argument so that it can be compared: of a tensor where it is and how it lies."""
    if isinstance(value, torch.Tensor):
        held = value.untyped_storage().nbytes() > 0
        return "tensor", str(value.dtype), [*value.stride()], value.data_ptr() if held else 0
    if hasattr(value, "block_shape"):
        fields = [*value.shape], [*value.strides], [*value.block_shape], value.padding
        return "descriptor", fields, described(value.base)
    return str(value)


def results_aside(launches, operands):
    """Launches with addresses of `operands` by their number, and those of others as one word."""
    numbers = {x.data_ptr(): i for i, x in enumerate(operands) if isinstance(x, torch.Tensor)}

    def named(value):
        if isinstance(value, tuple) and value[0] == "tensor":
            return (*value[:3], numbers.get(value[3], "made"))
        if isinstance(value, tuple):
            return *value[:2], named(value[2])
        return value

    return [(kernel, grid, [named(value) for value in values]) for kernel, grid, values in launches]


def made(*shape, dtype=torch.bfloat16, off=0):
    """A tensor that begins `off` elements behind a multiple of 16 bytes."""
    count = 1
    for size in shape:
        count *= size
    return torch.randn(count + 64).to(dtype)[off : off + count].view(shape)


def calls(off=0):
    """Calls of every op that a block makes, each with its operands: by name."""
    x, residual = made(TOKENS, DIM, off=off), made(TOKENS, DIM, dtype=torch.float32)
    table = made(1, 6, DIM, dtype=torch.float32)
    rows = made(4, 6, DIM, dtype=torch.float32)
    index = torch.arange(TOKENS) % 4
    gate, scale, shift = table.unbind(1)[:3]
    gates, scales, shifts = rows.unbind(1)[:3]
    weight = made(DIM)
    q, k, v = made(TOKENS, 3 * DIM, off=off).view(TOKENS, 3 * HEADS, WIDTH).split(HEADS, dim=1)
    cos, sin = (made(TOKENS, WIDTH // 2, dtype=torch.float32) for _ in range(2))
    keys = made(10, HEADS, WIDTH)
    even, uneven, texts = offsets([12, 12]), offsets([10, 14]), offsets([3, 7])
    plan = sk.plan_attention(uneven, num_tokens=TOKENS, head_dim=WIDTH, dtype=torch.bfloat16)
    past, frames = made(1, 2, 6, 96), made(1, 4, 6, 96)
    frame_weight = made(96, dtype=torch.float32)
    whole = {"max_seqlen_q": 12, "max_seqlen_k": 12}
    counts = torch.tensor([509, 505], dtype=torch.int32)
    padding = sk.Padding(*made(2, HEADS, WIDTH), counts)
    parts = {"max_seqlen_q": 14, "max_seqlen_k": 7, "padding": padding}
    gated = sk.gate_residual_norm_modulate
    return {
        "norm": (sk.norm_modulate, (x, scale, shift, None), {}),
        "norm of several levels": (sk.norm_modulate, (x, scales, shifts, index), {}),
        "gated": (gated, (x, residual, gate, scale, shift, None), {}),
        "gated, affine": (gated, (x, residual, gates, None, None, index), {"weight": weight}),
        "rope": (sk.qk_norm_rope, (q, k, weight, weight, cos, sin), {"across_heads": True}),
        "norm of q": (sk.qk_norm_rope, (q, None, weight, None, None, None), {"across_heads": True}),
        "attention": (sk.packed_attention, (q, k, v, even, even), whole),
        "cross-attention": (
            sk.packed_attention, (q, keys, keys, uneven, texts), {**parts, "plan": plan},
        ),
        "causal": (sk.causal_norm_silu, (frames, past, frame_weight), {"eps": 1e-6}),
    }  # fmt: skip


def forms(results):
    several = results if isinstance(results, tuple) else (results,)
    return [x if x is None else (x.shape, x.dtype, x.stride(), x.device) for x in several]


def unchecked(*arguments):
    """Of tensors on a card no values are checked."""


def replays():
    """Kinds of calls that would be launched again."""
    return sum(one is not None for known in replay._EVERY for one in known.values())


def launched(call, driver):
    function, operands, named = call
    driver.take()
    with torch.inference_mode():
        results = function(*operands, **named)
    plan, padding = named.get("plan"), named.get("padding")
    more = [] if plan is None else [plan.tiles]
    if padding is not None:
        more += [padding.key, padding.value, padding.counts]
    return results_aside(driver.take(), [*operands, *more]), results


def main():
    found = {}
    driver = Recording(90)
    with as_card("cpu", 90, driver), mock.patch.object(checks, "check_row_values", unchecked):
        # The launch of a call that was seen, against Triton's own of the same operands.
        replay_call = replay._Replay.__call__
        for name, call in calls().items():
            replay.forget()
            launched(calls()[name], driver)
            with mock.patch.object(replay._Replay, "__call__", autospec=True) as used:
                used.side_effect = replay_call
                again, results = launched(call, driver)
            replay.forget()
            by_triton, expected = launched(call, driver)
            found[f"{name}: replays"] = used.call_count
            found[f"{name}: the same launch"] = bool(again) and again == by_triton
            found[f"{name}: the same kind of results"] = forms(results) == forms(expected)
        # A tensor that begins elsewhere is of another kind: Triton has another kernel for it.
        replay.forget()
        call, shifted = calls()["norm"], calls(off=1)["norm"]
        aligned, _ = launched(call, driver)
        other, _ = launched(shifted, driver)
        again, _ = launched(shifted, driver)
        found["another kernel where rows begin elsewhere"] = aligned[0][0] != other[0][0]
        found["and so when it is seen again"] = again == other
        # More tokens are of another kind, of fewer the launch is not taken.
        function, (x, *rest), named = calls()["norm"]
        fewer, _ = launched((function, (x[:7], *rest), named), driver)
        found["fewer tokens have a grid of their own"] = fewer[0][1] != aligned[0][1]
        # What is refused is refused each time.
        refused = 0
        for _ in range(2):
            try:
                launched((function, (x, rest[0][:, :8], *rest[1:]), named), driver)
            except ValueError:
                refused += 1
        found["refused each time"] = refused
        # Without a plan a table of tiles is computed: that is more than a launch.
        replay.forget()
        function, operands, named = calls()["cross-attention"]
        for _ in range(3):
            unplanned, _ = launched((function, operands, {**named, "plan": None}), driver)
        found["a call that computes is not replayed"] = replays() == 0 and len(unplanned) == 1
        replay.forget()
        function, (x, scale, shift, _), _ = calls()["norm"]
        arguments = (x, scale, shift, None, "layer", None, None, 1e-6, "auto")
        doubled = replay.Replayed(lambda *args: modulate.run(*args).mul_(2))
        kind = replay.kind_of(arguments)
        assert kind is not None
        for _ in range(2):
            doubled(kind, arguments)
        found["nor is one that goes on to compute"] = replays() == 0
        plain = replay.Replayed(modulate.run)
        plain(kind, arguments)
        found["though its launch alone would be"] = replays() == 1
        # Nothing of a call is kept alive.
        replay.forget()
        call = calls()["gated"]
        kept = [weakref.ref(x) for x in call[1] if x is not None]
        results = launched(call, driver)[1]
        kept += [weakref.ref(x) for x in results]
        found["it was kept as a kind"] = replays()
        del call, results
        gc.collect()
        found["tensors of a call that are kept"] = sum(ref() is not None for ref in kept)
        # Who looks on sees the op.
        call = calls()["norm"]
        launched(call, driver)
        with Notes() as notes:
            launched(call, driver)
        found["a mode sees the op"] = [func._schema.name for func, _ in notes.calls]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            launched(call, driver)
        names = {event.name for event in profile.events()}
        found["a profiler sees the op"] = "sora::norm_modulate" in names
        # Triton's hooks are called.
        hook, told = knobs.runtime.launch_enter_hook, []
        hook.add(told.append)
        with mock.patch.object(replay._Replay, "__call__") as used:
            launched(call, driver)
        hook.remove(told.append)
        found["a hook of Triton's stops replays"] = not used.called
        replay.MOST_KINDS = 3
        replay.forget()
        for tokens in range(1, 12):
            function, (x, *rest), named = call
            launched((function, (x[:tokens], *rest), named), driver)
        found["kinds that are kept of many"] = replays()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
