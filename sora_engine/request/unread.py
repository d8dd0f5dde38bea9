"""What a request gives and nothing reads: told, as nothing is passed over without a word."""

from __future__ import annotations

from dataclasses import replace

from sora_engine.request.request import VideoRequest
from sora_engine.request.resolve import ResolvedRequest


def unread(request: VideoRequest, resolved: ResolvedRequest, num_experts: int) -> list[str]:
    """A line for each setting of a request that changes nothing of its video.

    They are no errors: a service may send one negative prompt with all that it asks for.
    num_experts: of the model.
    """
    lines = []
    if request.guidance_scale_2 is not None and num_experts == 1:
        lines.append("guidance_scale_2 is not read: this checkpoint has one expert")
    if resolved.resample > 1 and not resolved.clips:
        lines.append("resample is not read: there are no clips that the rest could agree with")
    if resolved.camera is not None and resolved.camera.left_over:
        lines.append(
            f"the last {resolved.camera.left_over} of the camera's poses are not read: the video "
            f"has {resolved.num_frames} frames"
        )
    scales = (resolved.guidance_scale, resolved.guidance_scale_2)[:num_experts]
    steps = resolved.steps_taken
    guided = any(
        replace(resolved.guidance, scale=scale).needs_unconditional(step, steps)
        for scale in scales
        for step in range(steps)
    )
    if not guided:
        lines += [f"{name} is not read: {_why(resolved, scales)}" for name in _of_guidance(request)]
    return lines


def _of_guidance(request: VideoRequest) -> list[str]:
    """The settings of guidance that a request gives, but for its scale."""
    names = []
    if request.negative_prompt is not None and request.negative_prompt.strip():
        names.append("negative_prompt")
    rule = request.guidance
    if rule is not None and not rule.zero_init_steps:  # these act on unguided steps too
        plain = replace(rule, scale=None, start=0.0, stop=1.0)
        if plain != type(rule)() or (rule.start, rule.stop) != (0.0, 1.0):
            names.append("guidance")
    return names


def _why(resolved: ResolvedRequest, scales: tuple[float, ...]) -> str:
    largest = max(scales)
    if largest <= 1:
        return f"guidance is off at scale {largest:g}"
    rule = resolved.guidance
    return (
        f"guidance from {rule.start:g} to {rule.stop:g} covers none of {resolved.steps_taken} steps"
    )
