"""What a caller asks for, checked against what a model can make. No torch here."""

from sora_engine.request.actions import Action, ActionSpace
from sora_engine.request.driving import Driving
from sora_engine.request.facts import GenerationDefaults, KnownMode, LatentGrid, ModelFacts
from sora_engine.request.guidance import Guidance
from sora_engine.request.lora import Lora
from sora_engine.request.request import Clip, Footage, Shot, VideoRequest
from sora_engine.request.resolve import ResolvedRequest, check_for_mode, resolve_request
from sora_engine.request.session import ResolvedSession, SessionRequest, resolve_session
from sora_engine.request.windows import SparsePlan, WindowPlan

__all__ = [
    "Action",
    "ActionSpace",
    "Clip",
    "Driving",
    "Footage",
    "GenerationDefaults",
    "Guidance",
    "KnownMode",
    "LatentGrid",
    "Lora",
    "ModelFacts",
    "ResolvedRequest",
    "ResolvedSession",
    "SessionRequest",
    "Shot",
    "SparsePlan",
    "VideoRequest",
    "WindowPlan",
    "check_for_mode",
    "resolve_request",
    "resolve_session",
]
