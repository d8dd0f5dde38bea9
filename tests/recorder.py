"""A stand-in for what records CUDA graphs, which keeps to their rules: it does not run what it
records, and replays on the same memory."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WORKSPACE = 1000


class Recording(TorchDispatchMode):
    """All operations of a step with the tensors that they read and wrote."""

    def __init__(self):
        super().__init__()
        self.operations, self.made, self.before = [], set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        writes = func._schema.is_mutable
        if writes and id(args[0]) not in self.before and id(args[0]) not in self.made:
            self.before[id(args[0])] = args[0], args[0].clone()
        out = func(*args, **(kwargs or {}))
        outs = list(out) if isinstance(out, tuple | list) else [out]
        self.made.update(map(id, outs))
        self.operations.append((func, args, kwargs or {}, outs, writes))
        return out

    def undo(self):
        for tensor, before in self.before.values():
            tensor.copy_(before)

    @torch.inference_mode()
    def replay(self):
        for func, args, kwargs, outs, writes in self.operations:
            again = func(*args, **kwargs)
            if not writes:
                again = again if isinstance(again, tuple | list) else [again]
                for old, new in zip(outs, again, strict=True):
                    if not isinstance(old, torch.Tensor):
                        continue  # what the host checks of tensors on a CPU
                    if old.data_ptr() != new.data_ptr():  # else it is a view of what is there
                        old.copy_(new)


class Recorder:
    def __init__(self):
        self.recordings, self.replays = 0, 0

    def __call__(self, step, device):
        with Recording() as recording:
            step()
        recording.undo()
        self.recordings += 1

        def replay():
            self.replays += 1
            recording.replay()

        return replay, WORKSPACE
