"""What a session will need, before it is opened."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from sora_engine.denoise.canvas import Canvas, Known
from sora_engine.denoise.drive import Drive, sight
from sora_engine.request import KnownMode, ResolvedRequest, ResolvedSession
from sora_engine.runtime.memory import MARGIN, MemoryPlan, MemoryPlanner
from sora_engine.vae.meter import META


@dataclass(frozen=True, slots=True)
class SessionMemory:
    """Bytes of a session. held: for as long as it is open. step: what a step takes beside that."""

    held: int
    step: MemoryPlan

    @property
    def whole(self) -> MemoryPlan:
        """What it adds to the idle engine's, at the peak of each stage, and between two steps."""
        step = self.step
        encode, denoise, decode = (self.held + n for n in (step.encode, step.denoise, step.decode))
        return MemoryPlan(encode, denoise, decode, self.held, step.batch_tokens)


def plan_session(planner: MemoryPlanner, session: ResolvedSession) -> SessionMemory:
    """What a session takes at most.

    Held are the memory of places, as large as it gets; the decoder's state, the frames and the
    latent of the present and of each step that `rewind` can go back to; the latents of the context;
    what its texts are to the model. Marks are the caller's: each keeps a decoder's state more.
    """
    model, driving = planner.model, session.driving
    request = session.of_step(model.grid, driving.context, session.video.prompt)
    channels, _, height, width = request.latent_shape(model.grid)
    latent = channels * height * width * 4
    coder = planner.coding("decode", (height, width), request)
    pixels = request.num_frames * request.height * request.width * 3
    longest = model.prompt_encoder.max_tokens
    lengths = {max(1, longest - 1), longest}  # the latter is padded by nothing
    found = [
        planner.rehearsed(
            (*request.memory_key(), driving.recall, "session", tokens),
            lambda tokens=tokens: _canvas(planner, session, request, tokens),  # type: ignore[misc]
        )
        for tokens in lengths
    ]
    texts = max(each.texts for each in found)
    begin = max(each.begin for each in found)
    with_first = replace(request, init=session.first)
    encode = planner.encoding(with_first, [longest], begin, texts)
    # The state before the step is a mark's, or `rewind`'s: the one after it lies beside it.
    decode = coder.peak + coder.cache + 3 * latent + 3 * pixels
    denoise = max(each.denoise for each in found)
    between = max(*(each.held for each in found), coder.cache)
    encode, denoise, decode, between = (
        math.ceil(size * (1 + MARGIN)) for size in (encode, denoise, decode, between)
    )
    step = MemoryPlan(encode, denoise, decode, between, planner.max_batch_tokens)
    present = coder.cache + pixels + latent
    held = session.memory_bytes + (session.rewind + 2) * present + driving.context * latent
    held += (driving.context + 2) * texts
    return SessionMemory(math.ceil(held * (1 + MARGIN)), step)


def _canvas(
    planner: MemoryPlanner, session: ResolvedSession, request: ResolvedRequest, text_tokens: int
) -> Canvas:
    """The canvas of a step on meta tensors, with as much context and recalled as there can be."""
    canvas = planner.canvas(request, text_tokens)
    shape, recall = planner.model.loaded_transformer.shape, session.driving.recall
    channels, frames, height, width = canvas.latents.shape
    mask = torch.ones(frames, height, width, dtype=torch.bool)
    mask[-1] = False
    canvas.known = Known(KnownMode.NOISE_LEVEL, mask=mask)
    seen = recall + frames
    canvas.drive = Drive(
        recalled=torch.empty(channels, recall, height, width, dtype=torch.float32, device=META),
        actions=None if shape.action_dim is None else torch.zeros(seen, shape.action_dim),
        places=torch.zeros(seen, 2) if shape.places else None,
        sees=sight(recall, frames - 1),
    )
    return canvas
