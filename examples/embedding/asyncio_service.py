"""A service on asyncio: requests at once, progress as it comes, a cancel for whoever hangs up."""

from __future__ import annotations

import asyncio
import sys

import sora_engine as sora


async def serve(engine: sora.AsyncEngine, prompt: str) -> sora.Video | None:
    """One caller: waits at most a minute, and is told how far its video is."""
    request = sora.VideoRequest(prompt, height=32, width=32, num_frames=9, num_inference_steps=6)
    job = engine.submit(request, deadline_s=60)
    async for progress in engine.progress(job):
        print(f"{prompt}: {progress.state}, step {progress.steps_done} of {progress.num_steps}")
    try:
        return await engine.wait(job)
    except (sora.DeadlineExceededError, sora.JobCancelledError) as error:
        print(f"{prompt}: {error}")
        return None


async def main(model: str = "sprites") -> list[sora.Video | None]:
    async with await sora.AsyncEngine.from_pretrained(model) as engine:
        prompts = ("a red circle moves right", "a blue square", "a green triangle grows")
        impatient = asyncio.create_task(serve(engine, "two circles"))
        await asyncio.sleep(0)
        impatient.cancel()  # its job stops within one step
        videos = await asyncio.gather(*(serve(engine, prompt) for prompt in prompts))
        await asyncio.gather(impatient, return_exceptions=True)
        return videos


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
