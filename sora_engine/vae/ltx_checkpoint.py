"""Weights of LTX-Video's autoencoder, under diffusers' names and its authors'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.vae.ltx import LTXVAE
from sora_engine.vae.ltx_config import LTXVAEConfig
from sora_engine.vae.ltx_header import MARKS, PREFIXES, diffusers_names, header_config, read_header
from sora_engine.vae.registry import VAEKind


def to_own_name(name: str) -> str:
    """A parameter's name by diffusers', which has every convolution within a module of its own."""
    return re.sub(r"\.conv\.(weight|bias)$", r".\1", name)


@dataclass(frozen=True, slots=True)
class LTXVAEFiles:
    """How its authors' files have it; see `vae.registry.ReadsFile`."""

    def claims(self, names: Iterable[str]) -> bool:
        present = set(names)
        return any(all(p + mark in present for mark in MARKS) for p in PREFIXES)

    def config(
        self, shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
    ) -> LTXVAEConfig:
        """From the header. The statistics of latents are tensors, and are not read here."""
        values = None if path is None else header_config(Path(path))
        vae = None if values is None else values.get("vae")
        if path is None or not isinstance(vae, Mapping):
            raise CheckpointError(
                "an AutoencoderKLLTXVideo whose header does not tell its blocks; a folder of "
                "diffusers with a config.json would work",
                path=path,
            )
        return read_header(vae, path=Path(path))

    def names(self, names: Iterable[str], config: LTXVAEConfig) -> dict[str, str]:
        return diffusers_names(names, config)


KIND = VAEKind(config=LTXVAEConfig, layers=LTXVAE, files=LTXVAEFiles(), renames=to_own_name)
