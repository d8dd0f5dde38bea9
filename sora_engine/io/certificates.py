"""X.509 certificates that sign results: one's own, or of a certificate authority on this machine.

A certificate that C2PA takes says `digitalSignature` of its key and `emailProtection` of its use
(C2PA 2.2, section 14.5.1; c2pa-python refuses those for documents alone). The authority made here
is trusted by nobody but who is given its `root.pem`.
"""

from __future__ import annotations

import datetime
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sora_engine.errors import CredentialsError
from sora_engine.io.atomic import write_atomically
from sora_engine.io.cache import config_folder

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes

INSTALL = 'pip install "sora_engine[provenance]"'
ROOT, ROOT_KEY, CERTIFICATE, KEY = "root.pem", "root.key", "sign.pem", "sign.key"

# A signature without a time stamp is checked against the certificate's dates on the day of the
# check, and time stamps come from the network: what expires takes its results along.
_YEARS = 10
_SKEW = datetime.timedelta(minutes=5)
"""By how much clocks of other machines may be behind."""


class Signing(NamedTuple):
    """What signs: a certificate with those that vouch for it, and its key.

    chain: PEM, the signer's first. key: PEM (PKCS 8), not encrypted. algorithm: C2PA's name for it.
    name: whom the certificate names.
    """

    chain: bytes
    key: bytes
    algorithm: bytes
    name: str


def default_folder() -> Path:
    """Where certificates of this user lie: `$XDG_CONFIG_HOME/sora_engine/credentials`.

    Raises CredentialsError for a user without a home.
    """
    folder = config_folder("credentials")
    if folder is None:
        raise CredentialsError(
            "this user has no folder for settings; XDG_CONFIG_HOME, or a folder named in the "
            "command, would work"
        )
    return folder


def read_signing(certificate: str | Path, key: str | Path) -> Signing:
    """A certificate's chain and its key, checked: that they belong together, and may sign today.

    Raises CredentialsError, which names the file and what would work.
    """
    x509, serialization, _ = _cryptography()
    chain, secret = _read(certificate, "certificate"), _read(key, "key")
    try:
        certificates = x509.load_pem_x509_certificates(chain)
    except ValueError as error:
        raise CredentialsError(
            f"the certificate {certificate} is no PEM text of certificates, the signer's first"
        ) from error
    leaf = certificates[0]
    try:
        private = serialization.load_pem_private_key(secret, None)
    except TypeError as error:
        raise CredentialsError(
            f"the key {key} is encrypted; `openssl pkcs8 -topk8 -nocrypt` writes one that is not"
        ) from error
    except Exception as error:  # ValueError, or UnsupportedAlgorithm
        raise CredentialsError(f"the key {key} is no PEM text of a private key") from error
    if private.public_key() != leaf.public_key():
        raise CredentialsError(f"the key {key} is not that of the certificate {certificate}")
    _check_dates(certificate, leaf)
    _check_uses(certificate, leaf)
    plain = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    ordered = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in certificates)
    return Signing(ordered, plain, _algorithm(key, private), _name(leaf))


def make_certificates(folder: str | Path, name: str) -> Path:
    """Writes a certificate for `name`, and the authority that vouches for it. Returns the folder.

    The authority is kept from call to call (`root.pem`, and `root.key` to sign anew), so that who
    trusts it once trusts later certificates. `sign.pem` and `sign.key` are replaced. Keys are on
    the curve P-256, and readable by their owner alone. Raises CredentialsError.
    """
    x509, serialization, ec = _cryptography()
    if not name.strip() or len(name) > 64:
        raise CredentialsError(f"a certificate's name has 1 to 64 characters, got {name!r}")
    folder = Path(folder)
    root, root_key = folder / ROOT, folder / ROOT_KEY
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if root.exists() != root_key.exists():
            there, lacking = (root, root_key) if root.exists() else (root_key, root)
            raise CredentialsError(
                f"{there} is there without {lacking.name}; put it back, or name another folder"
            )
        if not root.exists():
            secret = ec.generate_private_key(ec.SECP256R1())
            made = _issue(secret.public_key(), "sora_engine root of this machine", None, secret)
            _write_secret(root_key, secret)
            write_atomically(root, made.public_bytes(serialization.Encoding.PEM))
        authority = x509.load_pem_x509_certificate(root.read_bytes())
        issuer = serialization.load_pem_private_key(root_key.read_bytes(), None)
        _check_dates(root, authority)
        secret = ec.generate_private_key(ec.SECP256R1())
        leaf = _issue(secret.public_key(), name, authority, issuer)
        _write_secret(folder / KEY, secret)
        chain = b"".join(c.public_bytes(serialization.Encoding.PEM) for c in (leaf, authority))
        write_atomically(folder / CERTIFICATE, chain)
    except OSError as error:
        raise CredentialsError(f"{folder} cannot be written: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, CredentialsError):
            raise
        raise CredentialsError(
            f"{root} and {root_key.name} are no certificate and its key; name another folder"
        ) from error
    return folder


def _issue(
    public: object,
    name: str,
    authority: x509.Certificate | None,
    key: PrivateKeyTypes,
    *,
    years: float = _YEARS,
) -> x509.Certificate:
    """A certificate for a key; without an authority, one that is an authority itself."""
    x509, _, _ = _cryptography()
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now = datetime.datetime.now(datetime.UTC)
    is_root = authority is None
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, name),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    until = now + datetime.timedelta(days=365.25 * years)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if authority is None else authority.subject)
        .public_key(public)  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(until if authority is None else min(until, authority.not_valid_after_utc))
        .add_extension(x509.BasicConstraints(is_root, 0 if is_root else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not is_root, key_cert_sign=is_root, crl_sign=is_root, **usage
            ),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)  # type: ignore[arg-type]
    )
    if authority is not None:
        builder = builder.add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
        ).add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()),  # type: ignore[arg-type]
            critical=False,
        )
    return builder.sign(key, SHA256())  # type: ignore[arg-type]


def _check_dates(path: str | Path, certificate: x509.Certificate) -> None:
    now = datetime.datetime.now(datetime.UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > end:
        raise CredentialsError(
            f"the certificate {path} expired on {end:%Y-%m-%d}; `sora certificate` makes a new one"
        )
    if now < start:
        raise CredentialsError(f"the certificate {path} is valid from {start:%Y-%m-%d %H:%M} UTC")


def _check_uses(path: str | Path, leaf: x509.Certificate) -> None:
    x509, _, _ = _cryptography()
    from cryptography.x509.oid import ExtendedKeyUsageOID

    def value(kind: type[Any]) -> Any:
        try:
            return leaf.extensions.get_extension_for_class(kind).value
        except x509.ExtensionNotFound:
            return None

    constraints, usage, uses = map(
        value, (x509.BasicConstraints, x509.KeyUsage, x509.ExtendedKeyUsage)
    )
    if constraints is not None and constraints.ca:
        raise CredentialsError(
            f"the certificate {path} is an authority's; put the signer's own first in the file"
        )
    emails = uses is not None and ExtendedKeyUsageOID.EMAIL_PROTECTION in list(uses)
    if usage is None or not usage.digital_signature or not emails:
        raise CredentialsError(
            f"the certificate {path} may not sign for C2PA: it needs the key usage "
            "digitalSignature and the extended key usage emailProtection"
        )


def _algorithm(path: str | Path, key: PrivateKeyTypes) -> bytes:
    """C2PA 2.2, section 13.2: the signatures that it knows."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey):
        named = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}
        if key.curve.name in named:
            return named[key.curve.name]
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return b"ed25519"
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= 2048:
        return b"ps256"
    raise CredentialsError(
        f"the key {path} is of a kind that C2PA does not know; P-256, P-384, P-521, Ed25519, or "
        "RSA of 2048 bits and more would work"
    )


def _name(certificate: x509.Certificate) -> str:
    from cryptography.x509.oid import NameOID

    named = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(named[0].value) if named else certificate.subject.rfc4514_string()


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise CredentialsError(f"the {what} {path} cannot be read: {error.strerror}") from error


def _write_secret(path: Path, key: PrivateKeyTypes) -> None:
    _, serialization, _ = _cryptography()
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.unlink(missing_ok=True)
    # Made with its mode, not given it later: nobody else can open it in between.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _cryptography() -> tuple[Any, Any, Any]:
    """The parts of `cryptography` that are used here."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise CredentialsError(f"certificates need cryptography: {INSTALL}") from error
    return x509, serialization, ec
