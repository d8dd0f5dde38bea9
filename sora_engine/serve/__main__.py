"""`python -m sora_engine.serve` prints the OpenAPI document: docs/openapi.json."""

from __future__ import annotations

import json

from sora_engine.serve.app import make_app


def document() -> str:
    """The document as it is kept."""

    def no_engine() -> None:
        raise AssertionError("a document needs none")

    made = make_app(no_engine).openapi()  # type: ignore[arg-type]
    made["info"]["version"] = "1"  # that of the paths under /v1, and not of the package
    return json.dumps(made, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    print(document(), end="")
