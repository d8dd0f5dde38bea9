"""What `sora bench` runs: profiles made of groups of measurements."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from sora_engine.bench.models import WAN_1_3B, WanShape
from sora_engine.bench.results import Measurement, Result, ResultError, Spread

Say = Callable[[str], None]
Group = Callable[[], list[Measurement]]


def cpu_groups(tiny: bool = False, long: bool = False) -> Mapping[str, Group]:
    """Ops, block, linear layers, end to end (with step and decode), serving: under 5 minutes on 2
    cores.

    long: 20 steps end to end and three traces, some 5 minutes each, and peak memory.
    Groups in `BY_NAME` run where they are asked for: `cpu`, a step in fp32, bf16 and int8 and a
    decode (5 minutes), `errors`, how far bf16 and int8 are from fp32 (1 minute), `session`, a world
    that is played (long: 10 minutes of a stream and 10,000 steps).
    tiny: everything once, at sizes that show no more than that it runs.
    """
    from dataclasses import replace

    from sora_engine.bench import http, serving, session
    from sora_engine.bench.accuracy import errors
    from sora_engine.bench.end_to_end import Run, end_to_end, peak_memory
    from sora_engine.bench.linear import linear
    from sora_engine.bench.ops import block, ops
    from sora_engine.bench.precision import precision
    from sora_engine.request import VideoRequest

    if tiny:
        shape = WanShape(heads=2, head_dim=12, ffn_dim=32, layers=1, text_dim=32, vae_base_dim=3)
        kinds = [
            replace(kind, width=32, height=32, num_frames=1, steps=1) for kind in serving.MIXED
        ]
        return {
            "ops": lambda: ops(tokens=64, heads=2, head_dim=12, rounds=1),
            "block": lambda: block(shape, (1, 2, 2), rounds=1),
            "linear": lambda: linear(tokens=24, width=256, hidden=512, rounds=1),
            "end-to-end": lambda: end_to_end(shape, Run(32, 32, 1, 3, 16)),
            "serving": lambda: [
                *serving.serving(kinds=kinds, count=4, rounds=1),
                serving.burst(kinds=kinds, count=2, rounds=1),
            ],
            "http": lambda: http.over_http(
                small=replace(http.SMALL, width=32, height=32, num_frames=1, steps=1),
                default=replace(http.DEFAULT, width=32, height=32, num_frames=5, steps=2),
                large=replace(http.LARGE, width=64, height=64, num_frames=5, steps=200),
                count=3,
                rounds=1,
                polls_s=0.3,
                clients=5,
            ),
            "session": lambda: session.session(seconds=1.0, players=(2,), steps=2, long_steps=10),
            "cpu": lambda: precision(shape, (1, 2, 2), (2, 2, 2), rounds=1),
            "errors": lambda: errors(
                shape, (VideoRequest("a", num_frames=1, height=16, width=16, seed=1),)
            ),
        }
    # Decoding is measured at a third of the VAE's width, where it does not take the time of steps.
    four = replace(WAN_1_3B, layers=4, vae_base_dim=32)
    run = Run(384, 352, 5, 6)
    groups: dict[str, Group] = {
        "ops": ops,
        "block": lambda: block(WAN_1_3B, (4, 12, 16)),
        "linear": linear,
        "end-to-end": lambda: end_to_end(four, run),
        "serving": lambda: [
            *serving.serving(count=40, rounds=3),
            serving.burst(rounds=2),
        ],
        "http": http.over_http,
        "session": session.session,
        "cpu": precision,
        "errors": errors,
    }
    if long:
        groups["end-to-end"] = lambda: end_to_end(four, replace(run, steps=20))
        groups["serving"] = lambda: [*serving.serving(), serving.burst()]
        groups["session"] = lambda: session.session(seconds=600.0, steps=300, long_steps=10_000)
        whole = replace(four, vae_base_dim=WAN_1_3B.vae_base_dim)
        groups["memory"] = lambda: peak_memory(whole, replace(run, steps=3))
    return groups


def h200_groups(tiny: bool = False, say: Say = print) -> Mapping[str, Group]:
    """Steps of the published models on one GPU; `tiny` is a dry run, on the CPU where need be."""
    import torch

    from sora_engine.bench.h200 import h200

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        raise ResultError("profile h200 needs a GPU; with --tiny it dry-runs on the CPU")
    return {"h200": lambda: h200(device=device, dry_run=tiny, say=say)}


PROFILES = ("cpu", "cpu-long", "h200")
BY_NAME = ("cpu", "errors", "http", "session")
"""Groups that run where they are asked for; `http` needs an extra, and a server of its own."""


def run(profile: str, *, only: Sequence[str] = (), tiny: bool = False, say: Say = print) -> Result:
    """Run a profile, or the groups `only` of it, and say each figure as it comes.

    Groups that need diffusers are left out, and said to be, where it is not installed. Raises
    ResultError for a profile or a group that is not there.
    """
    if profile not in PROFILES:
        raise ResultError(f"no profile {profile!r}; there are {', '.join(PROFILES)}")
    on_gpu = profile == "h200"
    groups = h200_groups(tiny, say) if on_gpu else cpu_groups(tiny, long=profile == "cpu-long")
    strange = [name for name in only if name not in groups]
    if strange:
        raise ResultError(
            f"profile {profile} has no group {strange[0]!r}, only {', '.join(groups)}"
        )
    found: list[Measurement] = []
    started = time.monotonic()
    for name, group in groups.items():
        if (name not in only) if only else name in BY_NAME:
            continue
        try:
            measured = group()
        except ModuleNotFoundError as error:
            if error.name is None or not error.name.startswith("diffusers"):
                raise
            say(f"{name}: left out, diffusers is not installed")
            continue
        for measurement in measured:
            say(describe(measurement))
        found += measured
    say(f"{len(found)} measurements in {time.monotonic() - started:.0f} s")
    return Result.here(f"{profile}-tiny" if tiny else profile, found)


def describe(measurement: Measurement) -> str:
    """A line for the terminal."""
    parts = []
    for name in measurement.samples:
        text = f"{name} {measurement.spread(name).median:.4g} {measurement.unit}"
        if name in measurement.rivals and len(measurement.samples) > 1:
            ratio = Spread.of(measurement.ratios(name))
            between = f"{ratio.low:.2f} to {ratio.high:.2f}"
            sure = measurement.figures.get(f"times better than {name}, 90% interval")
            text += f" ({ratio.median:.2f}x, {between if sure is None else f'90% {sure}'})"
        parts.append(text)
    return f"{measurement.name}: {', '.join(parts)}"
