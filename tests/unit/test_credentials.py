"""Content Credentials: what c2pa's own reader makes of results that the engine signed."""

from __future__ import annotations

import datetime
import json
import os
import socket
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import CredentialsError, MediaError
from sora_engine.io import certificates
from sora_engine.io.certificates import CERTIFICATE, KEY, ROOT, make_certificates, read_signing
from sora_engine.io.credentials import Credentials, Source, file_source
from sora_engine.io.provenance import Provenance, read_provenance
from sora_engine.io.verification import verify
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import VideoWriter, write_video
from sora_engine.request import VideoRequest, recipe
from sora_engine.request.request import Clip, Footage
from sora_engine.request.sources import sources_in, sources_of

c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")

MADE = Provenance(
    prompt="a secret wish",
    seed=7,
    model="sprites",
    version="0",
    settings={"model_hash": "abc123", "height": 48, "width": 64, "negative_prompt": "hush"},
)
CREATED = {
    "action": "c2pa.created",
    "digitalSourceType": "http://cv.iptc.org/newscodes/digitalsourcetype/digitalCapture",
}
FRAMES = np.random.default_rng(0).integers(0, 255, (5, 48, 64, 3), dtype=np.uint8)
KINDS = ("mp4", "png", "webp", "gif")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("certificates"), "Jane Doe")


@pytest.fixture(scope="module")
def credentials(authority: Path) -> Credentials:
    return Credentials.read(authority / CERTIFICATE, authority / KEY)


def by_c2pa(path: Path, root: Path | None = None) -> tuple[str, dict[str, Any]]:
    """What c2pa-python's reader says: its verdict, and all that it read."""
    settings: dict[str, Any] = {"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}}
    if root is not None:
        settings["trust"] = {"trust_anchors": root.read_text()}
    context = c2pa.Context(c2pa.Settings.from_dict(settings))
    with path.open("rb") as file, c2pa.Reader(None, file, context=context) as reader:
        return str(reader.get_validation_state()), json.loads(reader.json())


def write(path: Path, credentials: Credentials | None = None, **options: Any) -> Path:
    frames = FRAMES[:1] if path.suffix == ".png" else FRAMES
    return write_video(path, frames, 8, provenance=MADE, credentials=credentials, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_file_validates_and_keeps_its_frames(
    kind: str, tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    plain = write(tmp_path / f"plain.{kind}")
    signed = write(tmp_path / f"signed.{kind}", credentials)
    state, report = by_c2pa(signed, authority / ROOT)
    assert state == "Trusted"
    assert by_c2pa(signed)[0] == "Valid"  # by anyone, for who does not know our root
    active = report["manifests"][report["active_manifest"]]
    assert active["signature_info"]["common_name"] == "Jane Doe"
    assert active["claim_generator_info"][0]["name"] == "sora_engine"
    (actions,) = (a["data"]["actions"] for a in active["assertions"] if "actions" in a["label"])
    assert [a["action"] for a in actions] == ["c2pa.created"]
    assert actions[0]["digitalSourceType"] == (
        "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    )
    assert "thumbnail" not in active
    assert "secret" not in json.dumps(report)
    assert "hush" not in json.dumps(report)
    np.testing.assert_array_equal(read_video(signed)[0], read_video(plain)[0])
    assert read_provenance(signed) == MADE
    assert sorted(p.name for p in tmp_path.iterdir()) == [plain.name, signed.name]
    verdict = verify(signed, [authority / ROOT])
    assert (verdict.state, verdict.signer, verdict.problems) == ("trusted", "Jane Doe", ())
    assert verdict.generation["weights"] == "abc123"
    assert verdict.generation["seed"] == 7
    assert verify(signed).state == "unknown"
    assert verify(plain).state == "absent"


def test_a_jpg_is_signed_as_well(tmp_path: Path, authority: Path, credentials: Credentials) -> None:
    plain, signed = tmp_path / "a.jpg", tmp_path / "b.jpg"
    Image.fromarray(FRAMES[0]).save(plain)
    credentials.sign(plain, signed, title="b.jpg")
    assert by_c2pa(signed, authority / ROOT)[0] == "Trusted"
    np.testing.assert_array_equal(np.asarray(Image.open(signed)), np.asarray(Image.open(plain)))


def test_every_picture_of_a_folder_is_signed(
    tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    folder = write(tmp_path / "folder", credentials)
    pictures = sorted(folder.iterdir())
    assert len(pictures) == len(FRAMES)
    for picture, frame in zip(pictures, FRAMES, strict=True):
        assert by_c2pa(picture, authority / ROOT)[0] == "Trusted"
        np.testing.assert_array_equal(np.asarray(Image.open(picture)), frame)


@pytest.mark.parametrize("kind", KINDS)
def test_one_changed_byte_is_found_wherever_it_is(
    kind: str, tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    """A byte of the pixels, of their container, or of our comment: all that was there unsigned."""
    plain = write(tmp_path / f"plain.{kind}").read_bytes()
    signed = write(tmp_path / f"signed.{kind}", credentials)
    whole, spoiled = signed.read_bytes(), tmp_path / f"spoiled.{kind}"
    text = whole.index(b"a secret wish")
    picked = np.random.default_rng(1).integers(64, len(plain) - 24, 12)
    found = [whole.find(plain[place : place + 24]) for place in picked]
    places = [place for place in found if place > 0]  # less the sizes that signing changes
    assert len(places) >= 8
    for place in [text, *places]:
        changed = bytearray(whole)
        changed[place] ^= 1
        spoiled.write_bytes(changed)
        verdict = verify(spoiled, [authority / ROOT])
        assert verdict.state == "invalid", f"byte {place} of {len(whole)}"
    changed = bytearray(whole)
    changed[text] ^= 1
    spoiled.write_bytes(changed)
    verdict = verify(spoiled, [authority / ROOT])
    assert verdict.altered
    assert any(".mismatch" in problem for problem in verdict.problems)
    assert by_c2pa(spoiled, authority / ROOT)[0] == "Invalid"


def test_an_extension_of_a_signed_clip_shows_both_manifests(
    tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    first = write(tmp_path / "first.mp4", credentials)
    sources = (file_source(first),)
    second = write(tmp_path / "second.mp4", credentials, sources=sources)
    state, report = by_c2pa(second, authority / ROOT)
    assert state == "Trusted"
    assert len(report["manifests"]) == 2
    active = report["manifests"][report["active_manifest"]]
    (ingredient,) = active["ingredients"]
    assert ingredient["title"] == "first.mp4"
    assert ingredient["relationship"] == "componentOf"
    assert ingredient["active_manifest"] in report["manifests"]
    (actions,) = (a["data"]["actions"] for a in active["assertions"] if "actions" in a["label"])
    assert [a["action"] for a in actions] == ["c2pa.created", "c2pa.placed"]
    assert actions[0]["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    verdict = verify(second, [authority / ROOT])
    assert verdict.manifests == 2
    assert [(i.title, i.signer) for i in verdict.ingredients] == [("first.mp4", "Jane Doe")]


def test_an_altered_clip_is_told_of_by_what_is_made_of_it(
    tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    first = write(tmp_path / "first.mp4", credentials)
    spoiled = first.read_bytes().replace(b"a secret wish", b"a secret fish")
    first.write_bytes(spoiled)
    second = write(tmp_path / "second.mp4", credentials, sources=(file_source(first),))
    verdict = verify(second, [authority / ROOT])
    assert any("bmffHash.mismatch" in p for p in verdict.ingredients[0].problems)


def test_what_cannot_be_an_ingredient_is_noted_by_its_hash(
    tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    odd = tmp_path / "clip.mkv"
    odd.write_bytes(b"\x1aE\xdf\xa3 a Matroska file, by its first bytes")
    given = (file_source(odd), Source(None, "ff" * 32, "input"))
    result = write(tmp_path / "a.mp4", credentials, sources=given)
    verdict = verify(result, [authority / ROOT])
    assert verdict.state == "trusted"
    assert verdict.source_type == "compositeWithTrainedAlgorithmicMedia"
    assert verdict.ingredients == ()
    assert verdict.generation["sources"] == [
        {"sha256": given[0].sha256, "role": "placed"},
        {"sha256": "ff" * 32, "role": "input"},
    ]


def test_sources_are_a_requests_clips_and_the_clip_that_it_makes_anew(tmp_path: Path) -> None:
    clip, picture = write(tmp_path / "clip.mp4"), write(tmp_path / "picture.png")
    request: Any = VideoRequest(
        "x",
        clips=(Clip(Footage(clip, 1, 3), at=0), Clip(picture, at=4), Clip(FRAMES, at=9)),
        init=str(clip),
    )
    found = sources_of(request)
    assert [(s.path, s.role) for s in found] == [
        (clip, "placed"),
        (picture, "placed"),
        (None, "placed"),
        (clip, "input"),
    ]
    assert len({s.sha256 for s in found}) == 3
    told = [recipe._clip_to_json(c) for c in request.clips], recipe._frames_to_json(request.init)
    made = replace(MADE, settings={"clips": told[0], "init": told[1]})
    assert [(s.sha256, s.role) for s in sources_in(made)] == [(s.sha256, s.role) for s in found]


def test_a_signing_that_fails_leaves_no_file(tmp_path: Path, credentials: Credentials) -> None:
    (tmp_path / "old.mp4").write_bytes(b"what was there")
    missing = Source(tmp_path / "gone.mp4", "00" * 32)
    with pytest.raises(MediaError, match="gone"):
        write(tmp_path / "old.mp4", credentials, sources=(missing,))
    spoiled = Credentials(replace_key(credentials))
    with pytest.raises(CredentialsError, match=r"old\.mp4 cannot be signed"):
        write(tmp_path / "old.mp4", spoiled)
    assert (tmp_path / "old.mp4").read_bytes() == b"what was there"
    assert len(list(tmp_path.iterdir())) == 1


def replace_key(credentials: Credentials) -> Any:
    return credentials._signing._replace(key=b"no key")


def issue(folder: Path, *, years: float = 1, authority: bool = False, emails: bool = True) -> None:
    """A certificate of our own making, as an organisation's might be, in the folder."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    root = certificates._issue(key.public_key(), "Root", None, key)
    made = root if authority else certificates._issue(key.public_key(), "X", root, key, years=years)
    if not emails:
        from cryptography import x509
        from cryptography.hazmat.primitives.hashes import SHA256

        now = datetime.datetime.now(datetime.UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(made.subject)
            .issuer_name(root.subject)
            .public_key(key.public_key())
            .serial_number(1)
            .not_valid_before(now)
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(key, SHA256())
        )
    (folder / CERTIFICATE).write_bytes(made.public_bytes(serialization.Encoding.PEM))
    certificates._write_secret(folder / KEY, key)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"years": -0.001}, r"sign\.pem expired on \d{4}-"),
        ({"authority": True}, "is an authority's"),
        ({"emails": False}, "emailProtection"),
    ],
)
def test_a_certificate_that_may_not_sign_is_refused_at_the_start(
    options: dict[str, Any], why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "_SKEW", datetime.timedelta(days=2))
    issue(tmp_path, **options)
    with pytest.raises(CredentialsError, match=why):
        Credentials.read(tmp_path / CERTIFICATE, tmp_path / KEY)


def test_what_is_no_certificate_or_key_is_refused_by_name(tmp_path: Path, authority: Path) -> None:
    text = tmp_path / "text"
    text.write_text("hello")
    certificate, key = authority / CERTIFICATE, authority / KEY
    for given, why in (
        ((tmp_path / "none", key), "certificate .*none cannot be read"),
        ((certificate, tmp_path / "none"), "key .*none cannot be read"),
        ((text, key), "text is no PEM text of certificates"),
        ((certificate, text), "text is no PEM text of a private key"),
        ((certificate, authority / "root.key"), r"root\.key is not that of the certificate"),
    ):
        with pytest.raises(CredentialsError, match=why):
            read_signing(*given)


def test_an_organisations_own_certificate_signs(tmp_path: Path) -> None:
    issue(tmp_path)
    own = Credentials.read(tmp_path / CERTIFICATE, tmp_path / KEY)
    assert own.name == "X"
    signed = write(tmp_path / "a.png", own)
    assert by_c2pa(signed)[0] == "Valid"


def test_a_second_certificate_has_the_same_authority(tmp_path: Path) -> None:
    make_certificates(tmp_path, "One")
    root, key = (tmp_path / ROOT).read_bytes(), (tmp_path / KEY).read_bytes()
    old = write(tmp_path / "old.png", Credentials.read(tmp_path / CERTIFICATE, tmp_path / KEY))
    make_certificates(tmp_path, "Two")
    assert (tmp_path / ROOT).read_bytes() == root
    assert (tmp_path / KEY).read_bytes() != key
    assert verify(old, [tmp_path / ROOT]).signer == "One"
    new = write(tmp_path / "new.png", Credentials.read(tmp_path / CERTIFICATE, tmp_path / KEY))
    assert by_c2pa(new, tmp_path / ROOT)[0] == "Trusted"
    for name in (KEY, "root.key"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    (tmp_path / "root.key").unlink()
    with pytest.raises(CredentialsError, match=r"without root\.key"):
        make_certificates(tmp_path, "Three")


_ALONE = """
import socket, sys
from pathlib import Path
def none(*_, **__): raise OSError("the network was used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = none
from sora_engine.io.credentials import Credentials, file_source
from sora_engine.io.verification import verify
from sora_engine.io.video_writer import write_video
import numpy as np
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
credentials = Credentials.read(folder / "sign.pem", folder / "sign.key")
frames = np.zeros((3, 32, 32, 3), np.uint8)
write_video(out / "a.mp4", frames, 8, credentials=credentials)
write_video(out / "b.mp4", frames, 8, credentials=credentials, sources=[file_source(out / "a.mp4")])
print(verify(out / "b.mp4", [folder / "root.pem"]).state)
"""


def without_network() -> list[str]:
    """A command that runs another one without any network, where this system has that."""
    for command in (["unshare", "-n"], ["unshare", "-rn"]):
        try:
            if subprocess.run([*command, "true"], capture_output=True).returncode == 0:
                return command
        except OSError:
            break
    return []


def test_no_network_is_used(tmp_path: Path, authority: Path) -> None:
    """In a process without any, and Python's sockets refuse besides."""
    command = [*without_network(), sys.executable, "-c", _ALONE, str(authority), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.split() == ["trusted"], done.stderr


def test_a_statement_that_is_said_to_be_elsewhere_is_not_fetched(
    tmp_path: Path, credentials: Credentials
) -> None:
    """Else whoever gives a clip would choose what a server asks for."""
    (tmp_path / "plain.png").write_bytes(write(tmp_path / "a.png").read_bytes())
    bait = tmp_path / "bait.png"
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        signing = credentials._signing
        info = c2pa.C2paSignerInfo(signing.algorithm, signing.chain, signing.key, None)
        builder = c2pa.Builder(
            {
                "claim_generator_info": [{"name": "bait", "version": "1"}],
                "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [CREATED]}}],
            }
        )
        builder.set_no_embed()
        builder.set_remote_url(f"http://127.0.0.1:{server.getsockname()[1]}/manifest")
        with (tmp_path / "plain.png").open("rb") as source, bait.open("x+b") as target:
            builder.sign(c2pa.Signer.from_info(info), "image/png", source, target)
        assert b"127.0.0.1" in bait.read_bytes()
        assert verify(bait).state in ("absent", "invalid")
        result = write(tmp_path / "b.png", credentials, sources=(file_source(bait),))
        assert verify(result).state == "unknown"
        with pytest.raises(TimeoutError):
            server.accept()


def test_other_files_are_refused_by_name(tmp_path: Path, authority: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(MediaError, match=r"a\.txt cannot carry Content Credentials"):
        verify(tmp_path / "a.txt")
    with pytest.raises(MediaError, match="is a folder"):
        verify(tmp_path)
    with pytest.raises(MediaError, match="cannot be read"):
        verify(tmp_path / "none.mp4")
    with pytest.raises(CredentialsError, match="no PEM text of certificates"):
        verify(write(tmp_path / "a.png"), [tmp_path / "a.txt"])


def test_frames_are_written_as_they_come_and_signed_at_the_end(
    tmp_path: Path, authority: Path, credentials: Credentials
) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 8, credentials=credentials) as writer:
        for frame in FRAMES:
            writer.write(frame)
            assert not path.exists()
    verdict = verify(path, [authority / ROOT])
    assert verdict.state == "trusted"
    assert replace(verdict, path=path) == verdict
