"""What the file of a result says of where it comes from."""

from __future__ import annotations

from pathlib import Path

from sora_engine.errors import CredentialsError
from sora_engine.io.certificates import ROOT, default_folder
from sora_engine.io.verification import verify
from sora_engine.serve.replies import Ingredient, VideoCredentials


def credentials_of(name: str, path: Path) -> VideoCredentials:
    """Of a video's file, which is read and checked. Raises FileNotFoundError."""
    if not path.exists():
        raise FileNotFoundError(path)
    try:
        found = verify(path, _authorities())
    except CredentialsError as error:  # c2pa-python is not installed
        return VideoCredentials(
            id=name, state="unread", problems=[str(error)], generation={}, ingredients=[]
        )
    return VideoCredentials(
        id=name,
        state=found.state,
        problems=list(found.problems),
        signer=found.signer,
        issuer=found.issuer,
        software=found.software,
        source_type=found.source_type,
        generation=found.generation,
        ingredients=[
            Ingredient(title=one.title, relationship=one.relationship, signer=one.signer)
            for one in found.ingredients
        ],
        manifests=found.manifests,
    )


def _authorities() -> list[Path]:
    """The one that `sora certificate` made for this user."""
    try:
        own = default_folder() / ROOT
    except CredentialsError:
        return []
    return [own] if own.exists() else []
