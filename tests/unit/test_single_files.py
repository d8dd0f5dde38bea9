"""Every part of a model from a single file, under each of its namings."""

from __future__ import annotations

import shutil

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

import sora_engine as sora
from sora_engine import VideoRequest
from sora_engine.cli.app import UsageError
from sora_engine.cli.options import Common
from sora_engine.errors import CheckpointError
from sora_engine.models.registry import open_checkpoint
from sora_engine.text import ImageEncoder
from sora_engine.text.umt5 import UMT5Encoder
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.part_recipes import (
    TEXTS,
    make_spiece,
    transformer_tensors,
    umt5_tensors,
    vae_tensors,
    wans_umt5_name,
    with_tokenizer,
    write_umt5_gguf,
)
from tests.unit.weight_recipes import write_gguf, write_safetensors

SHAPE = {"num_attention_heads": 1, "attention_head_dim": 128}
REQUEST = VideoRequest(
    "red circle", height=32, width=32, num_frames=5, num_inference_steps=2, seed=1
)


@pytest.fixture(scope="module")
def spiece():
    return make_spiece()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    made = tiny_pipeline("t2v", 0)
    made.transformer = tiny_transformer(0, **SHAPE)
    made.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def parts(folder, tmp_path_factory, spiece):
    """A folder in ComfyUI's layout with the same weights."""
    root = tmp_path_factory.mktemp("comfy")
    for name in ("diffusion_models", "text_encoders", "vae", "loras"):
        (root / name).mkdir()
    save_file(transformer_tensors(folder), root / "diffusion_models" / "wan.safetensors")
    text = with_tokenizer(umt5_tensors(folder), spiece)
    save_file(text, root / "text_encoders" / "umt5_xxl.safetensors")
    save_file(vae_tensors(folder), root / "vae" / "wan_2.1_vae.safetensors")
    return root


def latents(path, **options):
    with sora.Engine.from_pretrained(path, device="cpu", **options) as engine:
        video = engine.generate(REQUEST)
        return video.latents, torch.from_numpy(video.frames.copy()).int()


@pytest.fixture(scope="module")
def expected(folder, parts):
    """Of a transformer file and the folder with the tokenizer of the single file."""
    text = parts / "text_encoders" / "umt5_xxl.safetensors"
    given = {"vae": folder / "vae", "text_encoder": text}
    return latents(parts / "diffusion_models" / "wan.safetensors", components=given)


def same(found, expected):
    assert (found[0] - expected[0]).abs().max() < 1e-5
    assert (found[1] - expected[1]).abs().max() <= 1


def test_a_folder_of_comfyui_is_a_model(parts, expected):
    same(latents(parts), expected)
    same(latents(parts / "diffusion_models" / "wan.safetensors"), expected)
    same(latents(parts / "diffusion_models" / "wan.safetensors", components=parts), expected)


def test_parts_by_name(parts, folder, tmp_path, expected):
    lone = shutil.copy(parts / "diffusion_models" / "wan.safetensors", tmp_path / "wan.safetensors")
    vae, text = (next((parts / name).iterdir()) for name in ("vae", "text_encoders"))
    same(latents(lone, components={"vae": vae, "text_encoder": text}), expected)
    wans = {wans_umt5_name(n): v for n, v in umt5_tensors(folder).items()}
    save_file(wans, tmp_path / "umt5-enc.safetensors")
    given = {"vae": vae, "text_encoder": tmp_path / "umt5-enc.safetensors"}
    with pytest.raises(CheckpointError, match="this one brings none; give the tokenizer/"):
        latents(lone, components=given)
    theirs = latents(folder)
    same(latents(lone, components={**given, "tokenizer": folder / "tokenizer"}), theirs)


def test_an_all_in_one_file(folder, tmp_path, spiece, expected):
    whole = {f"model.diffusion_model.{n}": v for n, v in transformer_tensors(folder).items()}
    text = "text_encoders.umt5xxl.transformer."
    whole |= {f"{text}{n}": v for n, v in umt5_tensors(folder).items()}
    whole |= {f"vae.{n}": v for n, v in vae_tensors(folder).items()}
    tokens = with_tokenizer({}, spiece)["spiece_model"]
    save_file({**whole, "text_encoders.spiece_model": tokens}, tmp_path / "all.safetensors")
    same(latents(tmp_path / "all.safetensors"), expected)


def test_two_experts_by_name_and_in_comfyuis_folder(parts, folder, tmp_path):
    tensors = transformer_tensors(folder)
    low = {n: v * 1.1 if n.endswith("ffn.0.weight") else v for n, v in tensors.items()}
    root = tmp_path / "comfy"
    shutil.copytree(parts, root)
    (root / "diffusion_models" / "wan.safetensors").unlink()
    high_path = root / "diffusion_models" / "wan2.2_t2v_high_noise.gguf"
    low_path = root / "diffusion_models" / "a_low_noise.safetensors"
    write_gguf(high_path, "Q8_0", tensors)
    write_safetensors(low_path, "fp8_scaled, legacy", low)
    found = latents(root)
    same(found, latents([high_path, low_path]))
    same(found, latents(high_path, components={"transformer_2": low_path}))
    checkpoint, _ = open_checkpoint(root)
    assert [expert.path for expert in checkpoint.experts] == [high_path, low_path]
    shutil.copy(low_path, low_path.with_name("third.safetensors"))
    with pytest.raises(CheckpointError, match="3 transformers: a_low_noise"):
        open_checkpoint(root)


@pytest.mark.parametrize("naming", ["transformers", "Wan's", "scaled fp8", "GGUF"])
def test_umt5_under_each_naming(folder, tmp_path, spiece, naming):
    path = tmp_path / "umt5.safetensors"
    tensors = umt5_tensors(folder)
    if naming == "Wan's":
        tensors = {wans_umt5_name(name): value for name, value in tensors.items()}
    if naming == "scaled fp8":
        values = write_safetensors(
            path, "fp8_scaled, legacy", tensors, chosen=lambda n, v: "SelfAttention.q" in n
        )
        tensors, stored = values, load_file(path)
    else:
        stored = tensors
    if naming == "GGUF":
        path = tmp_path / "umt5-xxl-encoder-Q8_0.gguf"
        tensors = write_umt5_gguf(path, tensors, spiece)
        assert (
            tensors["encoder.block.1.layer.0.SelfAttention.q.weight"]
            .ne(stored["encoder.block.1.layer.0.SelfAttention.q.weight"])
            .any()
        )
    else:
        save_file(with_tokenizer(stored, spiece), path)
    ours = UMT5Encoder.from_folders(path, None)
    theirs = UMT5EncoderModel(UMT5Config.from_pretrained(folder / "text_encoder")).eval()
    names = {wans_umt5_name(n): n for n in umt5_tensors(folder)} if naming == "Wan's" else {}
    theirs.load_state_dict({names.get(n, n): v.float() for n, v in tensors.items()}, strict=False)
    ids = torch.tensor([[3, 5, 7, 1]])
    with torch.no_grad():
        want = theirs(input_ids=ids).last_hidden_state
        assert torch.allclose(ours.model(input_ids=ids), want, atol=1e-6)


def test_the_ids_of_an_embedded_tokenizer_are_sentencepieces_own(folder, tmp_path, spiece):
    path = tmp_path / "umt5.safetensors"
    save_file(with_tokenizer(umt5_tensors(folder), spiece), path)
    tokenizer = UMT5Encoder.from_folders(path, None).tokenizer
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    for text in TEXTS:
        assert tokenizer.ids(text) == processor.encode(text, add_eos=True), text


def test_the_ids_of_a_gguf_tokenizer_are_sentencepieces_own(folder, tmp_path, spiece, caplog):
    path = tmp_path / "umt5.gguf"
    write_umt5_gguf(path, umt5_tensors(folder), spiece)
    tokenizer = UMT5Encoder.from_folders(path, None).tokenizer
    processor = sentencepiece.SentencePieceProcessor(model_proto=spiece)
    assert len(tokenizer) == processor.get_piece_size()  # what fills the vocabulary up is left out
    texts = [*TEXTS, "[PAD120]", "「引用」、終わり。", "ｶﾀｶﾅ ㌔ ①"]
    for text in texts:
        assert tokenizer.ids(text) == processor.encode(text, add_eos=True), text
    assert not caplog.records
    write_umt5_gguf(path, umt5_tensors(folder), spiece, precompiled_charsmap=None)
    without = UMT5Encoder.from_folders(path, None).tokenizer
    assert "lacks the map of characters" in caplog.text
    full_width = TEXTS[3]
    assert without.ids(full_width) != processor.encode(full_width, add_eos=True)


def test_a_gguf_tokenizer_that_cannot_be(folder, tmp_path, spiece):
    path = tmp_path / "umt5.gguf"
    for changes, says in (
        ({"model": "llama"}, r"tokenizer\.ggml\.model is 'llama'; UMT5's is 't5'"),
        ({"tokens": None}, "tokens is no list of texts"),
        ({"scores": [0.0, 1.0]}, r"scores has 2 values for \d+ tokens"),
        ({"token_type": None}, "token_type has no values for"),
        ({"unknown_token_id": 0}, "1 tokens are the unknown one, and unknown_token_id is 0"),
        ({"add_space_prefix": False}, "add_space_prefix is False; T5's is True"),
    ):
        write_umt5_gguf(path, umt5_tensors(folder), spiece, **changes)
        with pytest.raises(CheckpointError, match=says) as caught:
            UMT5Encoder.from_folders(path, None)
        assert caught.value.path == path
    write_umt5_gguf(path, umt5_tensors(folder), spiece, model=None, tokens=None)
    with pytest.raises(CheckpointError, match="this one brings none"):
        UMT5Encoder.from_folders(path, None)


def test_what_is_no_umt5(folder, tmp_path, spiece):
    path = tmp_path / "text.safetensors"
    torch.manual_seed(0)
    t5 = T5EncoderModel(T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=37, num_layers=2,
                                 num_heads=4, feed_forward_proj="gated-gelu"))  # fmt: skip
    t5_tensors = {n: v for n, v in t5.state_dict().items() if n != "encoder.embed_tokens.weight"}
    good = umt5_tensors(folder)
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    query = "encoder.block.0.layer.0.SelfAttention.q.weight"
    for tensors, says in (
        (t5_tensors, "a T5 encoder, whose first block alone"),
        ({"a": torch.ones(1)}, "not a UMT5 text encoder: it holds a"),
        ({**good, bias: torch.ones(32, 5)}, "no multiple of 5 heads"),
        ({**good, "shared.weight": torch.ones(4)}, "UMT5's is a matrix"),
        ({**good, "encoder.extra": torch.ones(4)}, "unexpected tensors: encoder.extra"),
        ({n: v for n, v in good.items() if n != query}, "no tensor"),
    ):
        save_file(with_tokenizer(tensors, spiece), path)
        with pytest.raises(CheckpointError, match=says) as caught:
            UMT5Encoder.from_folders(path, None)
        assert caught.value.path == path
    for tokens, says in (
        (torch.ones(4), "a SentencePiece model is bytes"),
        (torch.ones(4, dtype=torch.uint8), "is no SentencePiece model"),
    ):
        save_file({**good, "spiece_model": tokens}, path)
        with pytest.raises(CheckpointError, match=says) as caught:
            UMT5Encoder.from_folders(path, None)
        assert caught.value.tensor == "spiece_model"


def clip():
    torch.manual_seed(2)
    sizes = {"hidden_size": 1280, "intermediate_size": 24, "num_hidden_layers": 2}
    config = CLIPVisionConfig(**sizes, num_attention_heads=16, image_size=28, patch_size=14,
                              hidden_act="gelu", projection_dim=1024)  # fmt: skip
    return CLIPVisionModel(config).eval()


def wans_clip(tensors):
    """The names of `wan/modules/clip.py`, queries to values in one matrix."""
    made = {}
    for name, value in tensors.items():
        name = name.removeprefix("vision_model.")
        name = name.replace("encoder.layers.", "transformer.").replace("layer_norm", "norm")
        name = name.replace("mlp.fc1", "mlp.0").replace("mlp.fc2", "mlp.2")
        name = name.replace("self_attn.out_proj", "attn.proj").replace("pre_layrnorm", "pre_norm")
        name = name.replace("post_layernorm", "post_norm")
        if name == "embeddings.class_embedding":
            name, value = "cls_embedding", value[None, None]
        elif name == "embeddings.position_embedding.weight":
            name, value = "pos_embedding", value[None]
        name = name.removeprefix("embeddings.")
        made[f"visual.{name}"] = value
    for name in [n for n in made if ".self_attn.q_proj." in n]:
        three = [made.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        made[name.replace("self_attn.q_proj", "attn.to_qkv")] = torch.cat(three)
    made["visual.head"] = torch.zeros(1280, 1024)
    return made


@pytest.mark.parametrize("naming", ["transformers", "Wan's"])
def test_clip_under_each_naming(tmp_path, naming):
    model, path = clip(), tmp_path / "clip_vision_h.safetensors"
    outer = "vision_model."
    tensors = {outer + n.removeprefix(outer): v for n, v in model.state_dict().items()
               if "position_ids" not in n}  # fmt: skip
    tensors = wans_clip(tensors) if naming == "Wan's" else {
        **tensors, "visual_projection.weight": torch.zeros(1024, 1280)}  # fmt: skip
    save_file({n: v.contiguous() for n, v in tensors.items()}, path)
    ours = ImageEncoder.from_folders(path, None)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        want = model(pixels, output_hidden_states=True).hidden_states[-2]
        found = ours.model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(found, want, atol=1e-5)
    picture = torch.randint(0, 255, (40, 60, 3), dtype=torch.uint8).numpy()
    assert ours.encode([picture]).shape == (1, 5, 1280)


def test_a_clip_of_another_width_is_refused(tmp_path):
    path = tmp_path / "clip_l.safetensors"
    config = CLIPVisionConfig(hidden_size=1024, intermediate_size=8, num_hidden_layers=1,
                              num_attention_heads=16, image_size=28, patch_size=14)  # fmt: skip
    outer = "vision_model."
    tensors = CLIPVisionModel(config).state_dict()
    save_file({outer + n.removeprefix(outer): v for n, v in tensors.items()}, path)
    with pytest.raises(CheckpointError, match=r"1024 wide; ViT-H is read.*clip_vision_h"):
        ImageEncoder.from_folders(path, None)


def test_what_is_missing_is_said_with_its_usual_names(parts, folder, tmp_path):
    lone = shutil.copy(parts / "diffusion_models" / "wan.safetensors", tmp_path / "wan.safetensors")
    vae = parts / "vae" / "wan_2.1_vae.safetensors"
    with pytest.raises(
        CheckpointError, match=r"no folder for the vae, which wan.*wan_2\.1_vae\.safetensors"
    ):
        open_checkpoint(lone)
    with pytest.raises(
        CheckpointError, match=r"no folder for the text_encoder, which .*umt5_xxl_fp8"
    ):
        open_checkpoint(lone, {"vae": vae})
    with pytest.raises(CheckpointError, match=r"no vae of Wan: it holds .*wan2\.2_vae"):
        open_checkpoint(lone, {"vae": lone})
    with pytest.raises(CheckpointError, match="no such file or folder for the vae"):
        open_checkpoint(lone, {"vae": tmp_path / "none"})
    with pytest.raises(CheckpointError, match=r"unknown components \['vea'\]"):
        open_checkpoint(lone, {"vea": vae})
    both = tmp_path / "comfy"
    shutil.copytree(parts, both)
    shutil.copy(vae, both / "vae" / "another.safetensors")
    with pytest.raises(CheckpointError, match=r"2 files for the vae: .*another"):
        open_checkpoint(both)
    for file in (both / "vae").iterdir():
        save_file({"a": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match="0 files for the vae: none of its files"):
        open_checkpoint(both)


def test_the_parts_on_the_command_line():
    common = Common(model=["high.gguf", "low.gguf"], vae="v", text_encoder="t")
    assert common.parts() == {"vae": "v", "text_encoder": "t"}
    assert Common(components="folder").parts() == "folder"
    assert Common().parts() is None
    with pytest.raises(UsageError, match="--image-encoder: --components folder names"):
        Common(image_encoder="i", components="folder").parts()
    with pytest.raises(UsageError, match="--vae: --components folder names"):
        Common(vae="v", components="folder").parts()
