"""A service with a thread for each caller: hooks, priorities, and a queue that says when to wait.

Nothing is asked of callers but `submit` and `result`: the engine is safe to use from any thread.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

import sora_engine as sora


def refuse(request: object) -> None:
    if "secret" in getattr(request, "prompt", ""):
        raise sora.RefusedError("this service does not show secrets")


def watermark(frames: np.ndarray, span: sora.FrameSpan) -> np.ndarray:
    marked = frames.copy()
    marked[:, -2:, -2:] = 255
    return marked


def call(engine: sora.Engine, prompt: str, priority: int) -> sora.Video | str:
    """What a caller gets: a video, or why there is none."""
    request = sora.VideoRequest(prompt, height=32, width=32, num_frames=5, num_inference_steps=4)
    while True:
        try:
            return engine.submit(request, priority=priority).result(timeout_s=120)
        except sora.QueueFullError as full:
            time.sleep(full.retry_after_s)
        except sora.SoraError as error:
            return f"{type(error).__name__}: {error}"


def main(model: str = "sprites") -> list[sora.Video | str]:
    hooks = sora.Hooks(check_request=refuse, check_frames=watermark)
    with (
        sora.Engine.from_pretrained(model, hooks=hooks) as engine,
        ThreadPoolExecutor(max_workers=4) as callers,
    ):
        calls = [("a red circle", 0), ("a secret", 0), ("a blue square", 2), ("two circles", -1)]
        return list(callers.map(lambda c: call(engine, *c), calls))


if __name__ == "__main__":
    for outcome in main(*sys.argv[1:]):
        print(outcome if isinstance(outcome, str) else outcome.receipt)
