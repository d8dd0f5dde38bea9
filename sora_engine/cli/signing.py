"""What is done to a result beside writing it: a signature, and a mark in its pixels."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sora_engine.cli.app import UsageError, say
from sora_engine.errors import CredentialsError, MediaError

if TYPE_CHECKING:
    from sora_engine.io.credentials import Credentials
    from sora_engine.io.watermark import Watermark


def credentials_of(sign: bool, sign_cert: str | None, sign_key: str | None) -> Credentials | None:
    """What --sign, --sign-cert and --sign-key name; None where none of them is given.

    UsageError for a certificate that cannot sign today.
    """
    from sora_engine.io.certificates import CERTIFICATE, KEY, default_folder
    from sora_engine.io.credentials import Credentials

    if (sign_cert is None) != (sign_key is None):
        given, lacking = "--sign-cert", "--sign-key"
        if sign_cert is None:
            given, lacking = lacking, given
        raise UsageError(f"{given}: it needs {lacking} beside it")
    try:
        if sign_cert is not None and sign_key is not None:
            return Credentials.read(sign_cert, sign_key)
        if not sign:
            return None
        folder = default_folder()
        if not (folder / CERTIFICATE).exists():
            raise UsageError(
                f"--sign: there is no certificate in {folder}; `sora certificate` makes one, and "
                "--sign-cert and --sign-key name others"
            )
        return Credentials.read(folder / CERTIFICATE, folder / KEY)
    except CredentialsError as error:
        raise UsageError(f"{'--sign' if sign_cert is None else '--sign-cert'}: {error}") from error


def check_watermark(mode: str) -> None:
    """UsageError for what is no mode of --watermark."""
    from sora_engine.io.watermark import wanted

    try:
        wanted(mode, 0, False)
    except MediaError as error:
        raise UsageError(f"--watermark: {error}") from error


def watermark_of(mode: str, height: int, signed: bool) -> Watermark | None:
    """The mark of a result of so many rows, which is told of; None where it has none."""
    from sora_engine.io.watermark import Watermark, wanted

    if not wanted(mode, height, signed):
        return None
    say("its pixels will carry a watermark (--watermark off leaves them as the model made them)")
    return Watermark()
