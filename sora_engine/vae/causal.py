"""Causal video autoencoders of PyTorch layers: frames to latents and back, a stretch at a time.

Latents that go in and come out here are normalised: `(mean - latents_mean) / latents_std`, as the
transformer sees them. The first latent frame stands for one frame, each further one for
`scale_factor_temporal` frames.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sora_engine.vae.blocks import CausalConv3d, Downsample, Upsample
from sora_engine.vae.coder import ChunkCoder
from sora_engine.vae.native import Layouts, give_back
from sora_engine.vae.shapes import VAEConfig, check_frames, check_latents, look_ahead
from sora_engine.vae.state import FeatureCache, VAEState


class CausalVAE(nn.Module, ChunkCoder[VAEState]):
    """A video autoencoder as functions with an explicit state.

    All convolutions are causal, so a video may be cut anywhere: `latents_per_call` says how many
    latent frames go through the layers together. One at a time (the default) needs the least memory
    and gives the same bits however a video is chunked; None takes all at once, which suits training
    and short clips.

    A kind of autoencoder has its layers in the submodules `encoder` and `decoder`, and says with
    `encode_step` and `decode_step` what one pass through them is.
    """

    encoder: nn.Module
    decoder: nn.Module
    splits_rows: ClassVar[bool] = True
    """Whether ranks may decode some rows each: the decoder's layers see single pixels, their
    neighbours (`CausalConv3d`, `Upsample`), or all rows (`AttentionBlock`)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self._config: Any = config
        self._laid_out: set[str] = set()

    @property
    def config(self) -> VAEConfig:
        config: VAEConfig = self._config
        return config

    @abstractmethod
    def encode_step(self, frames: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: frames to the moments of raw latents `[B, 2z, t, h, w]`."""

    @abstractmethod
    def decode_step(self, raw: Tensor, feat_cache: FeatureCache) -> Tensor:
        """One pass through the layers: raw (not normalised) latents to their frames."""

    def prepare(self, wanted: bool = True, *, onednn: bool = True) -> Self:
        """Have the layers lay out their weights for inference, when they are first needed: channels
        last on a GPU, in oneDNN's blocks on a CPU, upsampling folded into kernels. Returns self.

        The layers then run on copies, without gradients: weights that are changed afterwards need
        another `prepare`, and `train()`, `to()` and `load_state_dict` undo it. `onednn=False`
        leaves weights plain on a CPU, for a graph that is to run elsewhere. Frozen weights that lie
        in oneDNN's blocks lie nowhere else: `state_dict`, `weight`, copies and `prepare(False)`
        give their values, `parameters()` gives stand-ins (see `PackableConv3d`).
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                module.lay_out(wanted, onednn=onednn)
            elif isinstance(module, Downsample | Upsample):
                module.layouts = Layouts(wanted, onednn=onednn)
        self._laid_out.clear()
        return self

    def _lay_out(self, part: str) -> None:
        """Lay out the convolutions of `part` before they run: blocks that came to lie between
        activations would keep the system from having back what the plain weights took."""
        if part in self._laid_out:
            return
        for module in self.get_submodule(part).modules():
            if isinstance(module, CausalConv3d) and module.layouts.wanted:
                module.packed()
        self._laid_out.add(part)
        give_back()

    def train(self, mode: bool = True) -> Self:
        if mode:
            self.prepare(False)
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self.prepare(False)
        return super()._apply(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """As `nn.Module.load_state_dict`; layouts made for the old weights are let go of."""
        self.prepare(False)
        return super().load_state_dict(*args, **kwargs)

    # -- encoding --------------------------------------------------------------------------------

    def encode(self, video: Tensor, *, latents_per_call: int | None = 1) -> Tensor:
        """`[B, C, n, H, W]` in [-1, 1] to normalised mean latents `[B, z, t, h, w]`.

        `n` is 1 or `scale_factor_temporal` times a whole number more; RequestError otherwise.
        """
        mean, _ = self.encode_moments(video, latents_per_call=latents_per_call)
        return self.normalise(mean)

    def encode_moments(
        self, video: Tensor, *, latents_per_call: int | None = 1
    ) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the raw (not normalised) latents, `[B, z, t, h, w]` each."""
        moments, _ = self._encode(video, None, latents_per_call, keep=False, consume=False)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_chunk(
        self,
        frames: Tensor,
        state: VAEState | None = None,
        *,
        latents_per_call: int | None = 1,
        consume: bool = False,
    ) -> tuple[Tensor, VAEState]:
        """The next frames of a video to their normalised mean latents, and the state after them.

        The first chunk (`state` None) has 1 frame, or `scale_factor_temporal` times a whole number
        more; every later one a multiple of it. `consume` lets go of `state` on the way, which
        halves what caches take; it cannot be used again then.
        """
        moments, state = self._encode(frames, state, latents_per_call, keep=True, consume=consume)
        assert state is not None
        return self.normalise(moments.chunk(2, dim=1)[0]), state

    def _encode(
        self,
        frames: Tensor,
        state: VAEState | None,
        latents_per_call: int | None,
        *,
        keep: bool,
        consume: bool,
    ) -> tuple[Tensor, VAEState | None]:
        check_frames(self.config, frames, first=state is None)
        self._lay_out("encoder")
        factor = self.scale_factor_temporal
        head = 1 if state is None else 0
        latents = head + (frames.shape[2] - head) // factor
        per_call = latents if latents_per_call is None else latents_per_call
        caches = _open(state, consume)
        done, parts = 0, []
        while done < latents:
            take = min(per_call, latents - done)
            end = done + take
            # Latent k stands for the frames up to 1 + k * factor in a video that starts here.
            low = 0 if done == 0 else head + (done - head) * factor
            high = head + (end - head) * factor
            feat_cache = FeatureCache(caches, keep=keep or end < latents)
            parts.append(self.encode_step(frames[:, :, low:high], feat_cache))
            done, caches = end, feat_cache.new
        moments = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if not keep:
            return moments, None
        before = 0 if state is None else state.latent_frames
        return moments, VAEState(tuple(caches or ()), before + latents)

    # -- decoding --------------------------------------------------------------------------------

    def decode(self, latents: Tensor, *, latents_per_call: int | None = 1) -> Tensor:
        """Normalised latents `[B, z, t, h, w]` to frames `[B, C, n, H, W]` in [-1, 1].

        `n = 1 + (t - 1) * scale_factor_temporal`.
        """
        frames, _ = self._decode(latents, None, latents_per_call, keep=False, consume=False)
        return frames

    def decode_chunk(
        self,
        latents: Tensor,
        state: VAEState | None = None,
        *,
        latents_per_call: int | None = 1,
        consume: bool = False,
    ) -> tuple[Tensor, VAEState]:
        """The next latent frames (any number) to their frames, and the state after them.

        A decoder that looks ahead gives frames late; the rest comes with a stretch of no latent
        frames at all, which ends the video. `consume` lets go of `state` on the way, which halves
        what caches take; it cannot be used again then.
        """
        frames, state = self._decode(latents, state, latents_per_call, keep=True, consume=consume)
        assert state is not None
        return frames, state

    def _decode(
        self,
        latents: Tensor,
        state: VAEState | None,
        latents_per_call: int | None,
        *,
        keep: bool,
        consume: bool,
    ) -> tuple[Tensor, VAEState | None]:
        count = latents.shape[2]
        ends = look_ahead(self.config) > 0 and (not keep or (count == 0 and state is not None))
        if count or not ends:
            check_latents(self.config, latents)
        self._lay_out("decoder")
        per_call = max(count, 1) if latents_per_call is None else latents_per_call
        before = 0 if state is None else state.latent_frames
        caches = _open(state, consume)
        parts = []
        for low in range(0, max(count, 1), per_call):
            high = min(low + per_call, count)
            feat_cache = FeatureCache(
                caches,
                keep=keep or high < count,
                last=ends and high == count,
                latent_frames=before + low,
            )
            parts.append(self.decode_step(self.denormalise(latents[:, :, low:high]), feat_cache))
            caches = feat_cache.new
            if feat_cache.first:
                give_back()  # the first frame's blocks fit none of those that come later
        frames = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        if not keep:
            return frames, None
        return frames, VAEState(tuple(caches or ()), before + count)


def _open(state: VAEState | None, consume: bool) -> Sequence[Tensor | None] | None:
    if state is None:
        return None
    if state.released:
        raise ValueError("this VAE state was consumed by an earlier call; keep what that returned")
    return state.release() if consume else state.caches
