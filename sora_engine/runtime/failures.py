"""What an exception in a job's work means: for that job, or for the device and all it holds."""

from __future__ import annotations

import torch

from sora_engine.errors import JobFailedError, JobMemoryError, SoraError


def failure_of(error: Exception) -> SoraError:
    """The typed error that a caller gets for an exception in a job."""
    if isinstance(error, SoraError):
        return error
    if is_out_of_memory(error):
        failure: SoraError = JobMemoryError(f"memory ran out: {error}")
    else:
        failure = JobFailedError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on whichever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)


def is_device_error(error: BaseException) -> bool:
    """Whether the device itself failed: after that nothing that it holds can be trusted."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and str(error).startswith(("CUDA error", "cuDNN error"))
