"""What a request will need, stage by stage, before any work is done for it.

Steps are rehearsed on meta tensors, which have shapes and no storage: the same functions that
denoise run over a canvas of the request's size, while every storage that comes and goes is counted.
So the figures follow the code. Decoding is rehearsed frame by frame in the same way, and so is what
encodes clips; the text encoder's activations and a clip's pixels are counted by hand.

Counted are the bytes of tensors above those of the idle engine, wherever they lie: on a GPU that
errs on the safe side by the frames, which are on the host. Weights are the idle engine's, and views
of them take nothing. Not counted are a caller's own clips and what native operations use inside.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from sora_engine.config import NO_LIMIT, Limits
from sora_engine.denoise.canvas import Canvas, Known, lay_out_canvas
from sora_engine.denoise.conditioning import Embedding, Prompts
from sora_engine.denoise.denoise import advance, frame_texts_of, predict, prompts_of
from sora_engine.denoise.packing import Packer
from sora_engine.errors import MemoryLimitError
from sora_engine.models.transformer import DiffusionTransformer
from sora_engine.models.video_model import Expert, VideoModel
from sora_engine.request import (
    KnownMode,
    ResolvedRequest,
    SparsePlan,
    VideoRequest,
    resolve_request,
)
from sora_engine.runtime.repeats import Repeats
from sora_engine.samplers import SOLVERS
from sora_engine.vae.meter import META, OnOneDevice, StorageMeter
from sora_engine.vae.rehearsal import (
    CodingMemory,
    decode_peak_bytes,
    encode_peak_bytes,
    video_decode_memory,
    video_encode_memory,
)
from sora_engine.vae.shapes import look_ahead

MARGIN = 1 / 50
"""Of each figure, for what a rehearsal cannot see: a few small tensors of a device's own."""

REHEARSED = 3
"""Latent frames after which decoding and encoding take what they take for any number of them,
beside those that a decoder sees ahead."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes that a request adds to the idle engine's, at the peak of each stage.

    encode, denoise, decode: the peak of each stage.
    held: the most that stays between two turns, while other jobs compute.
    batch_tokens: the figures hold for batches of at most this many tokens, or of one window where
        that has more.
    """

    encode: int
    denoise: int
    decode: int
    held: int
    batch_tokens: int

    @property
    def peak(self) -> int:
        """The most of all stages."""
        return max(self.encode, self.denoise, self.decode)

    @property
    def working(self) -> int:
        """What a turn needs beside what is held anyway."""
        return max(0, self.peak - self.held)

    def __str__(self) -> str:
        stages = ("encode", "denoise", "decode")
        return ", ".join(f"{name} {_mib(getattr(self, name))}" for name in stages)


class Rehearsal(NamedTuple):
    """Bytes for texts of one length. begin: of the canvas. texts: of the embeddings."""

    begin: int
    texts: int
    denoise: int
    decode: int
    held: int

    def towards(self, other: Rehearsal, share: float) -> Rehearsal:
        """What lies on the line to the other, at this share of the way."""
        pairs = zip(self, other, strict=True)
        return Rehearsal(*(low + math.ceil(share * (high - low)) for low, high in pairs))


_KNOWN_TEXTS = 64


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
        self._rehearsals: dict[tuple[object, ...], Rehearsal] = {}
        self._lengths: dict[str, int] = {}
        self._lock = threading.Lock()
        self._reserving = threading.RLock()  # the garbage collector gives back, anywhere
        self._hollow: VideoModel | None = None
        self._repeats: Repeats

    def reserve(
        self,
        size: int,
        what: str = "an adapter",
        advice: str = "unload others, or merge it on loading",
        beside: int = 0,
    ) -> None:
        """Adapters, or a session, take so many bytes more, or less: requests have what is left.

        beside: what must be left for its work. Raises MemoryLimitError where less is left than
        that.
        """
        with self._reserving:
            if self.limit is None:
                return
            if size + beside > self.limit:
                raise MemoryLimitError(
                    f"{what} takes {_mib(size + beside)}, and {_mib(self.limit)} are to be had; "
                    f"{advice}",
                    needed=size + beside,
                    limit=self.limit,
                )
            self.limit -= size

    def plan(self, request: ResolvedRequest) -> MemoryPlan:
        """The request's figures with as large a batch as fits.

        Fewer of its windows and branches are packed at a time where that makes it fit. Raises
        MemoryLimitError, with the figures, where nothing does.
        """
        lengths = self._text_lengths(request)
        frames = request.latent_shape(self.model.grid)[1]
        windows = request.window
        single = windows is None or isinstance(windows, SparsePlan) or windows.holds(frames)
        batch_tokens = self.max_batch_tokens if single else self.window_tokens
        while True:
            plan = self._plan(request, lengths, batch_tokens)
            if self.limit is None or plan.peak <= self.limit:
                return plan
            fewer = self._fewer(request, batch_tokens)
            if fewer is None or plan.denoise <= self.limit:
                waits = self.model.device.type == "cpu" or self.model.offload == "blocks"
                more = "" if waits else ", or load the model with offload='blocks'"
                raise MemoryLimitError(
                    f"the request needs {_mib(plan.peak)} ({plan}), and "
                    f"{_mib(self.limit)} are to be had; make it smaller or shorter{more}",
                    needed=plan.peak,
                    limit=self.limit,
                )
            batch_tokens = fewer

    def fits(self, held: Sequence[MemoryPlan], batch: Sequence[MemoryPlan]) -> bool:
        """Whether what these requests hold, and what a turn of them needs beside that, keep within
        the limit: the turn of one of them, or a step of a batch. Texts that are kept give way."""
        if self.limit is None:
            return True
        working = max((plan.working for plan in held), default=0)
        needed = sum(plan.held for plan in held)
        needed += max(working, sum(plan.working for plan in batch))
        self.model.prompt_encoder.kept.give_way(self.limit - needed)
        return needed <= self.limit

    def _plan(
        self, request: ResolvedRequest, lengths: Sequence[int], batch_tokens: int
    ) -> MemoryPlan:
        """The figures for texts of these lengths, from rehearsals of the shortest and the longest.

        What a stage takes is the most of several sums, each of which grows in proportion to the
        tokens of the texts: it lies under the line between the two. So one size takes two
        rehearsals, whatever its texts, and a third for texts that are as long as they get.
        """
        longest = self.model.prompt_encoder.max_tokens
        if len(lengths) > 2:  # a batch may hold the texts of a few shots, and not of others
            lengths = [max(lengths)] * len(lengths)
        if all(n == longest for n in lengths):  # padded by nothing: a case of its own
            found = self._rehearsed(request, longest, batch_tokens)
        else:
            high = self._rehearsed(request, max(1, longest - 1), batch_tokens)
            low = self._rehearsed(request, 1, batch_tokens)
            share = (sum(lengths) / len(lengths) - 1) / max(1, longest - 2)
            found = low.towards(high, share)
        encode = self.encoding(request, lengths, found.begin, found.texts)
        stages = encode, found.denoise, found.decode, found.held
        encode, denoise, decode, held = (math.ceil(size * (1 + MARGIN)) for size in stages)
        return MemoryPlan(encode, denoise, decode, held, batch_tokens)

    def _rehearsed(
        self, request: ResolvedRequest, text_tokens: int, batch_tokens: int
    ) -> Rehearsal:
        key = (*request.memory_key(), text_tokens, batch_tokens)
        with self._lock:
            if key not in self._rehearsals:
                while len(self._rehearsals) >= 512:
                    self._rehearsals.pop(next(iter(self._rehearsals)))
                self._rehearsals[key] = self._rehearse(request, text_tokens, batch_tokens)
            return self._rehearsals[key]

    def _fewer(self, request: ResolvedRequest, batch_tokens: int) -> int | None:
        """The next smaller batch: half of the parts of a step that it held; None at one part."""
        canvas = self.canvas(request, 1)
        part = self._part_tokens(canvas)
        parts = len(canvas.windows()) * (1 if canvas.prompts.negative is None else 2)
        held = min(parts, max(1, batch_tokens // part))
        return None if held == 1 else held // 2 * part

    def _part_tokens(self, canvas: Canvas) -> int:
        """Tokens of one window under one branch of guidance."""
        size = math.prod(canvas.latents.shape[2:]) // math.prod(self.model.grid.patch[1:])
        span = canvas.windows()[0].length + canvas.num_anchors
        return span // self.model.grid.patch[0] * size

    def _text_lengths(self, request: ResolvedRequest) -> list[int]:
        """Tokens of each text that is encoded."""
        return [self._text_length(text) for text in prompts_of(request)]

    def _text_length(self, text: str) -> int:
        """As tokenizers take a while, and texts come again, the last ones are remembered."""
        length = self._lengths.get(text)
        if length is None:
            encoder = self.model.prompt_encoder
            length = min(encoder.max_tokens, encoder.count(text))
            if len(self._lengths) >= _KNOWN_TEXTS:
                self._lengths.clear()
            self._lengths[text] = length
        return length

    # The rehearsal.

    def rehearsed(self, key: tuple[object, ...], canvas_of: Callable[[], Canvas]) -> Rehearsal:
        """Steps of any other canvas with known content, once for a key. `texts` are what its texts
        are to the model, and nothing of it is decoded."""
        with self._lock:
            if key not in self._rehearsals:
                canvas, begin, denoise, held = self._steps(
                    canvas_of, self.max_batch_tokens, known=True
                )
                texts = sum(text.nbytes for each in canvas.contexts.values() for text in each)
                self._rehearsals[key] = Rehearsal(begin, texts, denoise, 0, held)
            return self._rehearsals[key]

    def _steps(
        self, canvas_of: Callable[[], Canvas], batch_tokens: int, *, known: bool
    ) -> tuple[Canvas, int, int, int]:
        """Steps of a canvas on meta tensors: it, its bytes, their peak, what is held between."""
        model = self._on_meta()
        packer = Packer(model.grid.patch, META)
        weights = model.loaded_transformer.parameters()
        with torch.inference_mode(), OnOneDevice(), StorageMeter(weights) as meter:
            self._repeats.count_with(meter)
            canvas = canvas_of()
            content = torch.empty_like(canvas.latents) if known else None
            meter.count([*tensors_of(canvas), content])
            begin = meter.now
            solver = canvas.solver
            held = begin
            # Until the solver's history is as long as it gets.
            for _ in range(min(len(solver.schedule), 4)):
                expert = model.expert_at(canvas.timestep)
                predictions = predict([canvas], expert, model, packer, batch_tokens)
                sample = canvas.part(canvas.latents)
                fresh = torch.empty_like(sample) if solver.stochastic else None
                del sample
                advance(canvas, expert, predictions, fresh, model.preview)
                del predictions, fresh
                held = max(held, meter.now)
            denoise = meter.peak
        return canvas, begin, denoise, held

    def _rehearse(self, request: ResolvedRequest, text_tokens: int, batch_tokens: int) -> Rehearsal:
        if request.loras:  # made before anything is counted: they are loaded already
            self._on_meta().adapters_of(request.loras)
        canvas, begin, denoise, held = self._steps(
            lambda: self.canvas(request, text_tokens), batch_tokens, known=bool(request.clips)
        )
        graphs = self.model.loaded_transformer.graphs
        if graphs is not None and graphs.replays(self._part_tokens(canvas)):
            held = denoise  # what a recorded pass works in stays reserved between two steps
        texts = sum(tensor.nbytes for tensor in canvas.prompts.tensors)
        decode, decode_held = self._decode(request, canvas, texts)
        return Rehearsal(begin, texts, denoise, decode, max(held, decode_held))

    def rehearse_step(self, requests: Sequence[ResolvedRequest]) -> None:
        """One step of requests in one batch, on meta tensors, with texts of different lengths."""
        model = self._on_meta()
        packer = Packer(model.grid.patch, META)
        with self._lock, torch.inference_mode(), OnOneDevice(), StorageMeter() as meter:
            self._repeats.count_with(meter)
            canvases = [self.canvas(request, 1 + i) for i, request in enumerate(requests)]
            expert = model.expert_at(canvases[0].timestep)
            predict(canvases, expert, model, packer, self.max_batch_tokens)

    def canvas(self, request: ResolvedRequest, text_tokens: int) -> Canvas:
        """The request's canvas on meta tensors, at its second window where those are chained."""
        model = self.model
        shape = request.latent_shape(model.grid)
        embeddings: list[Embedding] = []
        image: Tensor | None = None
        for _ in prompts_of(request):
            example = dict(model.loaded_transformer.example_embedding(text_tokens, META))
            image = example.pop("image", None)
            embeddings.append(example)
        negative = embeddings.pop() if request.guided else None
        frame_texts = frame_texts_of(request, model.grid, shape[1])
        canvas = lay_out_canvas(
            request,
            model,
            latents=torch.empty(shape, dtype=torch.float32, device=META),
            noise=torch.empty(shape, dtype=torch.float32, device=META),
            prompts=Prompts(tuple(embeddings), frame_texts, negative, image),
            known=self._known_content(request, shape),
        )
        if request.loras:
            canvas.adapters = tuple(self._on_meta().adapters_of(request.loras))
        canvas.windows_done = min(1, max(0, len(canvas.chain) - 1))  # settled frames, and anchors
        return canvas

    def _known_content(
        self, request: ResolvedRequest, shape: tuple[int, int, int, int]
    ) -> Known | None:
        mode = self.model.known_mode
        channels = mask = None
        if mode.animates or mode is KnownMode.VACE:
            more = self.model.loaded_transformer.shape.in_channels - shape[0]
            channels = torch.empty(more, *shape[1:], dtype=torch.float32, device=META)
        elif not request.clips:
            return None
        if mode.by_level:
            # On the host, where levels of tokens are read; its latents are counted apart.
            mask = torch.zeros(shape[1:], dtype=torch.bool)
            mask[0] = True
        if mode is not KnownMode.REPLACEMENT:
            return Known(mode, mask=mask, channels=channels)
        mask = torch.empty(shape[1:], dtype=torch.bool, device=META)
        return Known(mode, torch.empty(shape, dtype=torch.float32, device=META), mask)

    def encoding(
        self, request: ResolvedRequest, lengths: Sequence[int], canvas: int, texts: int
    ) -> int:
        """Peak of texts and clips, beside a canvas of so many bytes that grows meanwhile."""
        text = canvas + texts + self.model.prompt_encoder.activation_bytes(max(lengths))
        if not request.clips and request.init is None:
            return text
        unit = self.model.grid.vae_spatial
        coder = self.coding(
            "encode", (request.canvas_height // unit, request.canvas_width // unit), request
        )
        values = request.canvas_height * request.canvas_width * 3 * self.model.grid.time
        # Of uint8 two float32 copies are made, one after the other; the last one goes in.
        entering = coder.cache + values * (1 + 4 + 4)
        copied = 0 if self.model.vae_dtype == torch.float32 else values * 4
        pictures = self.model.image_encoder
        seen = 0 if pictures is None else pictures.activation_bytes(1 + self.model.takes_last_image)
        return max(text, canvas + max(entering, copied + coder.peak, texts + seen))

    def _decode(self, request: ResolvedRequest, canvas: Canvas, texts: int) -> tuple[int, int]:
        """Peak, and what is held between two turns."""
        _, _, height, width = canvas.latents.shape
        coder = self.coding("decode", (height, width), request)
        frames = request.num_frames * request.height * request.width * 3
        shape = canvas.latents.shape
        preview = 0 if self.model.preview is None else self.model.preview.nbytes(shape)
        # The canvas's own latents, the caller's copy, and the one that is decoded: in the
        # autoencoder's dtype once more, where that is another.
        rest = 3 * canvas.latents.nbytes + texts + frames + preview
        if self.model.vae_dtype != canvas.latents.dtype:
            rest += canvas.latents.numel() * self.model.vae_dtype.itemsize
        return rest + coder.peak, rest + coder.cache

    def coding(
        self, side: Literal["encode", "decode"], size: tuple[int, int], request: ResolvedRequest
    ) -> CodingMemory:
        model = self.model
        config, dtype = model.vae.config_of(side), model.vae_dtype
        tiles = model.vae.tiles(side, *size)
        if tiles is not None:
            measure = encode_peak_bytes if side == "encode" else decode_peak_bytes
            peak = measure(config, size, dtype, tiles, offload=model.device.type != "cpu")
            return CodingMemory(cache=peak, peak=peak)  # tiles that wait hold most of it
        ahead = look_ahead(config) if side == "decode" else 0
        length = min(REHEARSED + ahead, request.latent_shape(model.grid)[1])
        if side == "encode":
            coder = video_encode_memory(config, *size, dtype, length)
        else:
            coder = video_decode_memory(config, *size, dtype, length, request.loop)
        # Where steps are CUDA graphs, what they work in stays reserved between two of them.
        return CodingMemory(coder.peak, coder.peak) if model.vae.replays else coder

    def _on_meta(self) -> VideoModel:
        """The model with transformers that have no weights."""
        if self._hollow is None:
            hollow: DiffusionTransformer = self.model.loaded_transformer.without_weights()
            self._repeats = Repeats(hollow)
            experts = [
                Expert(e.load, e.from_timestep, e.size_bytes, hollow) for e in self.model.experts
            ]
            self._hollow = replace(self.model, device=META, experts=experts)
        return self._hollow


def default_peak(model: VideoModel, limits: Limits) -> int:
    """Bytes that a request of the checkpoint's default size takes, decoded in whole frames."""
    request = resolve_request(VideoRequest(prompt="a prompt"), model, limits, solvers=SOLVERS)
    model.vae.limit(NO_LIMIT)
    planner = MemoryPlanner(model, limits.max_batch_tokens, None, limits.pack_tokens)
    return planner.plan(request).peak


def tensors_of(canvas: Canvas) -> list[Tensor]:
    """What a canvas holds before its first step."""
    prompts, known = canvas.prompts, canvas.known
    held: list[Tensor | None] = [canvas.latents, canvas.noise, *prompts.tensors]
    if known is not None:
        held += [known.latents, known.mask, known.channels]
    return [tensor for tensor in held if tensor is not None]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
