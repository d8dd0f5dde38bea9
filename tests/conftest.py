"""Settings for all tests: random cases, the threads of a worker, parts of the slow set."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

from tests.kernels.gpu_runs import asks_for_gpu
from tests.slow_parts import parse_part, part_of

# Workers (`-n 2`) share the cores out. This stands before torch is imported, which reads it once.
# So do the processes that tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# Triton's interpreter multiplies tiles by NumPy. OpenBLAS's kernels for AVX2 alone (Haswell, Zen)
# give a row other bits at another place of its tile, as no GPU does; these, of any x86, do not. It
# stands before NumPy is imported, and is set whatever the environment says.
os.environ["OPENBLAS_CORETYPE"] = "Nehalem"

# A first call that imports or compiles something is no slowness of the case that it meets.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--slow-part",
        metavar="PART/PARTS",
        help="run this part of the slow set: 2/6 is the second of six",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Triton reads whether to interpret when a kernel is decorated, its own on import, so it is
    settled before any test is imported.

    A run that asks for the GPU's tests compiles its kernels; any other interprets them, and tests
    that compile some do so in processes of their own.
    """
    if not asks_for_gpu(config.option.markexpr):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if config.option.slow_part is not None:
        try:
            parse_part(config.option.slow_part)
        except ValueError as error:
            raise pytest.UsageError(f"--slow-part {error}") from None
        config.option.markexpr = "slow"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What an interpreter computes says nothing of a GPU."""
    if item.get_closest_marker("gpu") and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this run; -m gpu compiles them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.slow_part is None:
        return
    part, parts = parse_part(config.option.slow_part)
    of_part = {
        file: part_of(file, parts) == part for file in {i.nodeid.split("::")[0] for i in items}
    }
    others = [item for item in items if not of_part[item.nodeid.split("::")[0]]]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if of_part[item.nodeid.split("::")[0]]]
