"""The classes of a DiT and their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.request.labels import Labels


def read_labels(id2label: object, count: int, path: Path) -> Labels:
    """The classes of a model, and their names as `model_index.json` has them: by number one name,
    or several with commas between. Raises CheckpointError."""
    if id2label is None:
        return Labels(count)
    if not isinstance(id2label, Mapping):
        raise CheckpointError(f"id2label must name classes by number, not {id2label!r}", path=path)
    names: dict[str, int] = {}
    for key, value in id2label.items():
        known = re.fullmatch(r"\d{1,9}", str(key)) is not None and int(key) < count
        if not known or not isinstance(value, str):
            raise CheckpointError(
                f"id2label has {key!r}: {value!r}; the model has classes 0 to {count - 1}",
                path=path,
            )
        for name in value.split(","):
            names[" ".join(name.split())] = int(key)
    return Labels(count, names)
