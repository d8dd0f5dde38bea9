"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# A first call that imports or compiles something is no slowness of the case that it meets.
settings.register_profile("default", deadline=None, print_blob=True)
settings.load_profile("default")
