"""`python -m sora_kernels.testing.gluon`: a Gluon kernel on the emulator, case by case."""

from __future__ import annotations

import argparse
import sys
import time

import torch

from sora_kernels.testing.gluon.cases import cases, check


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 where a case fails."""
    parser = argparse.ArgumentParser(prog="sora_kernels.testing.gluon", description=__doc__)
    parser.add_argument("--cases", type=int, default=60, help="how many (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the number to begin with")
    parser.add_argument("--kernel", choices=("gluon", "blackwell"), default="gluon")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiles are small
    began, failed, most = time.monotonic(), 0, dict[str, int]()
    try:
        for number, case in enumerate(cases(options.first + options.cases, options.kernel)):
            if number < options.first:
                continue
            try:
                launched = check(case)
            except AssertionError as error:
                failed += 1
                print(f"{number} {case}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            for name, count in launched.counts.items() if launched else ():
                most[name] = max(count, most.get(name, 0))
    finally:
        torch.set_num_threads(threads)
    counts = ", ".join(f"{count} {name}" for name, count in most.items())
    print(
        f"{options.cases - failed} of {options.cases} cases right in "
        f"{time.monotonic() - began:.1f} s; at most {counts} a program"
    )
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
