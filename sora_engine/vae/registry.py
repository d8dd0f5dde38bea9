"""The kinds of video autoencoder, by the class that diffusers' configurations name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from sora_engine.errors import CheckpointError
from sora_engine.vae.causal import CausalVAE
from sora_engine.vae.shapes import VAEConfig


class ReadsConfig(Protocol):
    """A kind's class of configurations."""

    def from_dict(self, values: Mapping[str, Any], *, path: str | Path | None = None) -> Any:
        """From the dictionary of a `config.json`; raises CheckpointError, which names `path`."""
        ...


class ReadsFile(Protocol):
    """What a kind knows of single files, which have names of their own and no configuration."""

    def claims(self, names: Iterable[str]) -> bool:
        """Whether tensors of these names are an autoencoder of the kind."""
        ...

    def config(
        self, shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
    ) -> Any:
        """The configuration, from the shapes of all tensors. Raises CheckpointError."""
        ...

    def names(self, names: Iterable[str], config: Any) -> dict[str, str]:
        """By the name in the file that of the parameter; what is left out belongs to none."""
        ...


@dataclass(frozen=True, slots=True)
class VAEKind:
    """One kind: how its configuration is read, the layers that are built from it, how it lies in
    single files, and today's names for those of older folders. encodes: whether it encodes, too."""

    config: ReadsConfig
    layers: type[CausalVAE]
    files: ReadsFile | None = None
    encodes: bool = True
    renames: Callable[[str], str] | None = None


_KINDS: dict[str, VAEKind | str] = {
    "AutoencoderKLWan": "sora_engine.vae.wan_checkpoint",
    "TAEHV": "sora_engine.vae.tiny",
    "AutoencoderKL": "sora_engine.vae.kl_checkpoint",
    "AutoencoderKLLTXVideo": "sora_engine.vae.ltx_checkpoint",
    "VQModel": "sora_engine.vae.vq",
}
"""By class name the kind, or the module that has it as `KIND`."""


def register_vae(class_name: str, kind: VAEKind) -> None:
    """Make a kind known by the class name that its configurations carry. ValueError where another
    has that name."""
    if class_name in _KINDS:
        raise ValueError(f"the class {class_name!r} has its kind already")
    _KINDS[class_name] = kind


def unregister_vae(class_name: str) -> None:
    """Forget a kind that was registered."""
    del _KINDS[class_name]


def vae_kind(class_name: object, *, path: str | Path | None = None) -> VAEKind:
    """The kind of that name. Raises CheckpointError with those that are known."""
    found = _KINDS.get(class_name) if isinstance(class_name, str) else None
    if found is None:
        raise CheckpointError(
            f"the vae's class is {class_name!r}; supported: {', '.join(_KINDS)}", path=path
        )
    if isinstance(found, VAEKind):
        return found
    kind: VAEKind = import_module(found).KIND
    return kind


def vae_in_file(
    shapes: Mapping[str, tuple[int, ...]], *, path: str | Path | None = None
) -> VAEConfig | None:
    """The configuration of the autoencoder in a single file; None where no kind claims it."""
    for name in _KINDS:
        files = vae_kind(name).files
        if files is not None and files.claims(shapes):
            config: VAEConfig = files.config(shapes, path=path)
            return config
    return None


def read_vae_config(values: Mapping[str, Any], *, path: str | Path | None = None) -> VAEConfig:
    """The configuration in a `config.json`, of whichever kind it names."""
    kind = vae_kind(values.get("_class_name"), path=path)
    config: VAEConfig = kind.config.from_dict(values, path=path)
    return config


def build_vae(config: VAEConfig) -> CausalVAE:
    """The layers of a configuration, with random weights, on the current default device."""
    return vae_kind(config.class_name).layers(config)
