"""What the keys of an adapter's file say: which module each is about, and which part it has there.

Every tool has its own keys. A key is taken apart from both ends: prefixes that name the model
(`diffusion_model.`, `lora_unet_`), a suffix that names the part (`.lora_down.weight`), and the
module's name between them. Underscores for its dots are left to the family, which knows its modules
(`models.family.Family.own_name`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "unet.",
    "dit.",
    "pipe.dit.",
    "lora_unet__",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)
"""What stands before a module's name: of PEFT, ComfyUI, diffusers, DiffSynth, VideoX-Fun, kohya and
musubi-tuner, LyCORIS. Some files have two of them."""

LAYOUTS = {
    "lora_unet__": "VideoX-Fun",
    "lora_unet_": "kohya and musubi-tuner",
    "lycoris_": "LyCORIS",
    "base_model.model.": "PEFT",
    "diffusion_model.": "ComfyUI",
    "transformer.": "diffusers",
}
"""By prefix whose layout it is, for people; the first that fits."""

SECOND = "transformer_2."
"""diffusers' prefix of the expert for low noise, in a file with both."""

TEXT_ENCODERS = (
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "text_encoder.",
    "text_encoder_2.",
    "text_encoders.",
    "cond_stage_model.",
    "conditioner.",
)

_NAMED = r"(?:\.[A-Za-z0-9_-]+)?"
"""PEFT has the adapter's name there, most often `default`."""
_PARTS: tuple[tuple[str, str], ...] = (
    (rf"\.lora_(?:A|down){_NAMED}\.weight", "down"),
    (rf"\.lora_(?:B|up){_NAMED}\.weight", "up"),
    (r"(?:\.processor)?(?:[._]lora|\.lora_linear_layer)\.down\.weight", "down"),
    (r"(?:\.processor)?(?:[._]lora|\.lora_linear_layer)\.up\.weight", "up"),
    (r"\.lora_mid\.weight", "mid"),
    (rf"\.lora_B{_NAMED}\.bias", "up_bias"),
    (r"\.(?:alpha|lora_alpha)", "alpha"),
    (r"\.dora_scale", "magnitude"),
    (rf"\.lora_magnitude_vector{_NAMED}{_NAMED}", "magnitude"),
    (rf"\.(lokr_(?:w[12](?:_[ab])?|t2)){_NAMED}", ""),
    (rf"\.(hada_(?:w[12]_[ab]|t[12])){_NAMED}", ""),
    (r"\.diff", "diff"),
    (r"\.w_norm", "diff"),
    (r"\.diff_b", "bias_diff"),
    (r"\.b_norm", "bias_diff"),
    (r"\.diff_m", "modulation_diff"),
    (r"\.set_weight", "set"),
    (r"\.reshape_weight", "reshape"),
)
"""Suffixes, and the part that each names; an empty one is as its first group has it."""
_PATTERNS = tuple((re.compile(rf"^(.+?){suffix}$"), part) for suffix, part in _PARTS)

_ELSE = {
    r"\.(oft_(blocks|diag|R|r|s)|rescale)\b": "OFT",
    r"\.boft_\w+": "BOFT",
    r"\.[ab][12]\.weight$": "GLoRA",
    r"\.(ia3_\w+|on_input)\b": "IA3",
    r"\.lora_embedding_[AB]\b": "LoRA of an embedding table",
    r"\.(vera_lambda_[bd]|vera_[AB])\b": "VeRA",
    r"\.(bdiff|lora_XS|svdiff_\w+|glora_\w+)\b": "another kind of adapter",
}
"""Marks of kinds that are not read."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key, taken apart.

    prefix: what was taken off before the module's name. second: it is of the second expert alone.
    """

    name: str
    prefix: str
    module: str
    part: str
    second: bool


def parse_key(name: str) -> Key | None:
    """A key taken apart; None for one that has no part of an adapter."""
    module, prefix, second = _without_prefix(name)
    for pattern, part in _PATTERNS:
        found = pattern.match(module)
        if found is not None:
            stem = found[1]
            if ".processor." in f"{stem}.":  # diffusers' attention processors of 2023
                stem = f"{stem}.".replace(".processor.", ".").rstrip(".")
            return Key(name, prefix, stem, part or found[2], second)
    return None


def kind_not_read(name: str) -> str | None:
    """The kind of adapter that a key marks, where it is one that is not read."""
    return next((kind for mark, kind in _ELSE.items() if re.search(mark, name)), None)


def layout_of(prefix: str) -> str:
    """Whose layout a prefix marks, for people."""
    return next((whose for mark, whose in LAYOUTS.items() if mark in prefix), "bare names")


def of_text_encoder(name: str) -> bool:
    return name.removeprefix("base_model.model.").startswith(TEXT_ENCODERS)


def _without_prefix(name: str) -> tuple[str, str, bool]:
    rest, second = name, False
    while True:
        if rest.startswith(SECOND):
            rest, second = rest[len(SECOND) :], True
            continue
        prefix = next((p for p in PREFIXES if rest.startswith(p)), None)
        if prefix is None:
            return rest, name[: len(name) - len(rest)], second
        rest = rest[len(prefix) :]
