"""What both trainings share: the optimiser, data parallelism, saving and resuming.

Start one process a core (or a device) for the best use of a CPU::

    torchrun --nproc-per-node 2 examples/sprites/train_vae.py --out runs/vae --minutes 60
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Muon:
    """Muon for matrices and convolutions, Adam for all else (vectors, embeddings).

    A matrix's momentum is replaced by the nearest orthogonal matrix, which Newton and Schulz's
    iteration approaches in five steps (Jordan et al., 2024); `0.2 * sqrt(longer side)` brings its
    entries to the size of Adam's (arXiv 2502.16982), so that one learning rate serves both. In the
    few thousand steps that a CPU can afford it learns far faster than Adam.

    Weights are kept in fp32 here, whatever the precision that the model computes in.
    """

    def __init__(self, params: dict[str, nn.Parameter], adam: Iterable[str] = ()) -> None:
        self.params = {name: p for name, p in params.items() if p.requires_grad}
        self.master = {name: p.detach().float().clone() for name, p in self.params.items()}
        self.adam = {
            name for name, p in self.params.items() if p.squeeze().ndim < 2 or name in set(adam)
        }
        self.first = {name: torch.zeros_like(p) for name, p in self.master.items()}
        self.second = {name: torch.zeros_like(self.master[name]) for name in self.adam}
        self.steps = 0

    @torch.no_grad()
    def step(self, rate: float, decay: float = 0.02) -> None:
        """One update from the gradients, averaged over processes, which it then clears."""
        self.steps += 1
        average_gradients(self.params.values())
        updates = self._orthogonal_updates()
        for name, param in self.params.items():
            if param.grad is None:
                continue
            grad, weight, first = param.grad.float(), self.master[name], self.first[name]
            if name in self.adam:
                second = self.second[name]
                first.lerp_(grad, 0.1)
                second.lerp_(grad * grad, 0.02)
                mean = first / (1 - 0.9**self.steps)
                scale = (second / (1 - 0.98**self.steps)).sqrt() + 1e-8
                weight.sub_(rate * mean / scale)
            else:
                update = updates[name]
                size = 0.2 * max(update.shape) ** 0.5
                weight.mul_(1 - decay * rate)
                weight.sub_(rate * size * update.view_as(weight))
            param.copy_(weight)
            param.grad = None

    def _orthogonal_updates(self) -> dict[str, Tensor]:
        """Each matrix's update. Processes share the work out and exchange the results."""
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if shared() else (0, 1)
        updates = {}
        for i, (name, param) in enumerate(self.params.items()):
            if name in self.adam or param.grad is None:
                continue
            grad, first = param.grad.float(), self.first[name]
            first.lerp_(grad, 0.05)
            update = torch.lerp(grad, first, 0.95).flatten(1)
            mine = i % world_size == rank
            kind = quick_dtype(update.device)
            updates[name] = orthogonal(update) if mine else torch.zeros_like(update, dtype=kind)
        if world_size > 1:
            flat = torch.cat([update.flatten() for update in updates.values()])
            dist.all_reduce(flat)
            parts = flat.split([update.numel() for update in updates.values()])
            updates = {n: p.view_as(updates[n]) for n, p in zip(updates, parts, strict=True)}
        return updates

    def state_dict(self) -> dict[str, Any]:
        return {
            "master": self.master,
            "first": self.first,
            "second": self.second,
            "steps": self.steps,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for kind in ("master", "first", "second"):
            mine = getattr(self, kind)
            for name, value in state[kind].items():
                mine[name].copy_(value)
        self.steps = state["steps"]
        for name, param in self.params.items():
            param.copy_(self.master[name])


def quick_dtype(device: torch.device) -> torch.dtype:
    """bf16, but on a CPU that has no products of it, which takes longer over them than in fp32."""
    able = torch.cpu.get_capabilities()
    slow = device.type == "cpu" and not (able.get("avx512_bf16") or able.get("amx_bf16"))
    return torch.float32 if slow else torch.bfloat16


def orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a matrix, roughly: its singular values come near one."""
    x = (matrix / (matrix.norm() + 1e-7)).to(quick_dtype(matrix.device))
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.7750 * square) @ x
    return x.T if tall else x


class Average:
    """An exponential moving average of weights, which is what gets evaluated and shipped."""

    def __init__(self, weights: dict[str, Tensor], horizon: int) -> None:
        self.weights = {name: value.clone() for name, value in weights.items()}
        self.horizon = horizon

    def update(self, weights: dict[str, Tensor], step: int) -> None:
        share = max(1 / self.horizon, 1 / (1 + 0.2 * step))
        for name, value in weights.items():
            self.weights[name].lerp_(value, share)


class Clock:
    """A budget in minutes of training, kept across resumptions; the rate falls to zero at its end.

    By time rather than by steps, so that a slow machine still ends in time with a low rate.
    """

    def __init__(self, minutes: float, spent: float = 0.0) -> None:
        self.budget, self.spent, self.started = 60 * minutes, spent, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.spent + time.monotonic() - self.started

    def rate(self, peak: float, step: int, warmup: int = 30) -> float:
        """Warm up, hold for a tenth of the time, then fall linearly. Zero or less: time is up."""
        rate = peak * min(1.0, (step + 1) / warmup, 1.1 * (1 - self.seconds / self.budget))
        return first_says(rate)


def start(device: str) -> tuple[int, int]:
    """Join the other processes, if torchrun started several. Returns (rank, world size)."""
    if "RANK" not in os.environ:
        return 0, 1
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return dist.get_rank(), dist.get_world_size()


def shared() -> bool:
    """Whether other processes train beside this one."""
    return dist.is_available() and dist.is_initialized()


def average_gradients(params: Iterable[nn.Parameter]) -> None:
    if not shared():
        return
    params = list(params)
    for param in params:
        if param.grad is None:
            param.grad = torch.zeros_like(param)
    flat = torch.cat([param.grad.float().flatten() for param in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    sizes = [param.numel() for param in params]
    for param, part in zip(params, flat.split(sizes), strict=True):
        param.grad = part.view_as(param).to(param.dtype)


def first_says(value: float) -> float:
    """The first process's value, for all."""
    if not shared():
        return value
    told = torch.tensor([value], dtype=torch.float64)
    if dist.get_backend() == "nccl":
        told = told.cuda()
    dist.broadcast(told, 0)
    return float(told)


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a run's state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def say(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)
