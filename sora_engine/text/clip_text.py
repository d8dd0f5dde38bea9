"""CLIP's text encoder (arXiv 2103.00020) through transformers: the last layer's state of every
token, padding among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights
from sora_engine.text.settings import read_settings
from sora_kernels.transfer import to_device

CLASS_NAME = "CLIPTextModel"
TOKENIZER_CLASSES = ("CLIPTokenizer", "CLIPTokenizerFast")
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
_KNOWN = ("bos_token_id", "eos_token_id", "pad_token_id", "projection_dim")
_PREFIX = "text_model."
"""That files of transformers before its version 5 have."""


class CLIPTextEncoder:
    """Turns prompts into embeddings of `max_tokens` tokens each.

    `model` is transformers' `CLIPTextModel`, `tokenizer` its `CLIPTokenizer`.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device, max_tokens: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.device, self.max_tokens = device, max_tokens

    @classmethod
    def from_folders(
        cls,
        text_encoder: Path,
        tokenizer: Path | None,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_tokens: int,
    ) -> CLIPTextEncoder:
        """Load both folders, from the disk alone. Raises CheckpointError."""
        if tokenizer is None:
            raise CheckpointError("a CLIP text encoder needs a tokenizer", path=text_encoder)
        words, model = _tokenizer(tokenizer), _load(text_encoder, device, dtype)
        most = model.config.max_position_embeddings
        if max_tokens > most:
            raise CheckpointError(
                f"the text encoder has {most} positions, and the transformer reads {max_tokens}",
                path=text_encoder,
            )
        return cls(model, words, torch.device(device), max_tokens)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens that are encoded, padding among them."""
        made = self.tokenizer(
            prompt, truncation=True, max_length=self.max_tokens, padding="max_length"
        )
        return tuple(made.input_ids)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """An embedding `[max_tokens, hidden_size]` for each prompt, in the encoder's dtype, on its
        device."""
        done: dict[tuple[int, ...], Tensor] = {}
        each = [self.ids(prompt) for prompt in prompts]
        for ids in each:
            if ids not in done:
                row = to_device(torch.tensor([ids]), self.device)
                done[ids] = self.model(input_ids=row).last_hidden_state[0]
        return [done[ids] for ids in each]

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, its two marks among them, as `encode` cuts it, or of the whole."""
        count = len(self.tokenizer(prompt, verbose=False).input_ids)
        return count if whole else min(count, self.max_tokens)

    def activation_bytes(self, num_tokens: int) -> int:
        """The most that one text holds beside the weights: it is encoded at its full length."""
        config, tokens = self.model.config, self.max_tokens
        scores = 3 * config.num_attention_heads * tokens * tokens
        width = 8 * config.hidden_size + 3 * config.intermediate_size
        return int((tokens * width + scores) * max(4, self.model.dtype.itemsize))


def _tokenizer(folder: Path) -> Any:
    path = folder / "tokenizer_config.json"
    config = read_json_object(path)
    if "auto_map" in config:
        raise CheckpointError("auto_map asks for code of the folder's own", path=path)
    name = config.get("tokenizer_class", TOKENIZER_CLASSES[0])
    if name not in TOKENIZER_CLASSES:
        raise CheckpointError(
            f"tokenizer_class is {name!r}; supported: {', '.join(TOKENIZER_CLASSES)}", path=path
        )
    from transformers import CLIPTokenizer  # seconds to import

    try:
        return CLIPTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises what it likes for files that it cannot use
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"not a CLIP tokenizer: {reason}", path=folder) from error


def _load(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> Any:
    """transformers' `CLIPTextModel` with the weights of a folder, in evaluation mode."""
    acts = {"hidden_act": ("quick_gelu", "gelu")}
    values = read_settings(path / "config.json", CLASS_NAME, _DEFAULTS, choices=acts, known=_KNOWN)
    from transformers import CLIPTextConfig, CLIPTextModel  # seconds to import

    with torch.device("meta"):
        model = CLIPTextModel(CLIPTextConfig(**values))
    nested = any(name.startswith(_PREFIX) for name, _ in model.named_parameters())
    with open_weights(find_weights(path, "model")) as weights:
        load_into(
            model,
            weights,
            device=device,
            dtype=dtype,
            rename=lambda name: (_PREFIX if nested else "") + name.removeprefix(_PREFIX),
            ignore=("position_ids",),
            buffers={
                name: torch.arange(buffer.shape[-1]).expand(1, -1)
                for name, buffer in model.named_buffers()
                if name.endswith("position_ids")
            },
        )
    return model.eval()
