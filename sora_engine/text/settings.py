"""Configurations of transformers' models, taken from JSON by an allow-list of keys."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object

# Keys that transformers has written over the years and that say nothing about a forward pass.
BOOKKEEPING = frozenset(
    {
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "dropout",
        "dropout_rate",
        "dtype",
        "initializer_factor",
        "initializer_range",
        "model_type",
        "torch_dtype",
        "transformers_version",
    }
)
MAX_LAYERS = 1000  # a configuration must not keep the engine busy building a model for hours


def read_settings(
    path: Path,
    architecture: str,
    defaults: Mapping[str, Any],
    *,
    choices: Mapping[str, Collection[str]],
    known: Collection[str] = (),
) -> dict[str, Any]:
    """As `pick`, of a `config.json` that must be of this architecture where it names one.

    choices: the values that some keys may have.
    """
    config = read_json_object(path)
    named = config.get("architectures")
    if named not in (None, [architecture]):
        raise CheckpointError(
            f"architectures is {named!r}; supported: {[architecture]!r}", path=path
        )
    values = pick(config, defaults, known=known, path=path)
    for key, allowed in choices.items():
        if values[key] not in allowed:
            raise CheckpointError(f"{key} is {values[key]!r}; supported: {allowed}", path=path)
    return values


def pick(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    *,
    known: Collection[str] = (),
    path: Path,
) -> dict[str, Any]:
    """The values of the keys of `defaults`; each has its default's type, and numbers are positive.

    Keys that are neither in `defaults`, nor `known`, nor bookkeeping raise `CheckpointError`.
    """
    unknown = sorted(set(config) - set(defaults) - set(known) - BOOKKEEPING)
    if unknown:
        raise CheckpointError(f"unknown configuration keys {unknown}", path=path)
    values = {}
    for key, default in defaults.items():
        value = config.get(key, default)
        kinds = (int, float) if isinstance(default, float) else type(default)
        if not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool):
            raise CheckpointError(
                f"{key} is {value!r}; it must be of type {type(default).__name__}", path=path
            )
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value > 0:
            raise CheckpointError(f"{key} is {value!r}; it must be positive", path=path)
        if key in ("num_layers", "num_hidden_layers") and value > MAX_LAYERS:
            raise CheckpointError(f"{key} is {value}; {MAX_LAYERS} is the most", path=path)
        values[key] = value
    return values
