"""The engine's version."""

from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version


def version() -> str:
    """The installed version, or that of the source tree that is run without installing it."""
    try:
        return installed_version("sora_engine")
    except PackageNotFoundError:
        return "0.2.0"
