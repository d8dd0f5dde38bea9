"""What a transformer's `config.json` may say: an allow-list of keys, each checked."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from sora_engine.errors import CheckpointError
from sora_engine.models.layers import GELUS

MAX_LAYERS = 1000
_BOOKKEEPING = frozenset({"_class_name", "_diffusers_version", "_name_or_path"})


@dataclass(frozen=True)
class TransformerConfig:
    """A configuration whose fields are the keys that are carried out. A value that cannot be raises
    `CheckpointError`.

    class_names: those that files give it, diffusers' own first. model: what errors call one. only:
    keys that are carried out at these values alone. without_effect: keys that say nothing here.
    """

    class_names: ClassVar[tuple[str, ...]]
    model: ClassVar[str]
    only: ClassVar[Mapping[str, tuple[object, ...]]] = {}
    without_effect: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raises CheckpointError for what cannot be."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, path: str | Path | None = None) -> Self:
        """Read a diffusers `config.json`. `path` is the file that errors name.

        Missing keys take the defaults. Raises `CheckpointError` for a key that is not on the list,
        another class's name, and a value that is not carried out.
        """
        name = values.get("_class_name", cls.class_names[0])
        if name not in cls.class_names:
            raise CheckpointError(
                f"_class_name is {name!r}; this loader reads {' and '.join(cls.class_names)}",
                path=path,
            )
        allowed = {field.name for field in fields(cls)}
        known = {*allowed, *cls.only, *cls.without_effect, *_BOOKKEEPING}
        unknown = sorted(set(values) - known)
        if unknown:
            raise CheckpointError(
                f"unknown configuration keys {unknown}; known are {sorted(known)}", path=path
            )
        for key, wanted in cls.only.items():
            if key in values and values[key] not in wanted:
                raise CheckpointError(
                    f"{key} is {values[key]!r}; {cls.model} has {wanted[0]!r}", path=path
                )
        given = {key: value for key, value in values.items() if key in allowed}
        try:
            return cls(**cls.settled(given))
        except CheckpointError as error:
            raise CheckpointError(str(error), path=path) from None

    @classmethod
    def settled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """The fields' values, from those that a file gives."""
        return given

    def to_dict(self) -> dict[str, Any]:
        """The keys and values of a diffusers `config.json`."""
        alone = {key: wanted[0] for key, wanted in self.only.items()}
        return {"_class_name": self.class_names[0], **alone, **asdict(self)}

    # Checks, for `check`.

    def must_be_positive(self, *names: str, most: int | None = None) -> None:
        """That these are integers from 1 to `most`."""
        for name in names:
            value = getattr(self, name)
            if not _positive(value) or (most is not None and value > most):
                upto = "" if most is None else f" up to {most}"
                raise CheckpointError(f"{name} is {value!r}; it must be a positive integer{upto}")

    def must_be_bool(self, *names: str) -> None:
        """That these are true or false."""
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise CheckpointError(f"{name} is {value!r}; it must be true or false")

    def must_be_fraction(self, *names: str) -> None:
        """That these are numbers between 0 and 1."""
        for name in names:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
                raise CheckpointError(f"{name} is {value!r}; it must lie between 0 and 1")

    def must_be_one_of(self, name: str, known: Collection[str]) -> None:
        """That this is one of these words."""
        value = getattr(self, name)
        if value not in known:
            raise CheckpointError(f"{name} is {value!r}; {' and '.join(known)} are supported")


@dataclass(frozen=True)
class PatchConfig(TransformerConfig):
    """Of a transformer over square patches of latents, under diffusers' names.

    sample_size: latents along a side of what it was trained on.
    """

    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    num_layers: int = 28
    attention_bias: bool = True
    sample_size: int = 32
    patch_size: int = 2
    activation_fn: str = "gelu-approximate"
    norm_eps: float = 1e-6

    def check(self) -> None:
        """Sizes, and that fixed positions and patches fit them."""
        self.must_be_positive(
            "num_attention_heads", "attention_head_dim", "in_channels", "out_channels",
            "patch_size", "sample_size",
        )  # fmt: skip
        self.must_be_positive("num_layers", most=MAX_LAYERS)
        self.must_be_bool("attention_bias")
        self.must_be_one_of("activation_fn", GELUS)
        self.must_be_fraction("norm_eps")
        if self.inner_dim % 4:
            raise CheckpointError(
                f"tokens are {self.inner_dim} wide; fixed positions need a multiple of 4"
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise CheckpointError(
                f"out_channels is {self.out_channels}; {self.in_channels}, or with a learned "
                f"variance {2 * self.in_channels}, would work"
            )
        if self.sample_size % self.patch_size:
            raise CheckpointError(
                f"sample_size {self.sample_size} is no multiple of patch_size {self.patch_size}"
            )

    @classmethod
    def settled(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Without a number of its own, as many channels come out as go in."""
        if given.get("out_channels", 0) is None:
            given["out_channels"] = given.get("in_channels", cls().in_channels)
        return given

    @property
    def inner_dim(self) -> int:
        """Width of a token: heads x head_dim."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def place_divisor(self) -> float:
        """By how much places lie closer than patches."""
        return 1.0

    @property
    def learned_variance(self) -> bool:
        """Whether predictions carry as many channels again, of a variance."""
        return self.out_channels != self.in_channels


def _positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
