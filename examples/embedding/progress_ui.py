"""Jobs in a terminal: a bar for each, with its state and how long it will take yet."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

import sora_engine as sora

PROMPTS = ("a red circle moves right", "a blue square", "a green triangle grows")


def main(model: str = "sprites", console: Console | None = None) -> list[sora.Video]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"))
    with (
        sora.Engine.from_pretrained(model) as engine,
        Progress(*columns, console=console) as shown,
    ):
        jobs = {}
        for i, prompt in enumerate(PROMPTS):
            request = sora.VideoRequest(
                prompt, height=32, width=32, num_frames=9 + 8 * i, num_inference_steps=8
            )
            bar = shown.add_task(prompt, total=1.0, told="queued")
            jobs[bar] = engine.submit(request)
        while True:
            for bar, job in jobs.items():
                now = job.progress
                work = now.num_steps + now.num_frames
                left = "" if now.eta_s is None else f", {now.eta_s:.1f} s to go"
                shown.update(
                    bar,
                    completed=(now.steps_done + now.frames_decoded) / work,
                    told=f"{now.state}{left}",
                )
            if all(job.done() for job in jobs.values()):
                break
            time.sleep(0.05)
        return [job.result() for job in jobs.values()]


if __name__ == "__main__":
    main(*sys.argv[1:])
