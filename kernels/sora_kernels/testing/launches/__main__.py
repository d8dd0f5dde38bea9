"""`python -m sora_kernels.testing.launches`: the launchers at production sizes, without a GPU."""

from __future__ import annotations

import argparse
import sys
import time

from sora_kernels.aot import ARCHITECTURES
from sora_kernels.testing.launches.production import MODELS
from sora_kernels.testing.launches.runs import new_variants, run


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 where something would not launch."""
    parser = argparse.ArgumentParser(prog="sora_kernels.testing.launches", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, metavar="SM")
    parser.add_argument("--only", default="", metavar="REGEX", help="groups of calls to launch")
    parser.add_argument("--requests", type=int, default=0, help="count variants over so many")
    options = parser.parse_args(arguments)
    faults = 0
    for arch in options.arch:
        began = time.monotonic()
        if options.requests:
            found = new_variants(arch, MODELS[0], options.requests)
            last = max(i for i, new in enumerate(found, 1) if new)
            print(
                f"sm_{arch}: {sum(map(len, found))} variants over {options.requests} requests, "
                f"the last new one in request {last}"
            )
            continue
        report = run(arch, options.only)
        record = report.record
        faults += len(report.faults)
        print(*report.faults, sep="\n", end="\n" if report.faults else "", file=sys.stderr)
        print(
            f"sm_{arch}: {report.calls} calls, {len(record.launches)} launches of "
            f"{len(record.loaded)} kernels, {record.tensor_maps} tensor maps, "
            f"{len(report.faults)} faults, {time.monotonic() - began:.0f} s",
            flush=True,
        )
    return bool(faults)


if __name__ == "__main__":
    raise SystemExit(main())
