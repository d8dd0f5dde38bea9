"""Tiny files of a model's parts under each of their namings, and what goes into them."""

from __future__ import annotations

import io
import json
import re

import gguf
import sentencepiece
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from sora_engine.vae.wan_checkpoint import original_names
from sora_engine.vae.wan_config import WanVAEConfig
from tests.unit.test_checkpoint import original_name

TEXTS = [
    "a red circle moves left", "A  RED\tcircle.",
    "红色的圆向左移动，很快。", "ＲＥＤ　ｃｉｒｃｌｅ！",
    "naïve café: 3½ ﬁne…", "🙂 ok", "",
]  # fmt: skip


def make_spiece():
    """A SentencePiece model as T5's are, with its map to NFKC."""
    content = io.BytesIO()
    lines = [text for text in TEXTS if text] * 20 + [chr(c) * 3 for c in range(97, 123)] * 3
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, vocab_size=120, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return content.getvalue()


def umt5_tensors(folder):
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    return {k: v for k, v in tensors.items() if k != "encoder.embed_tokens.weight"}


WANS_UMT5 = [
    (r"^shared", "token_embedding"),
    (r"^encoder\.final_layer_norm", "norm"),
    (r"^encoder\.block", "blocks"),
    (r"layer\.0\.layer_norm", "norm1"),
    (r"layer\.1\.layer_norm", "norm2"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "pos_embedding.embedding"),
    (r"layer\.0\.SelfAttention", "attn"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn.gate.0"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn.fc1"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn.fc2"),
]


def wans_umt5_name(name):
    for pattern, replacement in WANS_UMT5:
        name = re.sub(pattern, replacement, name)
    return name


def with_tokenizer(tensors, spiece):
    return {**tensors, "spiece_model": torch.tensor(list(spiece), dtype=torch.uint8)}


LLAMAS_UMT5 = [
    (r"^shared", "token_embd"),
    (r"^encoder\.final_layer_norm", "enc.output_norm"),
    (r"^encoder\.block", "enc.blk"),
    (r"layer\.0\.layer_norm", "attn_norm"),
    (r"layer\.1\.layer_norm", "ffn_norm"),
    (r"layer\.0\.SelfAttention\.relative_attention_bias", "attn_rel_b"),
    (r"layer\.0\.SelfAttention\.", "attn_"),
    (r"layer\.1\.DenseReluDense\.wi_0", "ffn_gate"),
    (r"layer\.1\.DenseReluDense\.wi_1", "ffn_up"),
    (r"layer\.1\.DenseReluDense\.wo", "ffn_down"),
]


def llamas_umt5_name(name):
    for pattern, replacement in LLAMAS_UMT5:
        name = re.sub(pattern, replacement, name)
    return name


def write_umt5_gguf(path, tensors, spiece, unused=3, **changes):
    """As llama.cpp's converter writes a T5 encoder. changes: of what the metadata says of the
    tokenizer, by its last part; None leaves one out."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(spiece)
    pieces = [(p.piece, p.score, p.type) for p in proto.pieces]
    pieces += [(f"[PAD{len(pieces) + i}]", -10000.0, 5) for i in range(unused)]
    told = {
        "model": "t5",
        "tokens": [text for text, _, _ in pieces],
        "scores": [score for _, score, _ in pieces],
        "token_type": [kind for _, _, kind in pieces],
        "precompiled_charsmap": proto.normalizer_spec.precompiled_charsmap,
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "unknown_token_id": 2,
        **changes,
    }
    writer = gguf.GGUFWriter(path, arch="t5encoder")
    for name, value in told.items():
        key = f"tokenizer.ggml.{name}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    values = {}
    for name, tensor in tensors.items():
        # Q8_0 has blocks of 32: d_ff is 37 here, so wo is not one of them.
        rows = tensor.ndim == 2 and tensor.shape[1] % 32 == 0
        form = gguf.GGMLQuantizationType["Q8_0" if rows else "F32"]
        data = gguf.quants.quantize(tensor.float().numpy(), form)
        writer.add_tensor(llamas_umt5_name(name), data, raw_dtype=form)
        values[name] = torch.from_numpy(gguf.quants.dequantize(data, form)).reshape(tensor.shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def vae_tensors(folder):
    config = WanVAEConfig.from_dict(json.loads((folder / "vae" / "config.json").read_text()))
    names = original_names(config)
    stored = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    return {names[name]: value for name, value in stored.items()}


def transformer_tensors(folder):
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    return {original_name(name): value for name, value in stored.items()}
