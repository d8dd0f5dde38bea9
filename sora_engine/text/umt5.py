"""UMT5, the text encoder of Wan."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from sora_engine.errors import CheckpointError
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights
from sora_engine.text.prompt import clean_prompt
from sora_engine.text.settings import read_settings
from sora_engine.text.t5_layers import T5Layers, T5Shape
from sora_engine.text.t5_tokenizer import T5Tokenizer, load_tokenizer, tokenizer_of
from sora_engine.text.umt5_file import embedded_tokenizer, open_umt5, settings_of
from sora_kernels.transfer import to_device

MAX_TOKENS = 512
"""Where Wan's pipelines truncate a prompt."""

_DEFAULTS: dict[str, Any] = {
    "vocab_size": 250112,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "gated-gelu",
}
# Of the decoder, which Wan has no use for, or following from the keys above.
_KNOWN = (
    "classifier_dropout",
    "decoder_start_token_id",
    "dense_act_fn",
    "eos_token_id",
    "is_decoder",
    "is_encoder_decoder",
    "is_gated_act",
    "num_decoder_layers",
    "output_past",
    "pad_token_id",
    "scalable_attention",
    "tie_word_embeddings",
    "tokenizer_class",
    "use_cache",
)
_ACTIVATIONS = ("gated-gelu", "relu")


class UMT5Encoder:
    """Turns prompts into the embeddings that a Wan transformer reads."""

    def __init__(self, model: T5Layers, tokenizer: T5Tokenizer, *, max_tokens: int = MAX_TOKENS):
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._device: torch.device | None = None

    @classmethod
    def from_folders(
        cls,
        text_encoder: str | Path,
        tokenizer: str | Path | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        max_tokens: int = MAX_TOKENS,
    ) -> UMT5Encoder:
        """Load `text_encoder/` and `tokenizer/` of a diffusers folder from the disk alone.

        Either may be a single file; one of the encoder may bring its tokenizer.

        Raises `CheckpointError` for whatever is missing, unknown or does not fit.
        """
        words: T5Tokenizer | None = None
        if tokenizer is not None:
            words = load_tokenizer(Path(tokenizer))
        elif Path(text_encoder).is_file():
            pieces = embedded_tokenizer(Path(text_encoder))
            if pieces is not None:
                words = tokenizer_of(pieces, {"extra_ids": 0}, Path(text_encoder))
        if words is None:
            raise CheckpointError(
                "a T5 encoder needs a tokenizer, and this one brings none; give the tokenizer/ of "
                "a diffusers folder as components={'tokenizer': ...}, or take "
                "umt5_xxl_fp8_e4m3fn_scaled.safetensors, which has it in it",
                path=text_encoder,
            )
        encoder = cls(
            load_umt5(Path(text_encoder), device=device, dtype=dtype), words, max_tokens=max_tokens
        )
        known = encoder.model.config.vocab_size
        if len(words) > known:
            raise CheckpointError(
                f"the tokenizer has {len(words)} tokens, the text encoder {known}", path=tokenizer
            )
        return encoder

    @property
    def text_dim(self) -> int:
        """Channels of an embedding."""
        return int(self.model.config.d_model)

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights lie, unless another device was set, to which they
        come when they are needed (see `models.offload`)."""
        return self._device or next(self.model.parameters()).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    def to(self, device: torch.device | str) -> UMT5Encoder:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def count(self, prompt: str, *, whole: bool = False) -> int:
        """Tokens of a prompt, as `encode` cuts it, or of the whole of it; its end mark counts."""
        return len(self.tokenizer.ids(clean_prompt(prompt), None if whole else self.max_tokens))

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that are encoded, its end mark the last."""
        return tuple(self.tokenizer.ids(clean_prompt(prompt), self.max_tokens))

    def activation_bytes(self, num_tokens: int) -> int:
        """The most that one text holds beside the weights: queries to values, scores and their
        bias, and the two branches of a gated feed-forward; or what finds the bias, with seven
        integers for each pair of tokens, which are the most where heads are few."""
        config = self.model.config
        inner = config.num_heads * config.d_kv
        scores = 3 * config.num_heads * num_tokens * num_tokens
        attention = num_tokens * (3 * config.d_model + 4 * inner) + scores
        forward = num_tokens * (3 * config.d_model + 3 * config.d_ff)
        places = 7 * 8 * num_tokens * num_tokens
        return max(int(max(attention, forward) * self.model.dtype.itemsize), places)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[torch.Tensor]:
        """An embedding `[tokens, text_dim]` for each prompt, in the encoder's dtype, on its device.

        A prompt is cleaned, cut to `max_tokens` (its end mark kept) and encoded at its own length.
        diffusers pads to 512 and masks: the same numbers, since T5 knows only relative positions,
        at many times the work. A prompt that comes twice is encoded once.
        """
        each = [self.ids(prompt) for prompt in prompts]
        done: dict[tuple[int, ...], torch.Tensor] = {}
        for ids in each:
            if ids not in done:
                batch = to_device(torch.tensor([ids]), self.device)
                done[ids] = self.model(input_ids=batch)[0]
        return [done[ids] for ids in each]


def load_umt5(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> T5Layers:
    """The layers with the weights of a folder or a file, in evaluation mode."""
    values = None
    if not path.is_file():
        values = read_settings(
            path / "config.json",
            "UMT5EncoderModel",
            _DEFAULTS,
            choices={"feed_forward_proj": _ACTIVATIONS},
            known=_KNOWN,
        )
    opened = open_umt5(path) if values is None else open_weights(find_weights(path, "model"))
    with opened as weights:
        if values is None:
            values = settings_of(weights)
        with torch.device("meta"):
            model = T5Layers(T5Shape(**values, bias_in_each_layer=True))
        load_into(
            model,
            weights,
            device=device,
            dtype=dtype,
            # transformers keeps these in float32 for float16 alone, whose range they leave.
            keep_fp32=("wo",) if dtype == torch.float16 else (),
            tied={"encoder.embed_tokens.weight": "shared.weight"},
        )
    return model.eval()
