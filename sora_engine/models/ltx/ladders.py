"""The ladders of LTX-Video's distilled models, as the authors' configurations list them."""

from __future__ import annotations

from collections.abc import Mapping

from sora_engine.request.ladders import Ladder

LTX_LADDERS: Mapping[str, Ladder] = {
    "ltxv-7": Ladder(
        (1.0, 0.9937, 0.9875, 0.9812, 0.975, 0.9094, 0.725),
        "euler",
        r"ltx.*distilled",
        "LTX-Video's distilled 2B and 13B (0.9.7 and later), first pass",
    ),
    "ltxv-refine-3": Ladder(
        (0.9094, 0.725, 0.4219),
        "euler",
        r"ltx.*distilled.*second[-_ ]?pass",
        "the same models' second pass, over a video that was made larger",
    ),
}
