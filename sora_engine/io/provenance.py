"""How a video was made, as one small JSON text inside the file itself.

| container | where the text lies |
|---|---|
| .mp4 | the `comment` tag |
| .png, and each PNG of a folder | a text chunk named `Comment` |
| .gif | the comment extension |
| .webp | EXIF `ImageDescription` |

The text is ASCII (other characters are escaped): GIF comments and EXIF strings hold no more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from sora_engine.errors import MediaError
from sora_engine.io.images import EXIF_IMAGE_DESCRIPTION, open_image

SOFTWARE = "sora_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What made a video. `settings` holds plain JSON values (size, steps, guidance, solver...)."""

    prompt: str
    seed: int | None = None
    model: str = ""
    version: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One line of ASCII JSON; a value that JSON cannot hold raises ValueError or TypeError."""
        # Not `asdict`, whose deep copies take longer than all else here.
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        return json.dumps({"software": SOFTWARE, **plain}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Provenance | None:
        """Reads `to_json` back; None for a text that some other program wrote."""
        try:
            found = json.loads(text)
        except ValueError:
            return None
        if not isinstance(found, dict) or found.get("software") != SOFTWARE:
            return None
        seed, settings = found.get("seed"), found.get("settings")
        return cls(
            prompt=str(found.get("prompt", "")),
            seed=seed if isinstance(seed, int) else None,
            model=str(found.get("model", "")),
            version=str(found.get("version", "")),
            settings=settings if isinstance(settings, dict) else {},
        )


def read_provenance(path: str | Path) -> Provenance | None:
    """The provenance that a video, an image or a folder of PNGs carries; None where there is none.

    Raises MediaError for a file that cannot be read.
    """
    path = Path(path)
    if path.is_dir():
        pngs = sorted(path.glob("*.png"))
        if not pngs:
            raise MediaError(f"{path} holds no PNG files")
        path = pngs[0]
    image = open_image(path)
    if image is not None:
        with image:
            # Pillow drops a GIF's comment from `info` once the image has moved to another frame.
            text = image.info.get("Comment") or image.info.get("comment")
            text = text or image.getexif().get(EXIF_IMAGE_DESCRIPTION) or ""
    else:
        from sora_engine.io.video_reader import open_video

        with open_video(path) as container:
            text = container.metadata.get("comment", "")
    if isinstance(text, bytes):
        text = text.decode("utf-8", "replace")
    return Provenance.from_json(text)
