"""Two hooks that look at prompts before anything is made: a word list, and a classifier over HTTP.

    PYTHONPATH=examples/serving SORA_WORDS=words.txt sora serve --hooks moderation:words
    PYTHONPATH=examples/serving SORA_CLASSIFIER=http://127.0.0.1:9000/v1/moderations \\
        sora serve --hooks moderation:classifier

A refusal is a 400 with the code `refused`; its message is all that the client sees. Neither hook
logs a prompt. Both are examples: what is to be refused is the operator's to say.
"""

from __future__ import annotations

import functools
import os
import re
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import httpx

from sora_engine import Hooks
from sora_engine.errors import RefusedError
from sora_engine.serve.failures import ApiError

TIMEOUT_S = 5.0
KNOWN = 4096
"""Texts whose verdict is kept: a job is looked at as it is accepted and once more as it begins."""


def words() -> Hooks:
    """Refuses prompts with a word or a phrase of the file that SORA_WORDS names: one a line, in any
    case; lines that begin with # are notes."""
    path = Path(os.environ["SORA_WORDS"])
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    listed = [plain(line) for line in lines if line and not line.startswith("#")]
    if not listed:
        raise ValueError(f"{path} lists no words")
    # Whole words alone: "ass" is not in "class".
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, listed))})(?!\w)")

    def check(text: str) -> None:
        if pattern.search(plain(text)):
            raise RefusedError("the prompt has a word that this server does not take")

    return Hooks(check_request=over_texts(check))


def classifier() -> Hooks:
    """Asks the service that SORA_CLASSIFIER names about each prompt, in the shape of OpenAI's
    moderations: `{"input": text}`, and back `{"results": [{"flagged": true, "categories": {}}]}`.
    SORA_CLASSIFIER_KEY is sent to it, where there is one.

    Where it does not answer nothing is let through: the client has a 503, and may ask again.
    """
    url, key = os.environ["SORA_CLASSIFIER"], os.environ.get("SORA_CLASSIFIER_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    http = httpx.Client(timeout=TIMEOUT_S, headers=headers)

    @functools.lru_cache(KNOWN)
    def reasons(text: str) -> tuple[str, ...] | None:
        """What a text is refused for; None where it is not."""
        try:
            answer = http.post(url, json={"input": text})
            answer.raise_for_status()
            told = answer.json()["results"][0]
            flagged, categories = bool(told["flagged"]), told.get("categories", {})
        except (httpx.HTTPError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ApiError(
                503,
                "moderation_unavailable",
                "prompts cannot be checked now; ask again in a moment",
                headers={"Retry-After": "5"},
            ) from error
        return tuple(sorted(name for name in categories if categories[name])) if flagged else None

    def check(text: str) -> None:
        found = reasons(text)
        if found is not None:
            raise RefusedError(f"the prompt is refused: {', '.join(found) or 'flagged'}")

    return Hooks(check_request=over_texts(check))


def over_texts(check: Callable[[str], None]) -> Callable[[Any], None]:
    """A hook that calls `check` with each text of a request."""

    def check_request(request: Any) -> None:
        for text in texts_of(request):
            check(text)

    return check_request


def texts_of(request: Any) -> Iterable[str]:
    """What a request says that its video is to show: its prompt, or that of each shot."""
    return [text for text in dict.fromkeys((request.prompt, *request.prompts)) if text]


def plain(text: str) -> str:
    """A text without case, and with its look-alike forms of letters (full width, ligatures) and its
    runs of spaces made one."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
