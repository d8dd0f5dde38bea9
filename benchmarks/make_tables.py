"""Makes the README's benchmark tables anew from `benchmarks/results/`.

    python benchmarks/make_tables.py [--check]

`--check` changes nothing, and exits with 1 where a table is not what the results say.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sora_engine.bench.tables import fill

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/cpu.md",
    "docs/parallel.md",
    "docs/quantised.md",
    "docs/serving.md",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text(encoding="utf-8")
        made = fill(text, ROOT / "benchmarks" / "results")
        if made != text:
            stale.append(name)
            if not check:
                page.write_text(made, encoding="utf-8")
    for name in stale:
        print(f"{name}: {'differs from the results' if check else 'made anew'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
