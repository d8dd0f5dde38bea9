"""One step of a session as a job: a canvas of what is recalled, what came before, and one new
latent frame; then one chunk of the session's own decoder."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sora_engine.denoise.canvas import Canvas, Known, lay_out_canvas
from sora_engine.denoise.conditioning import NEGATIVE, Context, Embedding, Prompts
from sora_engine.denoise.drive import Drive, sight
from sora_engine.denoise.known import encode_video
from sora_engine.models.video_model import VideoModel
from sora_engine.request import Action, KnownMode, ResolvedRequest, ResolvedSession
from sora_engine.request.frames import crop_middle
from sora_engine.runtime.executor import AnyExecutor
from sora_engine.runtime.hooks import FrameSpan, Hooks
from sora_engine.runtime.job import Job, StageResult
from sora_engine.runtime.recall import Memory, Moment, Place, away, stacked
from sora_engine.runtime.standing import Standing
from sora_engine.samplers.noise import initial_noise
from sora_engine.vae.decoding import to_uint8
from sora_engine.vae.finite import check_finite
from sora_engine.video import Video
from sora_kernels.transfer import to_device


@dataclass(slots=True, eq=False)
class Texts:
    """What a session's texts are to its model. For the engine's thread.

    Each is encoded by itself, so what it becomes does not depend on which others are in force.
    """

    embeddings: dict[str, Embedding] = field(default_factory=dict)
    contexts: dict[str, Context] = field(default_factory=dict)
    negative: tuple[Embedding, Context | None] | None = None

    def prompts(self, model: VideoModel, texts: list[str], request: ResolvedRequest) -> Prompts:
        """Of a canvas whose latent frames read these, one each. Others are forgotten."""
        distinct = list(dict.fromkeys(texts))
        new = [text for text in distinct if text not in self.embeddings]
        for text in new:
            self.embeddings[text] = _encoded(model, text)
        for kept in (self.embeddings, self.contexts):
            for text in [text for text in kept if text not in distinct]:
                del kept[text]
        negative = None
        if request.guided:
            if self.negative is None:
                self.negative = (_encoded(model, request.negative_prompt), None)
            negative = self.negative[0]
        return Prompts(
            texts=tuple(self.embeddings[text] for text in distinct),
            frame_texts=tuple(distinct.index(text) for text in texts),
            negative=negative,
            cut=model.prompt_encoder.cut(new) if new else (),
            reused=len(distinct) - len(new),
        )

    def contexts_of(self, model: VideoModel, texts: list[str]) -> dict[int, list[Context]]:
        """By expert what its layers read, where there is one; else it is worked out at each step.

        The same objects step by step: a batch's layout is kept for as long as they are."""
        if model.num_experts > 1:
            return {}
        transformer = model.transformer(0)
        for text in dict.fromkeys(texts):
            if text not in self.contexts:
                own = _on_device(self.embeddings[text], model)
                (self.contexts[text],) = transformer.encode_contexts([own])
        found = [self.contexts[text] for text in dict.fromkeys(texts)]
        if self.negative is not None:
            embedding, context = self.negative
            if context is None:
                marked = {**_on_device(embedding, model), NEGATIVE: torch.ones(())}
                (context,) = transformer.encode_contexts([marked])
                self.negative = (embedding, context)
            found.append(context)
        return {0: found}


@dataclass(slots=True, eq=False)
class StepStages:
    """The stages of a session's step: `job.Stages`.

    before: None for the first latent frame. action: that leads to the new one.
    moment, decoder, frames: what the step led to, once its job is done: the new latent frame, the
        decoder's state after it, and uint8 `[n, height, width, 3]`.
    """

    session: ResolvedSession
    model: VideoModel
    texts: Texts
    memory: Memory
    before: Standing | None
    action: Action
    request: ResolvedRequest
    moment: Moment | None = None
    decoder: Any = None
    frames: np.ndarray | None = None
    brief: bool = True

    @property
    def alone(self) -> bool:
        """As the session asks."""
        return self.session.exact

    @property
    def context(self) -> tuple[Moment, ...]:
        """The latent frames just before the new one, as many as it sees."""
        if self.before is None:
            return ()
        return self.before.context[-self.session.driving.context :]

    @property
    def place(self) -> Place:
        """Where the new view lies."""
        scale = self.model.grid.vae_spatial
        if self.before is None:
            at = self.session.place
            return at[0] / scale, at[1] / scale
        down, right = self.session.driving.actions.move_of(self.action)
        at = self.before.context[-1].place
        return at[0] + down / scale, at[1] + right / scale

    @torch.inference_mode()
    def preparing(self, job: Job, executor: AnyExecutor) -> Generator[None, None, Canvas]:
        """The canvas: what is recalled beside it, the context, and noise in the new one's place."""
        model, request, place = self.model, self.request, self.place
        context = self.context
        first = None
        if self.before is None and self.session.first is not None:
            first = yield from encode_video(self.session.first, request, model)
            check_finite([first], "the first picture", stage="encoding", dtype=model.vae_dtype)
        picked: list[Moment] = []
        if first is None:
            picked = self.memory.index.pick(place, self.session.driving.recall, context)
        texts = [*(moment.prompt for moment in context), request.prompt]
        shape = request.latent_shape(model.grid)
        own = initial_noise(request.seed, (shape[0], 1, *shape[2:]))
        noise = to_device(torch.cat([stacked(context, own), own], dim=1), model.device)
        known = None
        if context:
            mask = torch.ones(shape[1:], dtype=torch.bool)
            mask[-1] = False
            known = Known(KnownMode.NOISE_LEVEL, noise, to_device(mask, model.device))
        prompts = self.texts.prompts(model, texts, request)
        canvas = lay_out_canvas(
            request, model, latents=noise, noise=noise, prompts=prompts, known=known
        )
        if first is not None:
            canvas.latents = first
            canvas.solver_state = canvas.solver.init(len(canvas.solver.schedule))
            return canvas
        canvas.contexts = self.texts.contexts_of(model, texts)
        canvas.drive = self._drive(picked, context, place, own)
        return canvas

    def _drive(
        self, picked: list[Moment], context: tuple[Moment, ...], place: Place, like: Tensor
    ) -> Drive:
        """What the model is told of all that it sees: what was done, and where it was."""
        shape, world = self.model.transformer(0).shape, self.session.driving.world
        seen = [*picked, *context]
        actions = places = None
        if shape.action_dim is not None:
            rows = [*(moment.action for moment in seen), self._row()]
            actions = torch.tensor(rows, dtype=torch.float32)
        if shape.places:
            ways = [away(moment.place, place, world) for moment in seen]
            places = torch.tensor([*ways, (0.0, 0.0)], dtype=torch.float32)
        return Drive(
            recalled=to_device(stacked(picked, like), self.model.device),
            actions=actions,
            places=places,
            sees=sight(len(picked), len(context)) if seen else None,
        )

    def _row(self) -> tuple[float, ...]:
        """What the model reads of the action; of none, where nothing led here."""
        return self.session.driving.actions.encode(self.action)

    @torch.inference_mode()
    def decoding(self, job: Job, executor: AnyExecutor, hooks: Hooks) -> Iterator[StageResult]:
        """One chunk of the decoder, from its state after the latent frame before."""
        model, request = self.model, self.request
        latent = job.canvas.latents[:, -1:]
        state = None if self.before is None else self.before.decoder
        if self.before is not None and state is None:  # it was lost with a device
            state = decoder_after(self.before.context, model)
        made, state = model.vae.decode_chunk(latent[None].to(model.vae_dtype), state)
        check_finite([made], "a latent frame", stage="decoding", dtype=model.vae_dtype, step=1)
        pixels = crop_middle(to_uint8(made[0]), request.height, request.width)
        frames = pixels.contiguous().numpy()
        self.frames = hooks.pass_frames(frames, FrameSpan(request, 0, len(frames)))
        self.decoder = state
        kept = latent.float().cpu().clone()
        self.moment = Moment(kept, self._row(), self.place, request.prompt)
        job.count_frames(len(frames))
        yield Video(
            frames=self.frames,
            latents=kept if hooks.check_frames is None else kept[:, :0],
            fps=request.fps,
            seed=request.seed,
        )


def decoder_after(context: tuple[Moment, ...], model: VideoModel) -> Any:
    """A decoder's state after these latent frames, as if the first of them began a video."""
    state = None
    for moment in context:
        latent = to_device(moment.latent[None].to(model.vae_dtype), model.device)
        _, state = model.vae.decode_chunk(latent, state, consume=True)
    return state


def request_of_step(
    session: ResolvedSession, model: VideoModel, before: Standing | None, prompt: str
) -> ResolvedRequest:
    """What the job of a step asks for: its size, its text, and the seed of its noise."""
    seen = 0 if before is None else min(len(before.context), session.driving.context)
    request = session.of_step(model.grid, seen, prompt)
    if request.sigmas is None and model.sampler_config.space == "flow":
        # A scheduler spreads its levels down to one where next to nothing is left to do. That is
        # one step of fifty to a video, and would be one of a session's four.
        steps = request.num_inference_steps
        request = replace(request, sigmas=tuple(1 - i / steps for i in range(steps)))
    if before is None:
        return request
    return replace(request, seed=seed_of_step(session.video.seed, before.step + 1))


def seed_of_step(seed: int, step: int) -> int:
    """The seed of all noise of one step, unrelated to those of other steps and seeds. The first
    latent frame, which is step 0, has the session's own."""
    if step == 0:
        return seed
    digest = hashlib.blake2b(f"session:{seed}:{step}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _encoded(model: VideoModel, text: str) -> Embedding:
    (embedding,) = model.prompt_encoder.encode([text])
    check_finite(list(embedding.values()), "a prompt", stage="encoding", dtype=model.dtype)
    return embedding


def _on_device(embedding: Embedding, model: VideoModel) -> Embedding:
    return {name: value.to(model.device) for name, value in embedding.items()}
