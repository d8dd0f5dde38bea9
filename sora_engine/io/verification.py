"""What a file's Content Credentials say: who signed it, whether it was altered, what made it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sora_engine.errors import CredentialsError, MediaError
from sora_engine.io.credentials import GENERATION, OFFLINE, _c2pa, media_type

State = Literal["trusted", "unknown", "invalid", "absent"]

_ALTERED = ("mismatch", "assertion.missing", "claim.missing", "dataHash", "bmffHash")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ingredient:
    """What a result was made from. `signer` is None for a file that had no credentials."""

    title: str
    relationship: str
    signer: str | None
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What was found in one file.

    state: `"trusted"`: unaltered since it was signed, by one whom the caller trusts; `"unknown"`:
        unaltered, by anyone; `"invalid"`: altered, or signed with what may not sign; `"absent"`:
        there are no credentials.
    problems: C2PA's codes for what is wrong, with its words.
    signer: the name in the certificate, which is worth what its issuer is.
    generation: the model, the seed and the settings that a result of the engine tells.
    manifests: how many there are, those of ingredients and of their ingredients included.
    """

    path: Path
    state: State
    problems: tuple[str, ...] = ()
    signer: str | None = None
    issuer: str | None = None
    software: str | None = None
    source_type: str | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    ingredients: tuple[Ingredient, ...] = ()
    manifests: int = 0

    @property
    def altered(self) -> bool:
        """Whether bytes were changed after signing."""
        return any(mark in problem for problem in self.problems for mark in _ALTERED)


def verify(path: str | Path, trust: Iterable[str | Path] = ()) -> Verdict:
    """Reads and checks a file's Content Credentials, without any network.

    trust: PEM files of certificate authorities whose signers are trusted.
    Raises MediaError for a file that cannot be read or is of another kind, CredentialsError for an
    authority's file that is none or where c2pa-python is not installed.
    """
    path = Path(path)
    c2pa = _c2pa()
    if path.is_dir():
        raise MediaError(f"{path} is a folder; name one of its files")
    kind = media_type(path)
    if kind is None:
        raise MediaError(
            f"{path} cannot carry Content Credentials that are read here; mp4, mov, png, webp, "
            "gif, jpg, avif and heic files can"
        )
    anchors = _anchors(trust)
    settings = {**OFFLINE, "trust": {"trust_anchors": anchors}} if anchors else OFFLINE
    context = c2pa.Context(c2pa.Settings.from_dict(settings))
    try:
        with path.open("rb") as file, c2pa.Reader(kind, file, context=context) as reader:
            report, state = json.loads(reader.json()), str(reader.get_validation_state())
    except c2pa.C2paError.ManifestNotFound:
        return Verdict(path=path, state="absent")
    except c2pa.C2paError as error:
        return Verdict(path=path, state="invalid", problems=(f"cannot be read: {error}",))
    return _verdict(path, report, state)


def _verdict(path: Path, report: dict[str, Any], found: str) -> Verdict:
    active = report["manifests"][report["active_manifest"]]
    results = report.get("validation_results", {})
    state: State = {"Trusted": "trusted", "Valid": "unknown"}.get(found, "invalid")  # type: ignore[assignment]
    problems = tuple(_problems(results.get("activeManifest", {})))
    deltas = {
        delta["ingredientAssertionURI"].rsplit("/", 1)[-1]: tuple(
            _problems(delta.get("validationDeltas", {}))
        )
        for delta in results.get("ingredientDeltas", ())
    }
    created = next(iter(_actions(active)), {})
    agent: Any = created.get("softwareAgent") or next(
        iter(active.get("claim_generator_info", ())), {}
    )
    if isinstance(agent, str):
        agent = {"name": agent}
    signature = active.get("signature_info", {})
    return Verdict(
        path=path,
        state=state,
        problems=problems + tuple(p for found in deltas.values() for p in found),
        signer=signature.get("common_name"),
        issuer=signature.get("issuer"),
        software=" ".join(str(agent[key]) for key in ("name", "version") if key in agent) or None,
        source_type=str(created.get("digitalSourceType", "")).rsplit("/", 1)[-1] or None,
        generation=next(
            (a["data"] for a in active.get("assertions", ()) if a["label"] == GENERATION), {}
        ),
        ingredients=tuple(
            Ingredient(
                title=str(one.get("title", "")),
                relationship=str(one.get("relationship", "")),
                signer=_signer(report, one.get("active_manifest")),
                problems=deltas.get(str(one.get("label")), ())
                + tuple(_problems(one.get("validation_results", {}).get("activeManifest", {}))),
            )
            for one in active.get("ingredients", ())
        ),
        manifests=len(report["manifests"]),
    )


def _actions(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for assertion in manifest.get("assertions", ()):
        if assertion["label"].startswith("c2pa.actions"):
            yield from assertion["data"]["actions"]


def _problems(results: dict[str, Any]) -> Iterator[str]:
    """What failed, but for a signer whom nobody vouches for: that is a state of its own."""
    for failure in results.get("failure", ()):
        if failure["code"] != "signingCredential.untrusted":
            yield f"{failure['code']} ({failure.get('explanation', '')})"


def _signer(report: dict[str, Any], label: str | None) -> str | None:
    manifest = report["manifests"].get(label)
    return None if manifest is None else manifest.get("signature_info", {}).get("common_name")


def _anchors(paths: Iterable[str | Path]) -> str:
    texts = []
    for path in paths:
        try:
            text = Path(path).read_text(encoding="ascii")
        except OSError as error:
            raise CredentialsError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError:
            text = ""
        if "BEGIN CERTIFICATE" not in text:
            raise CredentialsError(f"{path} is no PEM text of certificates")
        texts.append(text)
    return "\n".join(texts)
