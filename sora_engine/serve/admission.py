"""Whether what a client asks for can be made here, before anything of it is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sora_engine.denoise.denoise import num_steps, step_tokens
from sora_engine.errors import RequestError
from sora_engine.serve.failures import ApiError
from sora_engine.serve.translate import Stored, Translator

if TYPE_CHECKING:
    from sora_engine.request import LatentGrid, ResolvedRequest, VideoRequest
    from sora_engine.runtime.engine import Engine
    from sora_engine.runtime.memory import MemoryPlan


class Admission:
    """Checks requests as the engine will when they are begun. For any thread; takes a moment."""

    def __init__(self, engine: Engine, translator: Translator, max_work: int | None) -> None:
        self._engine, self._translator, self._max_work = engine, translator, max_work
        self._planned = _is_planned(engine)

    def admit(self, stored: Stored) -> tuple[VideoRequest, ResolvedRequest]:
        """The request of what is stored, which can be made, and which no hook refuses; raises
        ApiError, and what `Engine.submit` raises of a request."""
        request, resolved = self._checked(stored)
        self._promise(request)
        if self._engine.hooks.check_request is not None:
            self._engine.hooks.check_request(resolved)
        return request, resolved

    def plan(self, stored: Stored) -> tuple[ResolvedRequest, MemoryPlan | None]:
        """What a job would be and take; raises as `admit`."""
        request, resolved = self._checked(stored)
        return resolved, self._promise(request)

    def _promise(self, request: VideoRequest) -> MemoryPlan | None:
        return self._engine.plan(request) if self._planned else None

    def _checked(self, stored: Stored) -> tuple[VideoRequest, ResolvedRequest]:
        request = self._translator.request_of(stored)
        resolved = self._engine.resolve(request)
        most = self._max_work
        grid = self._engine.model.grid
        work = step_tokens(resolved, grid) * num_steps(resolved, grid)
        if most is not None and work > most:
            raise ApiError(
                400,
                "too_much_work",
                f"{work} tokens in all steps are more than this server takes, {most}; a smaller "
                "size, length or number of steps would work",
            )
        return request, resolved


def _is_planned(engine: Engine) -> bool:
    """Whether memory is: that of ranks is not."""
    try:
        return engine.loaded_model is not None
    except RequestError:
        return False


def facts_of(resolved: ResolvedRequest, grid: LatentGrid) -> dict[str, Any]:
    """What a job's answers tell of its request."""
    return {
        "size": f"{resolved.width}x{resolved.height}",
        "num_frames": resolved.num_frames,
        "fps": resolved.fps,
        "seconds": f"{resolved.num_frames / resolved.fps:g}",
        "seed": resolved.seed,
        "num_steps": num_steps(resolved, grid),
        "tokens": step_tokens(resolved, grid) * num_steps(resolved, grid),
        "prompt": resolved.prompt,
        "canvas": resolved.canvas,
    }
