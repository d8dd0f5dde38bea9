"""The classes of a checkpoint that makes pictures of classes, and which of them a request is of."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field

from sora_engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Labels:
    """What a class may be called.

    count: of the classes, which are 0 to count - 1; None where the model is not known yet.
    names: by name the class. Several names may be of one, and there may be none.
    """

    count: int | None
    names: Mapping[str, int] = field(default_factory=dict)

    def index(self, label: object, what: str = "label") -> int:
        """The class of a number, of a number in words, or of a name. RequestError for another."""
        if isinstance(label, str) and label.strip().isdecimal():
            label = int(label)
        if isinstance(label, int) and not isinstance(label, bool):
            if label < 0 or (self.count is not None and label >= self.count):
                most = "" if self.count is None else f" to {self.count - 1}"
                raise RequestError(f"{what} must be a class from 0{most}, got {label}")
            return label
        if not isinstance(label, str):
            raise RequestError(
                f"{what} must be a class's number or name, got {type(label).__name__} {label!r}"
            )
        if self.count is None:
            return 0
        name = " ".join(label.split())
        if name in self.names:
            return self.names[name]
        if not self.names:
            raise RequestError(
                f"{what} {label[:60]!r} is no number of a class, and this checkpoint names none; "
                f"0 to {self.count - 1} would work"
            )
        near = difflib.get_close_matches(name, self.names, 3, 0.5) or sorted(self.names)[:3]
        raise RequestError(
            f"{what} {label[:60]!r} is no class of this checkpoint; the nearest are "
            f"{', '.join(map(repr, near))}, or 0 to {self.count - 1}"
        )

    @classmethod
    def from_json(cls, record: Mapping[str, object] | None) -> Labels | None:
        """As `dataclasses.asdict` has them."""
        if record is None:
            return None
        count, names = record["count"], record["names"]
        assert isinstance(count, int)
        assert isinstance(names, Mapping)
        return cls(count, dict(names))


def resolve_label(
    label: object, prompt: str, negative_prompt: str, labels: Labels | None, *, shots: bool
) -> int | None:
    """The class that a request is of; None where the checkpoint reads texts.

    A prompt that is a class's name or number says it, too. RequestError where nothing does, where
    two say different things, and for a label to a checkpoint that has none.
    """
    if labels is None:
        if label is not None:
            raise RequestError(
                f"label = {label!r} is not read: this checkpoint reads texts; a prompt would work"
            )
        return None
    if labels.count is None:
        return None if label is None else labels.index(label)
    if shots:
        raise RequestError("shots read texts, and this checkpoint has classes; a label would work")
    if label is None and not prompt.strip():
        raise RequestError(
            f"there is no label; this checkpoint makes pictures of classes: 0 to "
            f"{labels.count - 1} would work" + (", or a name" if labels.names else "")
        )
    found = labels.index(prompt, "prompt") if label is None else labels.index(label)
    if label is not None and prompt.strip() and labels.index(prompt, "prompt") != found:
        raise RequestError(
            f"label = {label!r} and prompt {prompt[:60]!r} are two classes; give one"
        )
    if negative_prompt.strip():
        labels.index(negative_prompt, "negative_prompt")
    return found
