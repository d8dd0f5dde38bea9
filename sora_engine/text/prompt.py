"""The cleaning that Wan's prompts go through before the tokenizer."""

from __future__ import annotations

import html


def clean_prompt(prompt: str) -> str:
    """`prompt` with mis-decoded text repaired, HTML entities resolved (twice, since some texts are
    escaped twice) and every run of white space made one space. As diffusers' `prompt_clean`."""
    import ftfy  # a table of encodings, needed with the first prompt and not before

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())
