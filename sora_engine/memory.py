"""What a request will need, stage by stage, before any work is done for it.

Steps are rehearsed on meta tensors, which have shapes and no storage: the same functions that
denoise run over a canvas of the request's size, while every storage that comes and goes is counted.
So the figures follow the code. The autoencoder's are made the same way (`vae.memory`); the text
encoder's are counted by hand.

Counted are the bytes of tensors above those of the idle engine, wherever they lie: on a GPU that
errs on the safe side by the frames, which are on the host. Not counted are a caller's own clips and
what native operations use inside.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sora_engine.canvas import Canvas, Known, KnownMode, Prompts
from sora_engine.denoise import (
    advance,
    frame_texts_of,
    guidances_of,
    predict,
    prompts_of,
    solver_of,
    window_plan,
)
from sora_engine.errors import MemoryLimitError
from sora_engine.models.linear import BlockedLinear
from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.models.wan.model import WanTransformer
from sora_engine.packing import Packer
from sora_engine.request import ResolvedRequest
from sora_engine.vae.config import VAEConfig
from sora_engine.vae.memory import (
    CodingMemory,
    NoScores,
    StorageMeter,
    decode_peak_bytes,
    encode_peak_bytes,
)
from sora_engine.vae.wan import WanVAE
from sora_engine.windows import SparsePlan

META = torch.device("meta")
TEXT_STEP = 8
"""Texts are taken to be a multiple of so many tokens long: figures are kept for the next one."""

UNCOUNTED = 160 << 10
"""Of small things in decoding that are not rehearsed; a tenth more goes with the size."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a request adds to the idle engine's, at the peak of each stage.

    held: the most that stays between two turns, while other jobs compute.
    batch_tokens: of the largest batch that this holds for.
    """

    encode: int
    denoise: int
    decode: int
    held: int
    batch_tokens: int

    @property
    def peak(self) -> int:
        return max(self.encode, self.denoise, self.decode)

    @property
    def working(self) -> int:
        """What a turn needs beside what is held anyway."""
        return max(0, self.peak - self.held)

    def __str__(self) -> str:
        stages = ("encode", "denoise", "decode")
        return ", ".join(f"{name} {_mib(getattr(self, name))}" for name in stages)


class MemoryPlanner:
    """Plans requests for one model. Safe to use from several threads.

    limit: bytes that requests may take together; None for no bound.
    window_tokens: of the largest batch of a video in several windows, where that is settled.
    """

    def __init__(
        self,
        model: VideoModel,
        max_batch_tokens: int,
        limit: int | None,
        window_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.limit = limit
        self.max_batch_tokens = max_batch_tokens
        self.window_tokens = min(window_tokens or max_batch_tokens, max_batch_tokens)
        self._known: dict[tuple[object, ...], MemoryPlan] = {}
        self._lock = threading.Lock()
        self._rehearsed: VideoModel | None = None

    def plan(self, request: ResolvedRequest) -> MemoryPlan:
        """The request's figures with as large a batch as fits.

        Fewer of its windows and branches are packed at a time where that makes it fit. Raises
        MemoryLimitError, with the figures, where nothing does.
        """
        lengths = self._text_lengths(request)
        frames = self.model.grid.latent_frames(request.num_frames, loop=request.loop)
        windows = window_plan(request, self.model, frames)
        single = windows is None or isinstance(windows, SparsePlan) or windows.holds(frames)
        batch_tokens = self.max_batch_tokens if single else self.window_tokens
        while True:
            plan = self._plan(request, lengths, batch_tokens)
            if self.limit is None or plan.peak <= self.limit:
                return plan
            fewer = self._fewer(request, batch_tokens)
            if fewer is None or plan.denoise <= self.limit:
                raise MemoryLimitError(
                    f"the request needs {_mib(plan.peak)} ({plan}), and "
                    f"{_mib(self.limit)} are to be had; make it smaller or shorter",
                    needed=plan.peak,
                    limit=self.limit,
                )
            batch_tokens = fewer

    def _plan(
        self, request: ResolvedRequest, lengths: Sequence[int], batch_tokens: int
    ) -> MemoryPlan:
        key = (
            *(request.height, request.width, request.num_frames, request.loop),
            *(request.solver, request.num_inference_steps, request.sigmas, request.shift),
            *(request.guidance, request.guidance_scale, request.guidance_scale_2),
            *(request.window, tuple(shot.num_frames for shot in request.shots)),
            *(bool(request.clips), request.init is not None, request.strength),
            *(tuple(lengths), batch_tokens),
        )
        with self._lock:
            if key not in self._known:
                while len(self._known) >= 512:
                    self._known.pop(next(iter(self._known)))
                self._known[key] = self._rehearse(request, lengths, batch_tokens)
            return self._known[key]

    def _fewer(self, request: ResolvedRequest, batch_tokens: int) -> int | None:
        """The next smaller batch: half of the parts of a step that it held; None at one part."""
        canvas = self._canvas(request, [TEXT_STEP] * len(prompts_of(request)))
        size = math.prod(canvas.latents.shape[2:]) // math.prod(self.model.grid.patch[1:])
        part = canvas.windows()[0].length // self.model.grid.patch[0] * size
        parts = len(canvas.windows()) * (1 if canvas.prompts.negative is None else 2)
        held = min(parts, max(1, batch_tokens // part))
        return None if held == 1 else held // 2 * part

    def _text_lengths(self, request: ResolvedRequest) -> list[int]:
        """Tokens of each text that is encoded, rounded up."""
        encoder = self.model.text_encoder
        counts = [encoder.count(prompt) for prompt in prompts_of(request)]
        most = encoder.max_tokens
        return [min(most, -(-count // TEXT_STEP) * TEXT_STEP) for count in counts]

    # The rehearsal.

    def _rehearse(
        self, request: ResolvedRequest, lengths: Sequence[int], batch_tokens: int
    ) -> MemoryPlan:
        model = self._on_meta()
        packer = Packer(model.grid.patch, META)
        with torch.inference_mode(), StorageMeter() as meter:
            canvas = self._canvas(request, lengths)
            known = torch.empty_like(canvas.latents) if request.clips else None
            meter.count([*tensors_of(canvas), known])
            begin = meter.now
            solver = canvas.solver
            held = begin
            # Until the solver's history is as long as it gets.
            for _ in range(min(canvas.num_steps, 4)):
                expert = model.expert_at(canvas.timestep)
                predictions = predict([canvas], expert, model, packer, batch_tokens)
                fresh = torch.empty_like(canvas.latents) if solver.stochastic else None
                advance(canvas, expert, predictions, fresh)
                del predictions, fresh
                held = max(held, meter.now)
            denoise = meter.peak
        texts = sum(text.nbytes for text in canvas.prompts.texts)
        encode, coded = self._encode(request, lengths, begin, texts)
        decode, decode_held = self._decode(request, canvas, texts)
        # Of what coded the clips, caches may outlive it.
        kept = max(0, coded - begin)
        return MemoryPlan(
            encode=encode,
            denoise=denoise + kept,
            decode=decode + kept,
            held=max(held, decode_held) + kept,
            batch_tokens=batch_tokens,
        )

    def _canvas(self, request: ResolvedRequest, lengths: Sequence[int]) -> Canvas:
        model = self.model
        shape = model.grid.shape(
            request.height, request.width, request.num_frames, loop=request.loop
        )
        config = model.loaded_transformer.config
        texts = [torch.empty(n, config.text_dim, dtype=model.dtype, device=META) for n in lengths]
        negative = texts.pop() if len(texts) > len(request.shots or (None,)) else None
        image = None
        if config.image_dim is not None:
            image = torch.empty(
                config.pos_embed_seq_len or 257, config.image_dim, dtype=model.dtype, device=META
            )
        latents = torch.empty(shape, device=META)
        known = None
        if model.known_mode in (KnownMode.CHANNELS, KnownMode.VACE):
            more = config.input_channels - config.out_channels
            channels = torch.empty(more, *shape[1:], device=META)
            known = Known(model.known_mode, channels=channels)
        elif request.clips and model.known_mode is KnownMode.NOISE_LEVEL:
            # On the host, where levels of tokens are read; its latents are counted apart.
            mask = torch.zeros(shape[1:], dtype=torch.bool)
            mask[0] = True
            known = Known(model.known_mode, mask=mask)
        elif request.clips:
            mask = torch.empty(shape[1:], dtype=torch.bool, device=META)
            known = Known(model.known_mode, torch.empty(shape, device=META), mask)
        return Canvas(
            latents=latents,
            noise=torch.empty(shape, device=META),
            solver=solver_of(request, model),
            prompts=Prompts(
                tuple(texts), frame_texts_of(request, model, shape[1]), negative, image
            ),
            guidances=guidances_of(request, model),
            patch_size=model.grid.patch,
            known=known,
            wraps=request.loop,
            window_plan=window_plan(request, model, shape[1]),
        )

    def _encode(
        self, request: ResolvedRequest, lengths: Sequence[int], canvas: int, texts: int
    ) -> tuple[int, int]:
        """Peak of texts and clips, and what is held between the clips' latent frames."""
        text = texts + text_memory(self.model, max(lengths))
        if not request.clips and request.init is None:
            return canvas + text, canvas
        unit = self.model.grid.vae_spatial
        size = (request.height // unit, request.width // unit)
        coder = self._coding("encode_chunk", size, request)
        frames = request.height * request.width * 3 * self.model.grid.time
        pixels = frames * (1 + 4 + self.model.vae_dtype.itemsize)
        latents = canvas if request.init is None else 2 * canvas
        coding = latents + pixels + coder.peak
        return max(canvas + text, coding), canvas + coder.cache

    def _decode(self, request: ResolvedRequest, canvas: Canvas, texts: int) -> tuple[int, int]:
        _, _, height, width = canvas.latents.shape
        coder = self._coding("decode_chunk", (height, width), request)
        frames = request.num_frames * request.height * request.width * 3
        # The canvas's own, the caller's copy, and one in the autoencoder's dtype.
        copies = 2 if self.model.vae_dtype == torch.float32 else 3
        latents = canvas.latents.nbytes * copies + texts
        laps = 2 * coder.cache if request.loop else 0
        peak = latents + frames + coder.peak + laps
        return int(1.1 * peak) + UNCOUNTED, latents + frames + coder.cache + laps

    def _coding(self, method: str, size: tuple[int, int], request: ResolvedRequest) -> CodingMemory:
        model = self.model
        stretches = model.grid.latent_frames(request.num_frames, loop=request.loop)
        if request.loop:  # laps go round
            stretches = 3
        config, dtype, side = model.vae.config, model.vae_dtype, method.removesuffix("_chunk")
        tiles = model.vae.tiles("encode" if side == "encode" else "decode", *size)
        if tiles is not None:
            measure = encode_peak_bytes if side == "encode" else decode_peak_bytes
            peak = measure(config, size, dtype, tiles, offload=model.device.type != "cpu")
            return CodingMemory(cache=peak, peak=peak)  # tiles that wait hold most of it
        return coding_memory(config, dtype, method, *size, min(3, stretches))

    def _on_meta(self) -> VideoModel:
        """The model with transformers that have no weights."""
        if self._rehearsed is None:
            loaded = self.model.loaded_transformer
            with META:
                hollow = WanTransformer(
                    loaded.config,
                    text_tokens=loaded.text_tokens,
                    backend=loaded.backends.fused,
                    attention_backend=loaded.backends.attention,
                )
            hollow = hollow.to(self.model.dtype).eval().requires_grad_(False)
            _lay_out_like(hollow, loaded)
            experts = [
                Expert(e.load, e.from_timestep, e.size_bytes, hollow) for e in self.model.experts
            ]
            self._rehearsed = replace(self.model, device=META, experts=experts, preview=None)
        return self._rehearsed


def tensors_of(canvas: Canvas) -> list[Tensor]:
    """What a canvas holds before its first step."""
    prompts, known = canvas.prompts, canvas.known
    held = [canvas.latents, canvas.noise, *prompts.texts, prompts.negative, prompts.image]
    if known is not None:
        held += [known.latents, known.mask, known.channels]
    return [tensor for tensor in held if tensor is not None]


@functools.lru_cache(maxsize=256)
def coding_memory(
    config: VAEConfig,
    dtype: torch.dtype,
    method: str,
    height: int,
    width: int,
    stretches: int,
) -> CodingMemory:
    """Of `stretches` latent frames of `height` x `width`, one at a time, through layers that were
    prepared as those of the model are (`vae.memory` measures them as they come)."""
    with META:
        vae = WanVAE(config).to(dtype).requires_grad_(False).prepare(onednn=False)
    encode = method == "encode_chunk"
    channels = config.in_channels // (config.patch_size or 1) ** 2 if encode else config.z_dim
    scale = config.factor_spatial if encode else 1

    def stretch(index: int) -> Tensor:
        frames = config.factor_temporal if encode and index else 1
        return torch.empty(
            1, channels, frames, height * scale, width * scale, dtype=dtype, device=META
        )

    run = getattr(vae, method)
    state = None
    with torch.inference_mode(), NoScores():
        for i in range(stretches):  # the weights are laid out here
            _, state = run(stretch(i), state, consume=True)
        state = None
        with StorageMeter() as meter:
            for i in range(stretches):
                coded, state = run(stretch(i), state, consume=True)
                del coded
    assert state is not None
    return CodingMemory(cache=state.nbytes, peak=meter.peak)


def text_memory(model: VideoModel, tokens: int) -> int:
    """Activations of a T5 encoder over one text: queries to values, scores and their bias, and the
    two branches of a gated feed-forward."""
    config = model.text_encoder.model.config
    itemsize = model.text_encoder.model.dtype.itemsize
    inner = config.num_heads * config.d_kv
    scores = 3 * config.num_heads * tokens * tokens
    attention = tokens * (3 * config.d_model + 4 * inner) + scores
    forward = tokens * (3 * config.d_model + 3 * config.d_ff)
    return int(max(attention, forward) * itemsize)


def _lay_out_like(hollow: torch.nn.Module, loaded: torch.nn.Module) -> None:
    """Give a model without weights the layers that the loaded one has in place of its linears."""
    for name, layer in loaded.named_modules():
        if isinstance(layer, BlockedLinear):
            parent = hollow.get_submodule(name.rpartition(".")[0])
            child = name.rpartition(".")[2]
            setattr(parent, child, BlockedLinear.without_weight(layer))


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
