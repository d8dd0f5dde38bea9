"""Guidance: how the conditional and the unconditional prediction become one.

Every function takes the predictions of one request, in one shape and any layout; norms and
standard deviations run over all of it, as diffusers' guiders run over all but the batch.
"""

from __future__ import annotations

from torch import Tensor

from sora_engine.request.guidance import Guidance


def cfg(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance, `uncond + scale (cond - uncond)` (arXiv 2207.12598).

    cond, uncond: one shape, any layout. Written in diffusers' order of operations.
    """
    return uncond + scale * (cond - uncond)


def rescaled(guided: Tensor, cond: Tensor, rescale: float) -> Tensor:
    """`guided` moved by `rescale` (0 to 1) towards the standard deviation of `cond`.

    Keeps high scales from burning the video (Lin et al., arXiv 2305.08891, section 3.4).
    """
    matched = guided * (cond.std() / guided.std())
    return rescale * matched + (1 - rescale) * guided


def cfg_zero_star(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """CFG whose unconditional prediction is first scaled to lie nearest to `cond`
    (CFG-Zero*, Fan et al., arXiv 2503.18886, eq. 7)."""
    c, u = cond.float(), uncond.float()
    nearest = ((c * u).sum() / ((u * u).sum() + 1e-8)).to(uncond.dtype)
    return cfg(cond, uncond * nearest, scale)


def apg(
    cond: Tensor,
    uncond: Tensor,
    scale: float,
    *,
    eta: float = 1.0,
    norm_threshold: float = 0.0,
    momentum: float = 0.0,
    running: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adaptive projected guidance (Sadat et al., arXiv 2410.02416): (prediction, running).

    eta: how much of the difference along `cond` stays (it is what saturates). norm_threshold: the
    longest the difference may be, 0 for no limit. momentum: how much of `running`, which an earlier
    step returned, is added to the difference; negative as a rule. With eta 1, no threshold and no
    momentum it is CFG.
    """
    difference = cond - uncond
    if running is not None:
        difference = difference + momentum * running
    running = difference
    if norm_threshold > 0.0:
        length = difference.double().norm().clamp(min=1e-300)
        difference = difference * (norm_threshold / length).clamp(max=1.0).to(difference.dtype)
    # In float64: along a long `cond` the two parts are a small difference of large numbers.
    wide, direction = difference.double(), cond.double()
    direction = direction / direction.norm().clamp(min=1e-12)
    along = (wide * direction).sum() * direction
    kept = (wide - along).to(difference.dtype) + eta * along.to(difference.dtype)
    return uncond + scale * kept, running


def guide(
    guidance: Guidance,
    cond: Tensor,
    uncond: Tensor | None,
    step: int,
    num_inference_steps: int,
    running: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The guided prediction of a step, and APG's running difference for the next one.

    uncond: needed where `guidance.needs_unconditional` says so, else ignored.
    """
    if step < guidance.zero_init_steps:
        return cond.new_zeros(cond.shape), running
    if not guidance.needs_unconditional(step, num_inference_steps):
        return cond, running
    scale = guidance.scale
    assert scale is not None
    if uncond is None:
        raise ValueError(f"step {step} of {num_inference_steps} is guided and has no uncond")
    if guidance.kind == "apg":
        guided, running = apg(
            cond,
            uncond,
            scale,
            eta=guidance.eta,
            norm_threshold=guidance.norm_threshold,
            momentum=guidance.momentum,
            running=running,
        )
    elif guidance.kind == "cfg_zero_star":
        guided = cfg_zero_star(cond, uncond, scale)
    else:
        guided = cfg(cond, uncond, scale)
    if guidance.rescale > 0.0:
        guided = rescaled(guided, cond, guidance.rescale)
    return guided, running
