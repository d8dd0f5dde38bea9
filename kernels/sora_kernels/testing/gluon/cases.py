"""Varlen cases of the Gluon kernels, each run on the emulator and held against fp64."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import sora_kernels as sk
from sora_kernels.attention.operands import Operands
from sora_kernels.attention.plan import plan_tiles
from sora_kernels.testing import check_within_budget, generator, guarded, offsets
from sora_kernels.testing.faults import FaultError
from sora_kernels.testing.gluon.language import Emulator, Launched, kernel_source, load_kernel
from sora_kernels.testing.gluon.machine import LANDINGS

# Around a warpgroup's 64 queries, a tile's 128, and blocks of 128 keys.
LENGTHS = (0, 1, 2, 63, 64, 65, 127, 128, 129, 200, 256, 257, 300, 385)
LAYOUTS = ("dense", "rows", "gaps")


@dataclass(frozen=True)
class Case:
    """A packed batch and a schedule. `spoilt`: the segment whose keys and values are NaN.

    block: queries a tile of the plan, 0 for a call without one. counts: of padding, for each
    segment; padding's key and value are NaN where it is the spoilt segment's alone. kernel: the
    backend whose source runs.
    """

    q_lens: tuple[int, ...]
    k_lens: tuple[int, ...]
    heads: int = 1
    width: int = 64
    dtype: torch.dtype = torch.bfloat16
    layout: str = "dense"
    offsets: torch.dtype = torch.int32
    lse: bool = True
    counts: tuple[int, ...] | None = None
    block: int = 0
    spoilt: int | None = None
    magnitude: float = 1.0
    processors: int = 3
    seed: int = 0
    landing: str = "any"
    kernel: str = "gluon"


FIXED = (
    Case((5,), (300,)),
    Case((128,), (128,), heads=2, width=128),
    Case((129, 64), (256, 1), landing="late"),
    Case((200, 0, 37), (130, 5, 0), heads=3, landing="early"),
    Case((1, 1, 300), (385, 129, 640), processors=1, landing="late"),
    Case((70, 70, 70), (500, 500, 500), heads=2, processors=2),
    Case((300, 1, 0, 200), (300, 1, 0, 200), heads=2, dtype=torch.float16, block=128),
    Case((64,), (0,), heads=2),
    Case((64, 9), (0, 0), heads=2, counts=(3, 0)),
    Case((130, 0, 70, 20), (5, 3, 0, 300), heads=2, width=128, counts=(507, 1, 512, 0)),
    Case((200, 30, 10), (40, 2, 129), counts=(472, 0, 1), lse=False, processors=1, landing="late"),
    Case((70, 130), (200, 140), counts=(0, 9), spoilt=1, landing="early"),
    Case((10, 20), (0, 257), lse=False, layout="rows"),
    Case((130, 20, 70), (200, 60, 150), spoilt=1, landing="late"),
    Case((130, 20, 70), (200, 60, 150), width=128, spoilt=1, layout="rows", heads=2),
    Case((20, 130, 70), (60, 385, 150), spoilt=0, processors=1, landing="early"),
    Case((20, 130, 70), (60, 385, 150), spoilt=2, layout="gaps", offsets=torch.int64),
)
"""What each kind of fault is met by: tails, empty segments, NaN beside a tail, each landing."""


def drawn(seed: int) -> Case:
    """A case at random, the same for a seed."""
    rng = random.Random(seed)
    count = rng.randint(1, 4)
    q_lens = [rng.choice(LENGTHS) for _ in range(count)]
    k_lens = [rng.choice(LENGTHS) for _ in range(count)]
    if rng.random() < 0.3:
        k_lens = list(q_lens)
    if sum(q_lens) == 0:
        q_lens[0] = rng.randint(1, 130)
    return Case(
        tuple(q_lens),
        tuple(k_lens),
        heads=rng.choice((1, 1, 2, 3)),
        width=rng.choice((64, 128)),
        dtype=rng.choice((torch.bfloat16, torch.float16)),
        layout=rng.choice(LAYOUTS),
        offsets=rng.choice((torch.int32, torch.int64)),
        lse=rng.random() < 0.7,
        counts=tuple(rng.choice((0, 1, 7, 472)) for _ in q_lens) if rng.random() < 0.5 else None,
        block=rng.choice((0, 64, 128)),
        spoilt=rng.randrange(count) if rng.random() < 0.3 else None,
        magnitude=rng.choice((1.0, 1.0, 1e-3, 10.0)),
        processors=rng.randint(1, 4),
        seed=seed,
        landing=LANDINGS[seed % len(LANDINGS)],
    )


def cases(count: int, kernel: str = "gluon") -> Iterator[Case]:
    """`count` of them: the fixed ones first, then at random."""
    drawings = (drawn(seed) for seed in itertools.count())
    for case in itertools.islice(itertools.chain(FIXED, drawings), count):
        # Plans of Blackwell's tiles in the place of Hopper's.
        block = 256 if case.block == 128 and kernel == "blackwell" else case.block
        yield replace(case, kernel=kernel, block=block)


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, with NaN around them in memory."""
    rng = generator(case.seed)
    made: Any = {"layout": case.layout, "magnitude": case.magnitude}
    shape = (case.heads, case.width)
    q, k, v = (
        guarded((sum(lens), *shape), case.dtype, rng, **made)
        for lens in (case.q_lens, case.k_lens, case.k_lens)
    )
    if case.spoilt is not None:
        first = sum(case.k_lens[: case.spoilt])
        for tensor in (k, v):
            tensor[first : first + case.k_lens[case.spoilt]] = float("nan")
    return q, k, v


def padding_of(case: Case, spoilt: bool = False) -> sk.Padding | None:
    """As for a call; spoilt: NaN where no segment but the spoilt one reads it."""
    if case.counts is None:
        return None
    rng = generator(case.seed + 1)
    made: Any = {"layout": case.layout, "magnitude": case.magnitude}
    shape = (1, case.heads, case.width)
    key, value = (guarded(shape, case.dtype, rng, **made)[0] for _ in range(2))
    others = [n for i, n in enumerate(case.counts) if i != case.spoilt]
    if spoilt and case.spoilt is not None and not any(others):
        key, value = (torch.full_like(tensor, float("nan")) for tensor in (key, value))
    return sk.Padding(key, value, torch.tensor(case.counts, dtype=case.offsets))


def attend(
    case: Case, operands: tuple[Tensor, Tensor, Tensor], source: str | None = None
) -> tuple[Tensor, Tensor, Launched | None]:
    """out, lse and the launch (None where nothing is launched) of the kernel's own `run`.

    source: of the kernel, where it is another than the package's.
    """
    emulator = Emulator(case.processors, case.seed, case.landing)
    module = load_kernel(source or kernel_source(case.kernel), "emulated_kernel", emulator)
    cu_q, cu_k = (offsets(lens, case.offsets) for lens in (case.q_lens, case.k_lens))
    tiles = plan_tiles(cu_q, sum(case.q_lens), case.block) if case.block else None
    call = Operands(
        *operands,
        cu_q,
        cu_k,
        max(case.q_lens),
        max(case.k_lens),
        case.width**-0.5,
        tiles,
        case.block,
        case.lse,
        padding_of(case, spoilt=True),
    )
    out, lse = module.run(call)
    return out, lse, emulator.launches[-1] if emulator.launches else None


def check(case: Case, source: str | None = None) -> Launched | None:
    """Run a case. Raises AssertionError for what is wrong, FaultError where a GPU would fail.

    Every element of the results is written once; they keep FlashAttention's error budget against
    fp64, and a segment of NaN spoils none but its own queries.
    """
    q, k, v = inputs(case)
    out, lse, launched = attend(case, (q, k, v), source)
    if launched is not None:
        for name in ("out_ptr", "lse_ptr"):
            stores = launched.arrays[name].stores
            if not bool((stores == 1).all()):
                raise FaultError(f"{name}: elements stored to {stores.unique().tolist()} times")
    clean: Any = (q, *(tensor.nan_to_num(0.0) for tensor in (k, v)))
    reference: Any = sk.packed_attention
    arguments: Any = {
        "max_seqlen_q": max(case.q_lens),
        "max_seqlen_k": max(case.k_lens),
        "return_lse": True,
        "backend": "reference",
    }
    cu = offsets(case.q_lens), offsets(case.k_lens)
    padding = padding_of(case)
    low, low_lse = reference(*clean, *cu, **arguments, padding=padding)
    wide: Any = (tensor.double() for tensor in clean)
    if padding is not None:
        padding = sk.Padding(padding.key.double(), padding.value.double(), padding.counts)
    exact, exact_lse = reference(*wide, *cu, **arguments, padding=padding)
    kept = torch.ones(len(q), dtype=torch.bool)
    counts = case.counts or (0,) * len(case.k_lens)
    if case.spoilt is not None and case.k_lens[case.spoilt] + counts[case.spoilt]:
        first = sum(case.q_lens[: case.spoilt])
        kept[first : first + case.q_lens[case.spoilt]] = False
    check_within_budget("out", out[kept], exact[kept], low[kept])
    if case.lse:
        # An lse off by half the inputs' epsilon moves each weight by less than its rounding.
        floor = torch.finfo(case.dtype).eps / 2
        check_within_budget(
            "lse", lse[kept], exact_lse[kept], low_lse[kept], slack=8.0, floor=floor
        )
    elif lse.numel():
        raise AssertionError("a log-sum-exp that was not asked for")
    return launched


def schedules(case: Case, count: int) -> Iterator[Case]:
    """The case under other schedules, each landing in turn."""
    for i in range(count):
        yield replace(case, seed=case.seed + i, landing=LANDINGS[i % len(LANDINGS)])


def check_schedules(case: Case, count: int, source: str | None = None) -> None:
    """`check` under so many schedules."""
    for scheduled in schedules(case, count):
        check(scheduled, source)
