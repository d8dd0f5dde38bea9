"""Symbolic links in a snapshot of a model hub."""

from __future__ import annotations

import os
from pathlib import Path

from sora_engine.errors import CheckpointError


def refuse_stray_link(path: Path) -> None:
    """Raise `CheckpointError` if a file of a hub's snapshot is a link that leaves its repository.

    Hubs lay a model out as `REPOSITORY/snapshots/REVISION/FILE`, a link to `REPOSITORY/blobs/HASH`
    (huggingface.co/docs/huggingface_hub, "Understand caching"). A link from there to anywhere else
    is none of the hub's. Links outside a snapshot are their owner's, and are followed.
    """
    whole = Path(os.path.abspath(path))
    for folder in whole.parents:
        if folder.name != "snapshots" or folder.parent == folder:
            continue
        repository = Path(os.path.realpath(folder.parent))
        real = Path(os.path.realpath(whole))
        if not real.is_relative_to(repository):
            raise CheckpointError(
                f"a link to {real}, outside the repository of its snapshot; a link into "
                f"{repository / 'blobs'} would work",
                path=path,
            )
        return
