"""Content Credentials: a signed statement of how a result was made, inside its own file.

The statement is a C2PA manifest (C2PA 2.2, https://spec.c2pa.org), written by c2pa-python. It says
that a model made the pixels, which one, and what a caller gave. Nothing is fetched for it: no time
stamp, no certificate's state, no manifest that another file says is elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sora_engine.errors import CredentialsError, MediaError
from sora_engine.io.certificates import INSTALL, Signing, read_signing
from sora_engine.io.images import image_format
from sora_engine.io.provenance import SOFTWARE, Provenance
from sora_engine.version import version

GENERATION = "sora_engine.generation"
"""The label of the assertion that holds the model and the settings."""

_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE = _SOURCE_TYPES + "trainedAlgorithmicMedia"
COMPOSITE = _SOURCE_TYPES + "compositeWithTrainedAlgorithmicMedia"
_SETTINGS = (
    "height",
    "width",
    "num_frames",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "solver",
    "strength",
    "loop",
)
"""What is told of a request. Its words are not: they may say more of who asked."""

# Whether anything is fetched is set here for writing and for reading alike.
OFFLINE: dict[str, Any] = {
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False, "verify_after_sign": False},
    # A thumbnail would show what was painted over in a caller's picture.
    "builder": {"thumbnail": {"enabled": False}},
}


@dataclass(frozen=True, slots=True)
class Source:
    """A caller's clip or picture. `path` is None for what was given in memory, or as a folder.

    role: `"placed"` for frames that stand in the result, `"input"` for a clip that was made anew
    from (SDEdit). sha256: of its bytes, as hex digits.
    """

    path: Path | None
    sha256: str
    role: Literal["placed", "input"] = "placed"


class Credentials:
    """A certificate and its key, which sign results."""

    def __init__(self, signing: Signing) -> None:
        _c2pa()
        self._signing = signing

    @classmethod
    def read(cls, certificate: str | Path, key: str | Path) -> Credentials:
        """From PEM files, as `certificates.read_signing` checks them.

        Raises CredentialsError, also where c2pa-python is not installed.
        """
        return cls(read_signing(certificate, key))

    @property
    def name(self) -> str:
        """Whom the certificate names."""
        return self._signing.name

    def sign(
        self,
        unsigned: Path,
        signed: Path,
        *,
        title: str,
        provenance: Provenance | None = None,
        sources: Sequence[Source] = (),
        watermark: str | None = None,
    ) -> None:
        """Writes a signed copy of a file to `signed`, which must not be there yet.

        unsigned: .mp4, .png, .webp, .gif or .jpg, by its first bytes; its frames stay bit for bit.
        title: what the file will be called. sources: what a caller gave. watermark: its payload,
        where the pixels carry one. Raises CredentialsError, and leaves no file then.
        """
        c2pa = _c2pa()
        kind = media_type(unsigned)
        if kind is None:
            raise CredentialsError(f"{title}: only mp4, png, webp, gif and jpg files are signed")
        manifest, files = _manifest(title, kind, provenance, sources, watermark)
        signing = self._signing
        try:
            context = c2pa.Context(c2pa.Settings.from_dict(OFFLINE))
            signer = c2pa.Signer.from_info(
                c2pa.C2paSignerInfo(signing.algorithm, signing.chain, signing.key, None)
            )
            builder = c2pa.Builder(manifest, context=context)
            for record, path, ingredient_kind in files:
                with path.open("rb") as file:
                    builder.add_ingredient(record, ingredient_kind, file)
            with unsigned.open("rb") as source, signed.open("x+b") as target:
                builder.sign(signer, kind, source, target)
        except (c2pa.C2paError, OSError) as error:
            signed.unlink(missing_ok=True)  # c2pa leaves one of a signing that failed
            raise CredentialsError(f"{title} cannot be signed: {error}") from error


def media_type(path: Path) -> str | None:
    """`video/mp4` and the like, of what can carry Content Credentials; None for other files."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error
    kind = image_format(head)
    if kind is not None:
        return f"image/{kind.lower()}"
    if head[4:8] == b"ftyp":
        return "video/quicktime" if head[8:12] == b"qt  " else "video/mp4"
    return None


def file_source(path: Path, role: Literal["placed", "input"] = "placed") -> Source:
    """A caller's file, with its hash. Raises MediaError."""
    try:
        with path.open("rb") as file:
            return Source(path, hashlib.file_digest(file, "sha256").hexdigest(), role)
    except OSError as error:
        raise MediaError(f"{path} cannot be read: {error.strerror}") from error


def _manifest(
    title: str,
    kind: str,
    provenance: Provenance | None,
    sources: Sequence[Source],
    watermark: str | None,
) -> tuple[dict[str, Any], list[tuple[dict[str, Any], Path, str]]]:
    """The manifest's definition, and the ingredients to be added to it."""
    agent = {"name": SOFTWARE, "version": version()}
    sources = list({(s.sha256, s.role): s for s in sources}.values())
    ids: dict[str, list[str]] = {"placed": [], "input": []}
    ingredients = []
    for source in sources:
        of = None if source.path is None else media_type(source.path)
        if source.path is None or of is None:
            continue  # its hash is in the assertion
        name = f"sha256:{source.sha256}:{source.role}"
        ids[source.role].append(name)
        record = {
            "title": source.path.name,
            "relationship": "componentOf" if source.role == "placed" else "inputTo",
            "instance_id": name,
            "label": name,
        }
        ingredients.append((record, source.path, of))
    created: dict[str, Any] = {
        "action": "c2pa.created",
        "digitalSourceType": COMPOSITE if sources else MADE,
        "softwareAgent": agent,
    }
    actions = [created]
    if ids["input"]:
        created["parameters"] = {"ingredientIds": ids["input"]}
    if ids["placed"]:
        actions.append({"action": "c2pa.placed", "parameters": {"ingredientIds": ids["placed"]}})
    told: dict[str, Any] = {}
    if provenance is not None:
        settings = provenance.settings
        told = {"model": provenance.model, "weights": settings.get("model_hash")}
        told["seed"] = provenance.seed
        told |= {name: settings[name] for name in _SETTINGS if name in settings}
        loras = settings.get("loras", ())
        told |= {"loras": [record.get("sha256") for record in loras]} if loras else {}
    if sources:
        told["sources"] = [{"sha256": s.sha256, "role": s.role} for s in sources]
    if watermark is not None:
        told["watermark"] = watermark
        actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": agent})
    definition = {
        "claim_generator_info": [agent],
        "title": title,
        "format": kind,
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": actions}},
            {"label": GENERATION, "data": told},
        ],
    }
    return definition, ingredients


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError as error:
        raise CredentialsError(f"Content Credentials need c2pa-python: {INSTALL}") from error
    return c2pa
