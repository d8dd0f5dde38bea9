"""Prompt upsampling: a language model rewrites a short prompt into the detailed caption that video
models are trained on (DALL-E 3, Betker et al. 2023, section 3.4; Sora's report, "Language
understanding"). Off unless asked for; the result keeps both texts.
"""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

from sora_engine.errors import CheckpointError, UpsamplingError
from sora_engine.request.request import VideoRequest

INSTRUCTION = (
    "Rewrite the user's prompt as one detailed caption of a short video. Keep every subject, "
    "number, colour, motion and place that it names, and contradict none. Add what it leaves open: "
    "how the subject looks, the setting, the light, the camera and how things move. Write plain "
    "present-tense English, at most 120 words, in one paragraph. Answer with the caption alone."
)
MAX_ANSWER_BYTES = 1 << 20


class PromptUpsampler(Protocol):
    """Whatever rewrites a prompt. Raises UpsamplingError where it cannot."""

    def expand(self, prompt: str) -> str: ...


def upsample(request: VideoRequest, upsampler: PromptUpsampler) -> VideoRequest:
    """The request with its prompt rewritten, that of each shot too; the prompt as it was is kept in
    `original_prompt`."""
    shots = tuple(replace(shot, prompt=upsampler.expand(shot.prompt)) for shot in request.shots)
    prompt = " / ".join(s.prompt for s in shots) if shots else upsampler.expand(request.prompt)
    return replace(request, prompt=prompt, shots=shots, original_prompt=request.prompt)


def open_upsampler(
    where: str | PathLike[str], *, model: str | None = None, api_key: str | None = None
) -> PromptUpsampler:
    """A local model by its folder, or an endpoint by its http(s) address.

    model: its name at the address. Raises UpsamplingError for one beside a folder.
    """
    if str(where).startswith(("http://", "https://")):
        return EndpointUpsampler(str(where), model=model, api_key=api_key)
    if model is not None:
        raise UpsamplingError(
            f"model {model!r} is a name at an address, and {where} is a folder, which holds one"
        )
    return LocalUpsampler(where)


class LocalUpsampler:
    """An instruct model in a local folder, through transformers; greedy, so always the same.

    The folder's code is never run and nothing is downloaded. Raises CheckpointError for a folder
    that transformers cannot load that way.
    """

    def __init__(
        self, folder: str | PathLike[str], *, device: str = "cpu", max_new_tokens: int = 256
    ) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(folder)
        if not path.is_dir():
            raise CheckpointError(
                "no such folder; an upsampler is a folder or an address", path=path
            )
        safe = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, **safe)
            loaded = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, **safe)
        except Exception as error:  # transformers raises what its parts raise
            what = " ".join(str(error).split())[:300]
            raise CheckpointError(f"not an instruct model: {what}", path=path) from error
        self._model: Any = loaded.to(device).eval()
        self._max_new_tokens = max_new_tokens

    def expand(self, prompt: str) -> str:
        import torch

        messages = [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": prompt},
        ]
        if self._tokenizer.chat_template is not None:
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True
            )
            tokens = self._tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            text = f"{INSTRUCTION}\n\nPrompt: {prompt}\nCaption:"
            tokens = self._tokenizer(text, return_tensors="pt")
        ids = tokens["input_ids"].to(self._model.device)
        with torch.inference_mode():
            answer = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        return _clean(
            self._tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True),
            "the model",
        )


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A key goes to the address that it was given for, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


class EndpointUpsampler:
    """Any OpenAI-compatible endpoint: `POST {url}/chat/completions`.

    url: with its path, such as `http://localhost:8000/v1`. model: the name it serves the model by.
    api_key: sent as a bearer token, if given.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UpsamplingError(f"{url!r} is no http or https address")
        self._url = url.rstrip("/") + "/chat/completions"
        self._model, self._key, self._timeout_s = model, api_key, timeout_s
        # No proxies from the environment either: what is asked for by address goes there.
        self._opener = urllib.request.build_opener(_NoRedirects, urllib.request.ProxyHandler({}))

    def expand(self, prompt: str) -> str:
        asked: dict[str, Any] = {
            "messages": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": prompt},
            ],
            "temperature": 0,
            "max_tokens": 300,
        }
        if self._model is not None:
            asked["model"] = self._model
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        request = urllib.request.Request(
            self._url, data=json.dumps(asked).encode(), headers=headers, method="POST"
        )
        try:
            with self._opener.open(request, timeout=self._timeout_s) as answer:
                body = answer.read(MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            raise UpsamplingError(f"{self._url} answered {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UpsamplingError(f"{self._url} cannot be asked: {reason}") from error
        if len(body) > MAX_ANSWER_BYTES:
            raise UpsamplingError(f"{self._url} answered more than {MAX_ANSWER_BYTES} bytes")
        try:
            content = json.loads(body)["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise UpsamplingError(
                f"{self._url} did not answer as an OpenAI chat completion does"
            ) from error
        return _clean(content, self._url)


def _clean(answer: object, source: str) -> str:
    """One paragraph, without the quotation marks that models like to put round it."""
    text = " ".join(answer.split()) if isinstance(answer, str) else ""
    if len(text) > 1 and text[0] == text[-1] == '"':
        text = text[1:-1].strip()
    if not text:
        raise UpsamplingError(f"{source} answered with no text")
    return text
