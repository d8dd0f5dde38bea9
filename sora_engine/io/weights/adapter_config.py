"""What PEFT's configuration says of an adapter's scales.

diffusers keeps it in the file's header, and PEFT beside the file.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import parse_json_object, read_json_object

FOLDER_FILE = "adapter_model.safetensors"
FOLDER_CONFIG = "adapter_config.json"
"""What PEFT calls the two files in a folder."""
HEADER = "lora_adapter_metadata"


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What PEFT's configuration says of scales: in the header (diffusers), or beside the file.

    A module's own rank and alpha, by the end of its name, go before the common ones.
    """

    settings: Mapping[str, Any]
    where: Path

    @classmethod
    def read(cls, metadata: Mapping[str, str], path: Path) -> AdapterConfig:
        text = metadata.get(HEADER)
        if text is not None:
            return cls(parse_json_object(text.encode(), path, HEADER), path)
        beside = path.parent / FOLDER_CONFIG
        if path.name == FOLDER_FILE and beside.is_file():
            return cls(read_json_object(beside), beside)
        return cls({}, path)

    def scale(self, module: str, second: bool) -> tuple[float, int] | None:
        """The scale of a module's product, and its rank; None where nothing is said."""
        rank = self._of(module, second, "r", "rank_pattern")
        alpha = self._of(module, second, "lora_alpha", "alpha_pattern")
        if alpha is None:
            alpha = self._of(module, second, "alpha", "alpha_pattern")
        if rank is None or alpha is None:
            return None
        if rank < 1 or rank != int(rank):
            raise CheckpointError(f"its configuration says the rank {rank}", path=self.where)
        root = self._get("use_rslora", second) is True
        return alpha / (math.sqrt(rank) if root else rank), int(rank)

    def _of(self, module: str, second: bool, common: str, patterns: str) -> float | None:
        """One number of a module's."""
        own = self._get(patterns, second)
        value = self._get(common, second)
        if isinstance(own, Mapping):
            for pattern, said in own.items():
                if re.fullmatch(r"[\w.]+", pattern) is None:  # it is code to run, from a file
                    raise CheckpointError(
                        f"{patterns} has {pattern!r}; the end of a module's name would work",
                        path=self.where,
                    )
                found = f".{module}".endswith(f".{pattern}")
                if found:
                    value = said
                    break
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(
                f"its configuration says {common} {json.dumps(value)}; a number would work",
                path=self.where,
            )
        if not math.isfinite(value):
            raise CheckpointError(f"its configuration says {common} {value}", path=self.where)
        return float(value)

    def _get(self, name: str, second: bool) -> Any:
        for prefix in ("transformer_2." if second else "transformer.", ""):
            if f"{prefix}{name}" in self.settings:
                return self.settings[f"{prefix}{name}"]
        return None
