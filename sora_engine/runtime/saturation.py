"""How many tokens a batch takes before a larger one is no faster: measured, and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from sora_engine.denoise.packing import Packer, Segment
from sora_engine.io.atomic import write_atomically
from sora_engine.io.cache import cache_folder
from sora_engine.models.video_model import VideoModel

logger = logging.getLogger(__name__)

SMALLEST = 64
GAIN = 1.1
"""A batch twice as large is worth its wait if it does this many times the tokens a second."""
LONG_S = 0.5
"""A forward pass that takes this long has no overheads worth sharing."""
PASSES = 5
"""Of each size; the fastest counts. What else a machine does makes some of them slower."""


def saturation_point(model: VideoModel, limit: int, *, cache: Path | None = None) -> int:
    """Tokens a batch, at most `limit`; measured once for a model on a machine.

    cache: the file of measurements, `$XDG_CACHE_HOME/sora_engine/saturation.json` by default. Where
    it cannot be, every engine measures for itself.
    """
    path = cache_folder("saturation.json") if cache is None else cache
    key = _key(model)
    known = {} if path is None else _read(path)
    if key not in known:
        known[key] = measure_saturation(model, limit)
        logger.info("batches of %d tokens saturate %s", known[key], model.device)
        if path is not None:
            _write(path, {**_read(path), key: known[key]})
    return min(known[key], limit)


@torch.inference_mode()
def measure_saturation(model: VideoModel, limit: int) -> int:
    """Double a batch of one-frame segments until that gains less than a tenth in tokens a second.

    It stops at `limit` tokens, and where one pass takes half a second.
    """
    transformer = model.loaded_transformer
    (context,) = transformer.encode_contexts([transformer.example_embedding(8, model.device)])
    packer = Packer(model.grid.patch, model.device)
    pt, ph, pw = model.grid.patch
    channels = transformer.shape.in_channels
    frame = torch.zeros(channels, pt, 4 * ph, 4 * pw, dtype=torch.float32, device=model.device)
    segment = Segment(frame, torch.full((pt,), 500.0, dtype=torch.float32), ((context, pt),))
    size = packer.num_tokens(segment)

    def seconds(tokens: int) -> float:
        batch = packer.pack([segment] * max(1, tokens // size))
        passes: list[float] = []
        while len(passes) < PASSES and sum(passes) < LONG_S:
            started = time.perf_counter()
            transformer(batch)
            if model.device.type == "cuda":
                torch.cuda.synchronize(model.device)
            passes.append(time.perf_counter() - started)
        return min(passes)

    seconds(min(SMALLEST, limit))  # the first pass chooses kernels
    return find_saturation(seconds, limit)


def find_saturation(seconds: Callable[[int], float], limit: int) -> int:
    """The point, from what a pass over so many tokens takes.

    A size that seems to end it is measured again: one slow moment would be kept for good.
    """
    tokens = min(SMALLEST, limit)
    took = seconds(tokens)
    while took < LONG_S and 2 * tokens <= limit:
        doubled = seconds(2 * tokens)
        if 2 * took < GAIN * doubled:
            took, doubled = min(took, seconds(tokens)), min(doubled, seconds(2 * tokens))
        if 2 * took < GAIN * doubled:
            break
        tokens, took = 2 * tokens, doubled
    return tokens


def _key(model: VideoModel) -> str:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    threads = torch.get_num_threads() if device.type == "cpu" else 0
    transformer = model.loaded_transformer
    text = json.dumps(
        [
            model.family,
            asdict(transformer.shape),
            name,
            threads,
            str(model.dtype),
            torch.__version__,
        ],
        sort_keys=True,
        default=str,
    )
    text += f"{transformer.backends} {os.cpu_count()}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read(path: Path) -> dict[str, int]:
    try:
        values = json.loads(path.read_bytes())
        return {k: int(v) for k, v in values.items() if int(v) > 0}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}  # a cache: what cannot be read is measured again


def _write(path: Path, values: dict[str, int]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomically(path, json.dumps(values, indent=1).encode())
    except OSError as error:
        logger.info("%s was not written: %s", path, error)
