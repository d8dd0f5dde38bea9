"""Names that the authors of a model give its tensors, and the engine's for them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from sora_engine.io.weights.selected import Part
from sora_engine.models.family import Shapes

Names = Mapping[str, str | Part]
"""By the engine's name of a tensor the file's, or a part of one."""


@dataclass(frozen=True)
class AuthorsNames:
    """A published naming.

    mark: a tensor by which it is known. table: by module its modules of the engine. `#` is a
    number, `*` every number that the list `blocks` has; of several modules each has its share of
    the rows, in order. unread: modules that nothing reads.
    """

    mark: str
    table: Mapping[str, str | tuple[str, ...]]
    blocks: str = "blocks"
    unread: Collection[str] = ()

    def names(self, shapes: Shapes) -> Names | None:
        """Where the tensors of a file are; None where it has other names. What is in no table keeps
        its name, for the error that tells it."""
        if self.mark not in shapes:
            return None
        numbers = {match[1] for n in shapes if (match := re.match(rf"{self.blocks}\.(\d+)\.", n))}
        found: dict[str, str | Part] = {}
        for name, shape in shapes.items():
            module, _, leaf = name.rpartition(".")
            if name in self.unread or module in self.unread:
                continue
            for own, part in self._own(name, module, leaf, shape):
                each = [own.replace("*", n) for n in numbers] if "*" in own else [own]
                found |= dict.fromkeys(each, part)
        return found

    def _own(
        self, name: str, module: str, leaf: str, shape: tuple[int, ...]
    ) -> list[tuple[str, str | Part]]:
        for pattern, target in self.table.items():
            regex = re.escape(pattern).replace(r"\#", r"(\d+)")
            whole = re.fullmatch(regex, name)
            match = whole or re.fullmatch(regex, module)
            if match is None:
                continue
            suffix = "" if whole else f".{leaf}"
            own = [target] if isinstance(target, str) else list(target)
            for number in match.groups():
                own = [each.replace("#", number, 1) for each in own]
            if len(own) == 1:
                return [(own[0] + suffix, name)]
            rows = shape[0] // len(own)
            return [
                (each + suffix, Part(name, range(i * rows, (i + 1) * rows)))
                for i, each in enumerate(own)
            ]
        return [(name, name)]


def number_of(shapes: Shapes, blocks: str) -> int:
    """How many blocks a list has."""
    found = (re.match(rf"{blocks}\.(\d+)\.", name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)
