"""Text and image encoders against diffusers' Wan pipelines, from folders that they saved."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from sora_engine.errors import CheckpointError
from sora_engine.text import ImageEncoder
from sora_engine.text.prompt import clean_prompt
from sora_engine.text.umt5 import UMT5Encoder

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("▁a▁red", -4.0)]
PIECES += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz&.é"]
PROMPTS = [
    "a red circle moves right",
    "",
    "  white \n\t space\u00a0and &amp;amp; entities &lt;b&gt;",
    "mojibake: cafÃ© â€œquotedâ€\x9d and 円",
    "much too long " * 60,
    "a red circle moves right",
]


def sharpened(model, seed):
    """Random weights of a size at which every part of the model shows in its output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" not in name:
                scale = 2.0 if "relative_attention_bias" in name else value.shape[-1] ** -0.5
                value.copy_(torch.randn(value.shape, generator=generator) * 1.5 * scale)
    return model.eval()


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 3}
    config = UMT5Config(**sizes, num_heads=4, feed_forward_proj="gated-gelu")
    sharpened(UMT5EncoderModel(config), 0).save_pretrained(folder / "text_encoder")
    T5Tokenizer(vocab=PIECES, extra_ids=0).save_pretrained(folder / "tokenizer")
    return folder


def load(folder, **options):
    return UMT5Encoder.from_folders(folder / "text_encoder", folder / "tokenizer", **options)


def diffusers_embeds(folder, prompts, dtype=torch.float32):
    """What WanPipeline pads to 512 tokens with zeros, `[prompts, 512, text_dim]`."""
    pipeline = WanPipeline(
        tokenizer=T5Tokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=UMT5EncoderModel.from_pretrained(folder / "text_encoder", dtype=dtype).eval(),
        vae=None,
        scheduler=None,
    )
    with torch.no_grad():
        return pipeline._get_t5_prompt_embeds(prompts, max_sequence_length=512)


def padded(embeddings):
    return torch.stack(
        [torch.nn.functional.pad(e, (0, 0, 0, 512 - e.shape[0])) for e in embeddings]
    )


def error(got, expected):
    return ((got - expected).norm() / expected.norm()).item()


def test_embeddings_equal_diffusers_without_its_padding(text_folder):
    encoder = load(text_folder)
    lengths = []
    encoder.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    got = encoder.encode(PROMPTS)
    expected = diffusers_embeds(text_folder, PROMPTS)
    assert error(padded(got), expected) < 1e-6
    assert [e.shape[1] for e in got] == [encoder.text_dim] * len(PROMPTS)
    assert got[1].shape[0] == 1  # the end mark alone
    assert got[4].shape[0] == 512
    # One pass a distinct prompt, at its own length.
    assert lengths == [(1, e.shape[0]) for e in got[:5]]
    assert sum(n for _, n in lengths) < 2 * 512


def test_the_tolerance_would_see_a_mistake(text_folder):
    """Leaving out the relative positions, the cleaning or the end mark moves the embeddings."""
    expected = diffusers_embeds(text_folder, PROMPTS)
    encoder = load(text_folder)
    assert len(encoder.tokenizer.ids(PROMPTS[2])) != encoder.encode([PROMPTS[2]])[0].shape[0]
    whole = encoder.encode([PROMPTS[0]])[0]
    ids = encoder.tokenizer.ids(PROMPTS[0])[:-1]
    cut = encoder.model(input_ids=torch.tensor([ids]))[0]
    assert error(cut, whole[:-1]) > 1e-2
    for name, value in encoder.model.named_parameters():
        if "relative_attention_bias" in name:
            value.data.zero_()
    assert error(padded(encoder.encode(PROMPTS)), expected) > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_dtypes_of_transformers(text_folder, dtype):
    encoder = load(text_folder, dtype=dtype)
    theirs = UMT5EncoderModel.from_pretrained(text_folder / "text_encoder", dtype=dtype)
    ours = dict(encoder.model.named_parameters())
    for name, value in theirs.named_parameters():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].equal(value), name
    got = encoder.encode(PROMPTS[:4])
    assert got[0].dtype == dtype
    # As far from float32 as diffusers in the same dtype, and no farther.
    exact = diffusers_embeds(text_folder, PROMPTS[:4])
    theirs = diffusers_embeds(text_folder, PROMPTS[:4], dtype).float()
    assert error(padded(got).float(), exact) < 1.5 * error(theirs, exact) < 0.15


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_either_name_of_the_token_table_will_do(text_folder, tmp_path, kept):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    table = tensors.pop("shared.weight")
    names = ["shared.weight", "encoder.embed_tokens.weight"] if kept == "both" else [kept]
    save_file({**tensors, **{name: table.clone() for name in names}}, path)
    got, expected = (load(f).encode(PROMPTS[:1])[0] for f in (folder, text_folder))
    assert got.equal(expected)


# Letters of many scripts, entities, control characters, and bytes decoded as the wrong encoding.
MESS = ["&amp;", "&amp;lt;", "&#x1c;", "&nbsp;", "&#133;", "\x1c", "\x85", "\u2028", "\u200b"]
MESS += [
    "&amp;amp;amp;",
    "&amp;amp;lt;",
    "<",
    "\u3000",
    "Ã©",
    "â€™",
    "ﬁ",
    "“",
    "\r\n",
    " ",
    "x",
    "&",
]
messy = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(MESS), max_size=12).map("".join))


@given(messy)
@settings(max_examples=300, deadline=None)
def test_prompts_are_cleaned_as_diffusers_cleans_them(text):
    assert clean_prompt(text) == prompt_clean(text)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image")
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 3}
    config = CLIPVisionConfig(
        **sizes, num_attention_heads=2, image_size=28, patch_size=14, hidden_act="gelu"
    )
    sharpened(CLIPVisionModel(config), 1).save_pretrained(folder / "image_encoder")
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    processor.save_pretrained(folder / "image_processor")
    return folder


def load_image_encoder(folder, **options):
    return ImageEncoder.from_folders(
        folder / "image_encoder", folder / "image_processor", **options
    )


@pytest.mark.parametrize("size", [(28, 28), (41, 30), (33, 90), (7, 5)])
def test_image_embeddings_equal_diffusers(image_folder, size):
    pixels = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    pipeline = WanImageToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=None,
        image_processor=CLIPImageProcessorPil.from_pretrained(image_folder / "image_processor"),
        image_encoder=CLIPVisionModel.from_pretrained(image_folder / "image_encoder").eval(),
    )
    pictures = [Image.fromarray(p) for p in pixels]
    with torch.no_grad():
        expected = pipeline.encode_image(pictures, "cpu")
        last = pipeline.image_encoder(
            **pipeline.image_processor(images=pictures, return_tensors="pt")
        ).last_hidden_state
    encoder = load_image_encoder(image_folder)
    assert expected.shape == (2, 5, encoder.image_dim)
    assert error(encoder.encode(pictures), expected) < 1e-6
    assert error(encoder.encode(list(pixels)), expected) < 1e-6
    assert error(last, expected) > 1e-2


def test_clip_files_of_either_generation_load(image_folder, tmp_path):
    """Published files put `vision_model.` before every name and store the positions' indices."""
    folder = shutil.copytree(image_folder, tmp_path / "model")
    path = folder / "image_encoder" / "model.safetensors"
    bare = {name.removeprefix("vision_model."): v for name, v in load_file(path).items()}
    pixels = [np.full((30, 30, 3), 90, np.uint8)]
    expected = load_image_encoder(image_folder).encode(pixels)
    for outer in ("", "vision_model."):
        stored = {outer + name: value for name, value in bare.items()}
        stored[f"{outer}embeddings.position_ids"] = torch.arange(5)[None]
        save_file(stored, path)
        assert load_image_encoder(folder).encode(pixels).equal(expected)


def edit(path, **changes):
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("text_encoder/config.json", {"architectures": ["EvilModel"]}, "EvilModel"),
        ("text_encoder/config.json", {"quantization_config": {}}, "quantization_config"),
        ("text_encoder/config.json", {"d_model": "32"}, "d_model is '32'; it must be of type int"),
        ("text_encoder/config.json", {"num_layers": True}, "num_layers is True"),
        ("text_encoder/config.json", {"num_heads": 0}, "num_heads is 0; it must be positive"),
        ("text_encoder/config.json", {"d_ff": 36}, r"has shape \[37, 32\], the model has \[36"),
        ("text_encoder/config.json", {"num_layers": 4}, "missing tensors: encoder.block.3"),
        ("text_encoder/config.json", {"feed_forward_proj": "gated-x"}, "feed_forward_proj"),
        ("text_encoder/config.json", {"vocab_size": 16}, "shape"),
        ("tokenizer/tokenizer_config.json", {"tokenizer_class": "Evil"}, "Evil"),
        ("tokenizer/tokenizer_config.json", {"auto_map": {"AutoTokenizer": "x.y"}}, "auto_map"),
        ("tokenizer/tokenizer.json", {"model": ...}, "not a T5 tokenizer"),
    ],
)
def test_a_bad_text_encoder_is_refused(text_folder, tmp_path, file, changes, says):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=says) as caught:
        load(folder)
    assert caught.value.path is not None
    assert caught.value.path.is_relative_to(folder)


def test_a_tokenizer_that_is_missing_or_too_large_is_refused(text_folder, tmp_path):
    folder = shutil.copytree(text_folder, tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json and no spiece\.model"):
        load(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: no such file"):
        load(folder)
    more = PIECES + [(f"piece{i}", -9.0) for i in range(60)]
    T5Tokenizer(vocab=more, extra_ids=0).save_pretrained(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer has 94 tokens, the text encoder 64"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("image_encoder/config.json", {"architectures": ["EvilModel"]}, "EvilModel"),
        ("image_encoder/config.json", {"auto_map": {}}, "auto_map"),
        ("image_encoder/config.json", {"hidden_act": "evil"}, "hidden_act"),
        ("image_encoder/config.json", {"num_attention_heads": 3}, "no multiple"),
        ("image_processor/preprocessor_config.json", {"auto_map": {}}, "auto_map"),
        ("image_processor/preprocessor_config.json", {"size": {"shortest_edge": 0}}, "size is"),
        ("image_processor/preprocessor_config.json", {"crop_size": 10**9}, "crop_size is"),
    ],
)
def test_a_bad_image_encoder_is_refused(image_folder, tmp_path, file, changes, says):
    folder = shutil.copytree(image_folder, tmp_path / "model")
    edit(folder / file, **changes)
    with pytest.raises(CheckpointError, match=says):
        load_image_encoder(folder)
