"""Files that are not what they were given as: one line that says what they are."""

from __future__ import annotations

import gzip
import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.cli import main
from sora_engine.errors import CheckpointError
from sora_engine.io.file_kind import kind_of
from sora_engine.io.latents import SavedLatents
from sora_engine.io.video_writer import write_video
from sora_engine.models.registry import open_checkpoint
from tests.faults.engines import engine

SPRITES = Path(sora.__file__).parent / "checkpoints" / "sprites"
PAGE = b"\n <!DOCTYPE HTML><html><body>Access to this model is restricted</body></html>" * 3
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5112\n"


def foreign(folder: Path) -> dict[str, Path]:
    """A file of each kind that people have, made by what makes them."""
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    torch.save({"w": torch.zeros(3)}, folder / "torch.safetensors")
    with zipfile.ZipFile(folder / "zip.safetensors", "w") as file:
        file.writestr("a.txt", "a")
    with gzip.open(folder / "gzip.safetensors", "wb") as file:
        file.write(b"weights")
    Image.new("RGB", (8, 8)).save(folder / "png.safetensors", "PNG")
    Image.new("RGB", (8, 8)).save(folder / "bmp.safetensors", "BMP")
    write_video(folder / "a.mp4", frames, 8).rename(folder / "mp4.safetensors")
    contents = {
        "empty": b"",
        "page": PAGE,
        "pointer": POINTER,
        "gguf": b"GGUF\x03\x00\x00\x00" + bytes(64),
        "json": b'{"a": 1, "b": 2, "c": 3}',
        "pdf": b"%PDF-1.7\n" + bytes(64),
        "h5": b"\x89HDF\r\n\x1a\n" + bytes(64),
    }
    for name, content in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    return {path.stem: path for path in folder.glob("*.safetensors")}


WORDS = {
    "torch": "a pickle",
    "zip": "a pickle",
    "gzip": "it is a gzip archive",
    "png": "it is a PNG picture",
    "bmp": "it is a BMP picture",
    "mp4": "it is an MP4",
    "empty": "it is empty: a download or a copy that failed leaves such a file",
    "page": "it is a web page",
    "pointer": "a Git LFS pointer",
    "gguf": "it holds no tensors",
    "json": "it is JSON text",
    "pdf": "it is a PDF",
    "h5": "it is an HDF5 file",
}


def test_each_in_the_place_of_a_model(tmp_path):
    files = foreign(tmp_path)
    assert set(files) == set(WORDS)
    for name, path in files.items():
        with pytest.raises(CheckpointError) as told:
            open_checkpoint(path)
        assert WORDS[name] in str(told.value), (name, str(told.value))
        assert str(path) in str(told.value)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["model_index.json", "vae/config.json"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (POINTER, "the file is not JSON: it is a Git LFS pointer: `git lfs pull`"),
        (PAGE, "the file is not JSON: it is a web page"),
        (b"", "the file is not JSON: it is empty"),
        (b'{"a": 1', "the file is not JSON: Expecting"),
    ],
    ids=["pointer", "page", "empty", "cut off"],
)
def test_each_in_the_place_of_a_configuration(tmp_path, name, content, words):
    model = tmp_path / "model"
    shutil.copytree(SPRITES, model)
    (model / name).write_bytes(content)
    with pytest.raises(CheckpointError) as told:
        open_checkpoint(model)
    assert words in str(told.value)
    assert str(model / name) in str(told.value)


def test_each_in_the_place_of_a_saved_job(tmp_path):
    (tmp_path / "kinds").mkdir()
    files = foreign(tmp_path / "kinds")
    latents = SavedLatents(torch.ones(1, 1, 2, 2), 8.0, False, "sprites").write(tmp_path / "l")
    save_file({"w": torch.zeros(1)}, tmp_path / "weights")
    save_file({"w": torch.zeros(1)}, tmp_path / "old", {"sora_engine": json.dumps({"format": 1})})
    cases = [
        (files["page"], "it is a web page"),
        (files["empty"], "it is empty"),
        (files["mp4"], "it is an MP4"),
        (tmp_path, "it is a folder"),
        (tmp_path / "none", "cannot be read as a saved job"),
        (latents, "it holds finished latents, of which `sora decode` makes the video"),
        (tmp_path / "weights", "it holds 1 tensors, and nothing about a job"),
        (tmp_path / "old", "its format is 1, this version reads 3"),
    ]
    with engine() as made:
        for path, words in cases:
            with pytest.raises(CheckpointError) as told:
                made.resume(path)
            assert words in str(told.value), path
            assert "\n" not in str(told.value)


def test_the_command_says_it_in_one_line(tmp_path, capsys):
    files = foreign(tmp_path)
    for name in ("mp4", "page", "empty", "torch"):
        output = str(tmp_path / "out.mp4")
        assert main(["generate", "x", "--model", str(files[name]), "-o", output]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        assert WORDS[name] in said


def test_what_is_nothing_of_these_is_not_guessed(tmp_path):
    path = tmp_path / "x"
    assert kind_of(path) is None
    path.write_bytes(b"hello, this is a note")
    assert kind_of(path) is None
    save_file({"w": torch.zeros(1)}, path)
    assert kind_of(path) == "a safetensors file"
