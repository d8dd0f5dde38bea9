"""Who makes which part of a denoising step: one process alone, or ranks that share it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from torch import Tensor

from sora_engine.denoise.canvas import Canvas
from sora_engine.denoise.model import Transformer
from sora_engine.denoise.packing import PackedBatch, Segment
from sora_engine.denoise.windows import Window, blend


@dataclass(frozen=True, slots=True)
class Part:
    """One segment of a step, and where it came from."""

    canvas: Canvas
    window: Window
    conditional: bool
    segment: Segment


PartPredictions: TypeAlias = dict[tuple[int, Window, bool], Tensor]
"""By canvas (its id), window and branch: float32 `[C, length, H, W]`."""
Predictions: TypeAlias = dict[tuple[int, bool], Tensor]
"""By canvas (its id) and branch: float32 `[C, T, H, W]`, all windows blended."""


class StepSharing(Protocol):
    """The ranks that take a step together, as one of them sees them."""

    def own(self, parts: Sequence[Part]) -> list[Part]:
        """Those of a step's parts that this process makes, in their order."""
        ...

    def predict(self, transformer: Transformer, batch: PackedBatch) -> Tensor:
        """The transformer's predictions for all tokens of a batch."""
        ...

    def join(self, parts: Sequence[Part], predictions: PartPredictions) -> Predictions:
        """The windows of each canvas and branch, blended; `parts` are all of the step."""
        ...

    def clear(self) -> None:
        """Forget what depends on a batch's composition."""
        ...


def adapted(transformer: Transformer, batch: PackedBatch) -> Tensor:
    """The transformer's predictions for a batch, with the adapters of its tokens."""
    if not batch.adapters:
        return transformer(batch)
    with transformer.adapting(batch.adapters):
        return transformer(batch)


class Alone:
    """One process that makes every part itself."""

    def own(self, parts: Sequence[Part]) -> list[Part]:
        return list(parts)

    def predict(self, transformer: Transformer, batch: PackedBatch) -> Tensor:
        return adapted(transformer, batch)

    def join(self, parts: Sequence[Part], predictions: PartPredictions) -> Predictions:
        joined = {}
        for canvas, conditional in dict.fromkeys((part.canvas, part.conditional) for part in parts):
            windows = canvas.windows()
            by_window = [predictions[id(canvas), window, conditional] for window in windows]
            blended = blend(by_window, windows, canvas.window_plan, wraps=canvas.wraps)
            joined[id(canvas), conditional] = blended
        return joined

    def clear(self) -> None:
        pass


ALONE = Alone()
