"""What clients are told of a job: its row, and where it is right now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sora_engine.serve.replies import Failure, Video
from sora_engine.serve.store import ACTIVE

if TYPE_CHECKING:
    from fastapi import Request

    from sora_engine.serve.desk import Desk
    from sora_engine.serve.live import Live
    from sora_engine.serve.store import Row

_STATUS = {"completed": "completed", "failed": "failed", "cancelled": "failed"}


def video_for(request: Request, desk: Desk, row: Row) -> Video:
    """The answer about a job to who asks: with whole addresses, as clients follow them."""
    return video_of(desk, row, str(request.base_url).rstrip("/"))


def video_of(desk: Desk, row: Row, base: str = "") -> Video:
    """The answer about a job. base: how the client reaches this server."""
    live = desk.live(row.id)
    if live is None and row.state in ACTIVE:  # it has ended since its row was read
        row = desk.store.get(row.id) or row
    facts = row.facts
    progress = _progress(row, live)
    status = _STATUS.get(row.state)
    if status is None:
        status = "queued" if progress["stage"] == "queued" else "in_progress"
    keep_s = desk.settings.keep_s
    done = row.state == "completed" and row.completed is not None
    error = facts.get("error")
    return Video(
        id=row.id,
        model=facts["model"],
        status=status,  # type: ignore[arg-type]
        created_at=int(row.created),
        completed_at=int(row.completed or 0) if done else None,
        expires_at=int((row.completed or 0) + keep_s) if done else None,
        prompt=facts.get("prompt"),
        size=facts["size"],
        seconds=facts["seconds"],
        task=_task(row.body),  # type: ignore[arg-type]
        remixed_from_video_id=facts.get("remixed_from"),
        error=None if error is None else Failure(**error),
        quality="standard",
        num_frames=facts["num_frames"],
        fps=facts["fps"],
        seed=facts["seed"],
        queue_position=desk.position(row.id) if status == "queued" else None,
        draft=bool(row.body["fields"].get("draft")),
        priority=facts.get("priority") or 0,
        inference_time_s=facts.get("inference_time_s"),
        stage_durations=facts.get("stage_durations", {}),
        peak_memory_mb=_promised(row, live),
        url=f"{base}/v1/videos/{row.id}/content" if done else None,
        receipt=facts.get("receipt"),
        **progress,
    )


def _task(stored: dict[str, Any]) -> str:
    """By the name that its command has."""
    task, fields = stored["task"], stored["fields"]
    if task == "edit":
        return "inpaint" if "mask" in fields else "fill" if "missing" in fields else "edit"
    return "loop" if task == "create" and fields.get("loop") else str(task)


def _progress(row: Row, live: Live | None) -> dict[str, Any]:
    """How far it is, by work that is finished; never more than was finished."""
    facts = row.facts
    frames = facts["num_frames"]
    told = {
        "progress": 0,
        "stage": row.state,
        "steps_done": 0,
        "num_steps": facts["num_steps"],
        "frames_decoded": 0,
        "eta_s": None,
    }
    if row.state == "completed":
        steps = facts["num_steps"]
        return {**told, "progress": 100, "steps_done": steps, "frames_decoded": frames}
    if row.state not in ("queued", "running"):
        return told
    if live is None:
        return {**told, "stage": "queued" if row.state == "queued" else "writing"}
    told["stage"] = live.stage
    if live.job is None:
        return told
    now = live.job.progress
    # Decoding counts as a tenth.
    part = 0.9 * now.steps_done / max(1, now.num_steps) + 0.1 * now.frames_decoded / frames
    return {
        **told,
        "progress": min(99, int(100 * part)),
        "steps_done": now.steps_done,
        "num_steps": now.num_steps,
        "frames_decoded": now.frames_decoded,
        "eta_s": now.eta_s,
    }


def _promised(row: Row, live: Live | None) -> float | None:
    receipt = row.facts.get("receipt")
    if receipt is not None:
        promised = receipt.get("promised_bytes")
    else:
        plan = None if live is None or live.job is None else live.job.plan
        promised = None if plan is None else plan.peak
    return None if promised is None else round(promised / (1 << 20), 3)


def poll_after_ms(video: Video) -> int:
    """When it is worth asking again."""
    if video.status == "queued":
        return 1000
    return 500 if video.eta_s is None else int(max(100.0, min(5000.0, video.eta_s * 250)))
