"""What every Triton backend needs: whether it can serve, and dense operands."""

from __future__ import annotations

import atexit
import contextlib
import functools
import getpass
import logging
import os
import shutil
import tempfile

import torch
from torch import Tensor

from sora_kernels.dispatch import Case

logger = logging.getLogger("sora_kernels")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_CHANNELS = 16384  # a row is held in registers


@functools.cache
def problem(device_type: str) -> str | None:
    try:
        import triton
    except ImportError:
        return "triton is not installed"
    if device_type == "cuda":
        if torch.cuda.get_device_capability()[0] < 8:
            return "it needs compute capability 8.0"
        settle_caches()
        return None
    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return None
    return f"Triton does not run on {device_type} (on a CPU: with TRITON_INTERPRET=1, for tests)"


def settle_caches() -> None:
    """Give Triton and torch's compiler a temporary folder, which goes with the process, where what
    they compile cannot be kept: without a home, or where that cannot be written.

    By environment variables, so that processes that are started from here have the same.
    """
    import triton

    places = {"TRITON_CACHE_DIR": triton.knobs.cache.dir}
    with contextlib.suppress(KeyError, OSError):  # of a user whom passwd does not know
        user = getpass.getuser()
        default = os.path.join(tempfile.gettempdir(), f"torchinductor_{user}")
        places["TORCHINDUCTOR_CACHE_DIR"] = os.environ.get("TORCHINDUCTOR_CACHE_DIR", default)
    for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        if _can_be_written(places.get(variable, "")):
            continue
        with contextlib.suppress(OSError):  # no temporary folder either: the compiler tells it
            folder = tempfile.mkdtemp(prefix="sora_kernels-")
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            logger.warning("kernels are compiled anew by every process: %s is unusable", variable)
            os.environ[variable] = folder


def _can_be_written(folder: str) -> bool:
    """Whether it is a folder, made if need be, that takes files. A relative one is none: it is what
    is left of a home that is not there."""
    if not os.path.isabs(folder):
        return False
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def unsupported(case: Case) -> str | None:
    if case.dtype not in DTYPES:
        return f"{case.dtype} is not one of fp32, fp16 and bf16"
    return problem(case.device_type)


def unsupported_row(case: Case) -> str | None:
    if case.width > MAX_CHANNELS:
        return f"{case.width} channels; up to {MAX_CHANNELS} fit"
    return unsupported(case)


def dense_rows(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is dense, else a copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def describable(tensor: Tensor) -> bool:
    """Whether TMA can address it: 16-byte base and strides."""
    size = tensor.element_size()
    return tensor.data_ptr() % 16 == 0 and all(
        stride * size % 16 == 0 for stride in tensor.stride()[:-1]
    )
