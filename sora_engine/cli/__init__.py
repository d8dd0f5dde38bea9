"""The `sora` command.

torch is imported by the commands that need it, after their first line of output, so that `--help`,
`--version` and a mistyped option answer at once.

Exit codes: 0 done; 1 it failed at work; 2 a value on the command line is wrong (nothing was made);
129 ended by SIGHUP, 130 by Ctrl-C, 143 by SIGTERM. `sora verify` has 3 and 4 besides. Errors are
one line on stderr.
"""

from __future__ import annotations

# A module of commands is registered by its import; `sora --help` lists them in this order.
from sora_engine.cli import (
    bench,
    clips,
    decode,
    doctor,
    families,
    generate,
    inspect,
    ladders,
    plan,
    play,
    quantize,
    serve,
    verify,
)  # isort: skip
from sora_engine.cli.app import main

__all__ = [
    "bench",
    "clips",
    "decode",
    "doctor",
    "families",
    "generate",
    "inspect",
    "ladders",
    "main",
    "plan",
    "play",
    "quantize",
    "serve",
    "verify",
]
