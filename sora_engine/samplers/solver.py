"""The shape of every solver: pure steps, and a state that can be saved and taken up elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from sora_engine.samplers.schedule import Schedule


@dataclass(frozen=True)
class SolverState:
    """What a multistep solver remembers: nothing at the start, never more than its order.

    step: the step that comes next. history: the model's last outputs as the solver integrates
    them (x0 or epsilon), newest last, shaped as the sample. last_sample: the sample before the last
    predictor, for UniPC's corrector.
    """

    step: int = 0
    history: tuple[torch.Tensor, ...] = ()
    last_sample: torch.Tensor | None = None

    def to_dict(self) -> dict[str, torch.Tensor]:
        """The state as tensors alone, ready for safetensors."""
        saved = {"step": torch.tensor(self.step, dtype=torch.int64)}
        saved.update({f"history.{i}": tensor for i, tensor in enumerate(self.history)})
        if self.last_sample is not None:
            saved["last_sample"] = self.last_sample
        return saved

    @classmethod
    def from_dict(cls, saved: Mapping[str, torch.Tensor]) -> SolverState:
        """Take up what `to_dict` saved; raises ValueError for entries that it does not write."""
        count = sum(key.startswith("history.") for key in saved)
        names = [f"history.{i}" for i in range(count)]
        strange = set(saved) - {"step", "last_sample", *names}
        if strange or "step" not in saved:
            raise ValueError(f"not a solver's state: entries {sorted(saved)}")
        return cls(
            step=int(saved["step"]),
            history=tuple(saved[name] for name in names),
            last_sample=saved.get("last_sample"),
        )


@dataclass(frozen=True)
class Solver(ABC):
    """One way down a schedule. Steps are element-wise in the sample, so any layout will do.

    Arithmetic is float32 (float64 for float64 samples), coefficients are worked out in float64, and
    the sample comes back in the dtype it came in.
    """

    schedule: Schedule

    @property
    def stochastic(self) -> bool:
        """Whether steps take fresh noise."""
        return False

    def init(self, step: int = 0) -> SolverState:
        """The state before `step`; a solver set out from a later step has no history there."""
        return SolverState(step=step)

    def step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        *,
        noise: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, SolverState]:
        """Step i (0 to n - 1): the sample at the next level, and the state for the next step.

        sample, prediction, noise: one shape, any layout. The state given is left as it was.
        Raises ValueError when the state is another step's, shapes differ, or noise is missing.
        """
        if not 0 <= i < len(self.schedule):
            raise ValueError(f"step {i} is outside of the {len(self.schedule)} steps")
        if state.step != i:
            raise ValueError(f"the state is for step {state.step}, not for step {i}")
        if prediction.shape != sample.shape:
            raise ValueError(
                f"prediction {list(prediction.shape)} and sample {list(sample.shape)} differ"
            )
        if self.stochastic and (noise is None or noise.shape != sample.shape):
            shape = None if noise is None else list(noise.shape)
            raise ValueError(f"step {i} takes noise {list(sample.shape)}, got {shape}")
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        moved, state = self._step(
            state,
            i,
            sample.to(dtype),
            prediction.to(dtype),
            None if noise is None else noise.to(dtype),
        )
        return moved.to(sample.dtype), state

    @abstractmethod
    def _step(
        self,
        state: SolverState,
        i: int,
        sample: torch.Tensor,
        prediction: torch.Tensor,
        noise: torch.Tensor | None,
    ) -> tuple[torch.Tensor, SolverState]: ...


def combine(*terms: tuple[float, torch.Tensor]) -> torch.Tensor:
    """sum of coefficient * tensor; a coefficient of 0 leaves its tensor (even a nan in it) out."""
    kept = [(c, tensor) for c, tensor in terms if c != 0.0]
    if not kept:
        return torch.zeros_like(terms[0][1])
    total = kept[0][0] * kept[0][1]
    for coefficient, tensor in kept[1:]:
        total.add_(tensor, alpha=coefficient)
    return total
