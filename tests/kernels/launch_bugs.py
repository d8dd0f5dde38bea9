"""Bugs planted in the launchers, each with a call that meets it; run in a process of its own.

`python tests/kernels/launch_bugs.py NAME...` prints a line of JSON for each: what was caught, or
null. Kernels are compiled, so TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from sora_kernels import library
from sora_kernels.testing.launches.production import MODELS
from sora_kernels.testing.launches.runs import new_variants, run

KERNELS = Path(library.__file__).parent


@dataclass(frozen=True)
class Bug:
    """An edit of a launcher's source; the group of calls that meets it; a word of what is told.

    user: the module that imports what was edited, where that is not a launcher itself.
    """

    module: str
    old: str
    new: str
    group: str
    told: str
    arch: int = 90
    user: str = ""


ATTENTION, NORMS = "attention/triton.py", "modulate/triton.py"
BUGS = {
    "strides that TMA cannot take go into a descriptor": Bug(
        "triton_support.py", "return tensor.data_ptr() % 16 == 0 and all(", "return True or all(",
        "1.3B/strided: odd", "16-byte", user=ATTENTION),
    "keys are described with a box of another size than the kernel's": Bug(
        ATTENTION, "_source(k, launch.block_n, width // parts)",
        "_source(k, 2 * launch.block_n, width // parts)", "1.3B/5B 720p: self", "self-attention"),
    "more stages than shared memory holds": Bug(
        ATTENTION, "num_stages=launch.num_stages", "num_stages=6", "1.3B/5B 720p: self",
        "shared memory"),
    "too few warps for a tile": Bug(
        ATTENTION, "num_warps=launch.num_warps", "num_warps=2", "1.3B/5B 720p: self", "spills"),
    "heads are not padded to a power of two": Bug(
        "rope/triton.py", "triton.next_power_of_2(head_dim)), triton.next_power_of_2(heads)",
        "triton.next_power_of_2(head_dim)), heads", "1.3B/5B 720p: rope", "rope: KeyError"),
    "tokens lie on the second axis of the grid": Bug(
        NORMS, "(triton.cdiv(tokens, rows_each),),",
        "(1, triton.cdiv(tokens, rows_each)),", "1.3B/1080p: norm$", "a grid of"),
    "more warps than a block may have": Bug(
        NORMS, 'num_warps=row_warps("norm_modulate", architecture(x.device), rows_each * block)',
        "num_warps=64", "1.3B/5B 720p: norm$", "threads"),
    "a result in another dtype": Bug(
        NORMS, "y = torch.empty(x.shape, dtype=x.dtype,",
        "y = torch.empty(x.shape, dtype=torch.half,", "1.3B/5B 720p: norm$", "a result of"),
    "an absent operand is passed as a number": Bug(
        NORMS, "x if call.weight is None else", "0 if call.weight is None else",
        "1.3B/5B 720p: norm$", "weight_ptr is i32"),
    "no tokens are launched": Bug(
        NORMS, "if tokens == 0:", "if tokens < 0:", "1.3B/empty: norm$", "a grid of [0"),
    "two arguments change places": Bug(
        "causal/triton.py", "kept * pixels, channels, eps,", "kept * pixels, eps, channels,",
        "autoencoder/480p: causal 96",
        "IncompatibleType"),
    "rows that lie apart are described as they lie": Bug(
        "attention/items.py", "    if not fits:\n", "    if False:\n",
        "1.3B/strided/gluon: odd", "16-byte", user="attention/gluon.py"),
}  # fmt: skip
UNGUARDED = "the current device is not the tensors'"
SPECIALISED = "kernels are compiled for each number of tokens"
NAMES = (*BUGS, UNGUARDED, SPECIALISED)
MOST_VARIANTS = 14


@contextlib.contextmanager
def planted(module: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """The module of the edited source in the place of the true one."""
    source = (KERNELS / module).read_text(encoding="utf-8")
    if old not in source:
        raise ValueError(f"{module} has no {old!r}: write the bug anew")
    file = folder / module.replace("/", "_")
    file.write_text(source.replace(old, new), encoding="utf-8")
    name = "sora_kernels." + module.removesuffix(".py").replace("/", ".")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    # (`mock.patch.dict` would forget what is imported meanwhile, Triton's own classes too.)
    true = importlib.import_module(name)
    sys.modules[name] = made
    try:
        yield
    finally:
        sys.modules[name] = true


def caught(name: str) -> str | None:
    """What is told of a bug, or None."""
    if name == UNGUARDED:
        bare = {op: {"CUDA": serves["CPU"]} for op, serves in library.SERVES.items()}
        with mock.patch.dict(library.SERVES, bare):
            faults = run(90, "autoencoder/480p: causal 96", index=1, devices=2).faults
        return next((fault for fault in faults if "the current device is" in fault), None)
    with tempfile.TemporaryDirectory() as folder:
        if name == SPECIALISED:
            old = 'do_not_specialize=["rows_by", "table_rows", "tokens"]'
            with planted(NORMS, old, 'do_not_specialize=["rows_by", "table_rows"]', Path(folder)):
                gated = importlib.import_module("sora_kernels.gated.triton")
                edited = sys.modules["sora_kernels.modulate.triton"]
                with mock.patch.object(gated, "launch", edited.launch):
                    counts = [len(new) for new in new_variants(90, MODELS[0], 60)]
            return f"{sum(counts)} variants" if sum(counts) > MOST_VARIANTS else None
        bug = BUGS[name]
        with contextlib.ExitStack() as stack:
            stack.enter_context(planted(bug.module, bug.old, bug.new, Path(folder)))
            if bug.user:
                stack.enter_context(planted(bug.user, "", "", Path(folder)))
            faults = run(bug.arch, bug.group).faults
        return next((fault for fault in faults if bug.told in fault), None)


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        print(json.dumps([name, caught(name)]), flush=True)
