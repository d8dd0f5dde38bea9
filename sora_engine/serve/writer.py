"""A job's results as files: the video, as its frames come, and how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora_engine.io.video_writer import VideoWriter

if TYPE_CHECKING:
    import numpy as np

    from sora_engine.io.provenance import Provenance
    from sora_engine.serve.store import Row
    from sora_engine.video import Video

VIDEO, IMAGE = "video.mp4", "image.png"


class ResultWriter:
    """Writes one job's results into a folder, a few frames at a time.

    Raises MediaError and OSError, and leaves the folder to whoever made it.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        fps: float,
        num_frames: int,
        provenance: Provenance | None,
        **options: Any,
    ) -> None:
        """options: of `VideoWriter`."""
        self._folder = folder
        name = VIDEO if kind == "video" else IMAGE
        self._video = VideoWriter(
            folder / name, fps, num_frames=num_frames, provenance=provenance, **options
        )
        self.flushed = (name,)
        """Files that are on the disk once it is closed."""
        self.count = 0
        """Frames that were written."""

    def write(self, frames: np.ndarray) -> None:
        """Adds frames, uint8 `[n, height, width, 3]`."""
        for frame in frames:
            self._video.write(frame)
            self.count += 1

    def close(self, video: Video, row: Row) -> dict[str, Any] | None:
        """Finishes the files, the receipt last, which says whose they are: other replicas read it
        (`neighbours`), and what would make it again. Returns the video's own receipt."""
        self._video.close()
        receipt = None if video.receipt is None else video.receipt.to_dict()
        told = {
            "receipt": receipt,
            "timings_s": video.timings_s,
            "seed": video.seed,
            "request": row.body,
            "owner": row.owner,
            "prompt": row.facts.get("prompt"),
        }
        (self._folder / "receipt.json").write_text(json.dumps(told), encoding="utf-8")
        return receipt

    def abort(self) -> None:
        """Lets go of the file that is under way."""
        self._video.abort()
