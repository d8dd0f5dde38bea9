"""What a request really holds at its peak, beside what it was promised."""

from __future__ import annotations

import gc

import torch

import sora_engine as sora
from sora_engine.runtime import worker as worker_module
from sora_engine.vae.meter import StorageMeter


def measured(monkeypatch, path, first, request, dtype, **options):
    """`request` after `first`, which lays out the weights: its video and its peak in bytes."""
    turn, meters = worker_module.Worker.turn, []

    def metered_turn(worker):
        if not meters:
            return turn(worker)
        with meters[0]:
            return turn(worker)

    with monkeypatch.context() as patched:
        patched.setattr(worker_module.Worker, "turn", metered_turn)
        with sora.Engine.from_pretrained(path, device="cpu", dtype=dtype, **options) as engine:
            engine.generate(first)
            before = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
            meters[:] = [StorageMeter(x for x in before if x.device.type == "cpu")]
            video = engine.submit(request).result(60)
            return video, meters.pop().peak


def saved_midway(engine, request, path):
    """A video, and the one of the job's savepoint after its first step, taken up again."""
    copy = path.with_name("midway.safetensors")

    def keep(progress):
        if path.exists() and not copy.exists():
            copy.write_bytes(path.read_bytes())

    whole = engine.submit(request, save_to=path, on_progress=keep).result(60)
    return whole, engine.resume(copy).result(60)
