"""From the lines of a run on a card to the backends that `auto` may take there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from sora_kernels.admission import Admission

LEAST_GAIN = 1.03
"""How much faster than what `auto` takes a backend must be, at each shape that was timed."""
OP, TAKEN = "packed_attention", "triton"

Line = dict[str, Any]


def last_run(lines: Sequence[Line]) -> list[Line]:
    """The lines from the last time on that the machine was named."""
    starts = [i for i, line in enumerate(lines) if line.get("what") == "commit"]
    return list(lines[starts[-1] :]) if starts else []


def admissions(lines: Sequence[Line]) -> Iterator[Admission]:
    """Those of the last run that came out right in every case, and faster at every shape."""
    run = last_run(lines)
    said = {line["what"]: line["figure"] for line in run if line.get("stage") == "rates"
            and "what" in line}  # fmt: skip
    timed = [line for line in run if line.get("op") == OP and "tflops" in line]
    checked = [line for line in run if line.get("op") == OP and "right" in line]
    taken = {line["shape"]: line["tflops"] for line in timed if line["backend"] == TAKEN}
    for backend in sorted({line["backend"] for line in timed} - {TAKEN}):
        dtypes = [
            dtype
            for dtype in sorted({line["dtype"] for line in checked if line["backend"] == backend})
            if all(
                line["right"]
                for line in checked
                if (line["backend"], line["dtype"]) == (backend, dtype)
            )
        ]
        own = [line for line in timed if line["backend"] == backend and line["shape"] in taken]
        gains = [line["tflops"] / taken[line["shape"]] for line in own]
        if not dtypes or not gains or min(gains) < LEAST_GAIN:
            continue
        yield Admission(
            op=OP,
            backend=backend,
            architecture=int(said["architecture"]),
            head_dims=tuple(sorted({int(line["head_dim"]) for line in own})),
            dtypes=tuple(dtypes),
            triton=".".join(str(said["triton"]).split(".")[:2]),
            gain=round(min(gains), 3),
            device=str(said["device"]),
            commit=str(said["commit"]),
        )
