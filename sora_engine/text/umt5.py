"""UMT5, the text encoder of Wan, through transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights
from sora_engine.text.prompt import clean_prompt
from sora_engine.text.sentencepiece import SentencePieceModel
from sora_engine.text.settings import read_settings
from sora_engine.text.umt5_file import embedded_tokenizer, open_umt5, settings_of
from sora_kernels.transfer import to_device

MAX_TOKENS = 512
"""Where Wan's pipelines truncate a prompt."""
TOKENIZER_CLASSES = ("T5Tokenizer", "T5TokenizerFast")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
UNK_ID = 2
"""What T5's vocabularies have for an unknown piece, after padding and the end mark."""

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
    """Turns prompts into the embeddings that a Wan transformer reads.

    `model` is transformers' `UMT5EncoderModel`, `tokenizer` its `T5Tokenizer`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_tokens: int = MAX_TOKENS):
        self.model: Any = model
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
        words: Any = None
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
        ids = self.tokenizer(clean_prompt(prompt), truncation=False, verbose=False).input_ids
        return len(ids) if whole else min(len(ids), self.max_tokens)

    def ids(self, prompt: str) -> tuple[int, ...]:
        """The tokens of a prompt that are encoded, its end mark the last."""
        text = clean_prompt(prompt)
        return tuple(self.tokenizer(text, truncation=True, max_length=self.max_tokens).input_ids)

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
                done[ids] = self.model(input_ids=batch).last_hidden_state[0]
        return [done[ids] for ids in each]


def load_umt5(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """transformers' `UMT5EncoderModel` with the weights of a folder or a file, in evaluation
    mode."""
    values = None
    if not path.is_file():
        values = read_settings(
            path / "config.json",
            "UMT5EncoderModel",
            _DEFAULTS,
            choices={"feed_forward_proj": _ACTIVATIONS},
            known=_KNOWN,
        )
    from transformers import UMT5Config, UMT5EncoderModel  # seconds to import

    opened = open_umt5(path) if values is None else open_weights(find_weights(path, "model"))
    with opened as weights:
        if values is None:
            values = settings_of(weights)
        with torch.device("meta"):
            model = UMT5EncoderModel(UMT5Config(**values, dropout_rate=0.0))
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


def load_tokenizer(folder: Path) -> Any:
    """transformers' `T5Tokenizer` from the files of `folder`; no code of the folder's own runs.

    `tokenizer.json`, or `spiece.model` where that is all there is; `tokenizer_config.json` may be
    missing beside either. Raises CheckpointError.
    """
    path = folder / "tokenizer_config.json"
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    # T5's hundred sentinels stand in no prompt, and a file that lacks them may fill the encoder.
    config = {"extra_ids": 0} if present and not path.exists() else read_json_object(path)
    if "auto_map" in config:
        raise CheckpointError("auto_map asks for code of the folder's own", path=path)
    name = config.get("tokenizer_class", TOKENIZER_CLASSES[0])
    if name not in TOKENIZER_CLASSES:
        raise CheckpointError(
            f"tokenizer_class is {name!r}; supported: {', '.join(TOKENIZER_CLASSES)}", path=path
        )
    if not present:
        raise CheckpointError(f"no {' and no '.join(TOKENIZER_FILES)}", path=folder)
    from transformers import T5Tokenizer

    try:
        if present[0] == "spiece.model":
            path = folder / present[0]
            return tokenizer_of(SentencePieceModel.read(path), config, path)
        read_json_object(folder / present[0])
        options = {} if path.exists() else config
        return T5Tokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, **options
        )
    except CheckpointError:
        raise
    except Exception as error:  # the library raises what it likes for files that it cannot use
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"not a T5 tokenizer: {reason}", path=folder) from error


def tokenizer_of(model: SentencePieceModel, config: Mapping[str, Any], path: Path) -> Any:
    """transformers' `T5Tokenizer` of a SentencePiece model, for which it would itself want two more
    libraries. config: of `tokenizer_config.json`. path: for errors. Raises CheckpointError."""
    from transformers import T5Tokenizer

    if model.unk_id != UNK_ID:
        raise CheckpointError(
            f"the unknown piece has the id {model.unk_id}; T5's has {UNK_ID}", path=path
        )
    extra = [f"<extra_id_{i}>" for i in reversed(range(int(config.get("extra_ids", 100))))]
    names = ("eos_token", "unk_token", "pad_token")
    tokens = {key: _content(config[key]) for key in names if config.get(key) is not None}
    return T5Tokenizer(
        vocab=[*model.pieces, *((token, 0.0) for token in extra)],
        _spm_precompiled_charsmap=model.charsmap,
        extra_ids=len(extra),
        additional_special_tokens=extra or None,
        **tokens,
    )


def _content(token: Any) -> str:
    """A special token, which configurations write as a text or as an object around one."""
    return str(token["content"] if isinstance(token, Mapping) else token)
