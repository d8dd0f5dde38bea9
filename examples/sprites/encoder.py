"""A word-level `T5Tokenizer` and a tiny UMT5, for a world whose captions come from a grammar."""

from __future__ import annotations

import string
from collections.abc import Iterable

import torch
from torch import Tensor
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

TEXT_DIM = 128


def word_tokenizer(words: Iterable[str]) -> T5Tokenizer:
    """Each of these words, as it is and with a capital, is one token; other words are spelled
    letter by letter."""
    words = set(words)
    words |= {word.capitalize() for word in words}
    letters = string.ascii_lowercase + string.ascii_uppercase + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [(f"▁{word}", -1.0) for word in sorted(words)]
    pieces += [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def new_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=TEXT_DIM,
        d_kv=32,
        d_ff=256,
        num_layers=3,
        num_heads=4,
        dropout_rate=0.0,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
    )
    torch.manual_seed(1)
    return UMT5EncoderModel(config)


def encode(model: UMT5EncoderModel, tokenizer: T5Tokenizer, captions: list[str]) -> list[Tensor]:
    """Embeddings `[n, TEXT_DIM]`, one for each caption, without padding. Differentiable."""
    unique = sorted(set(captions))
    rows = tokenizer(unique, padding=True, return_tensors="pt").to(model.device)
    states = model(input_ids=rows.input_ids, attention_mask=rows.attention_mask).last_hidden_state
    lengths = rows.attention_mask.sum(dim=1).tolist()
    done = {text: states[i, : lengths[i]] for i, text in enumerate(unique)}
    return [done[text] for text in captions]
