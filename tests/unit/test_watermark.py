"""The watermark: read after what files go through, and not found where there is none."""

from __future__ import annotations

import io
import json
from pathlib import Path

import av
import numpy as np
import pytest

from sora_engine.errors import MediaError
from sora_engine.io.certificates import CERTIFICATE, KEY, make_certificates
from sora_engine.io.provenance import Provenance, read_provenance
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video
from sora_engine.io.watermark import BITS, Watermark, wanted

LEAST_DB = 44.0
FRAMES = 24


def textured(seed: int, height: int, width: int, frames: int) -> np.ndarray:
    """A texture whose power falls with frequency as that of photographs does (Field, 1987), and
    that moves over the picture, with grain: uint8 [frames, height, width, 3]."""
    random = np.random.default_rng(seed)
    tall, wide = 2 * height, 2 * width
    frequency = np.hypot(np.fft.fftfreq(tall)[:, None] * tall, np.fft.fftfreq(wide) * wide)
    frequency[0, 0] = 1
    power = random.uniform(0.9, 1.6)
    noise = np.fft.fft2(random.normal(size=(3, tall, wide))) / frequency**power
    layers = np.fft.ifft2(noise).real
    layers = (layers - layers.mean((1, 2), keepdims=True)) / layers.std((1, 2), keepdims=True)
    texture = np.einsum("chw,cd->hwd", layers, np.eye(3) * 0.4 + 0.35)
    step, contrast = random.integers(-4, 5, 2), random.uniform(20, 55)
    pictures = []
    for i in range(frames):
        place = np.roll(texture, step * i, (0, 1))[height // 2 :, width // 2 :][:height, :width]
        pictures.append(125 + contrast * place + random.normal(scale=2, size=place.shape))
    return np.clip(pictures, 0, 255).astype(np.uint8)


def psnr(before: np.ndarray, after: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((before.astype(float) - after) ** 2)))


def through_h264(frames: np.ndarray, crf: int, scale: float = 1) -> np.ndarray:
    """Frames as a site gives them out again: by x264, of another size where asked for."""
    file = io.BytesIO()
    height, width = (int(side * scale) for side in frames.shape[1:3])
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", height, width
        stream.options = {"crf": str(crf), "preset": "medium"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(
                stream.encode(picture.reformat(width, height, "yuv420p", dst_colorspace="itu709"))
            )
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        return np.stack(
            [
                frame.reformat(format="rgb24", src_colorspace="itu709").to_ndarray()
                for frame in container.decode(video=0)
            ]
        )


def marked(frames: np.ndarray, mark: Watermark) -> np.ndarray:
    return np.stack([mark.embed(frame) for frame in frames])


def check_clip(seed: int, frames: int) -> None:
    before, mark = textured(seed, 480, 832, frames), Watermark(0x1234 + 977 * seed)
    after = marked(before, mark)
    assert psnr(before, after) >= LEAST_DB
    for again in (after, through_h264(after, 28), through_h264(after, 23, scale=0.5)):
        found = mark.read(again)
        assert found.payload == mark.payload
        assert found.marked
    assert not mark.read(before).marked


def test_a_clip_is_read_after_h264_and_at_half_size() -> None:
    check_clip(4, 9)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_ten_textured_clips_are_read_after_h264_and_at_half_size(seed: int) -> None:
    check_clip(seed, FRAMES)


def unmarked(seed: int) -> np.ndarray:
    """A clip of any kind: a texture that moves, one colour, a ramp, or shapes on a ground."""
    random = np.random.default_rng(seed)
    match seed % 5:
        case 0:
            return np.full((2, 48, 80, 3), random.integers(0, 256, 3), np.uint8)
        case 1:
            ramp = np.linspace(*random.uniform(0, 255, 2), 80)
            return np.broadcast_to(ramp[:, None].astype(np.uint8), (2, 48, 80, 3))
        case 2:
            frames = np.full((2, 48, 80, 3), random.integers(0, 256, 3), np.uint8)
            for _ in range(6):
                top, left = random.integers(0, (48, 80))
                frames[:, top : top + 20, left : left + 20] = random.integers(0, 256, 3)
            return frames
        case _:
            return textured(seed, 48, 80, 3)


def test_no_mark_is_found_in_500_clips_that_have_none() -> None:
    mark = Watermark()
    found = [mark.read(unmarked(seed)) for seed in range(500)]
    assert not any(one.marked for one in found)
    # The chance that is told holds: at most one in twenty says that there is one in twenty.
    told = np.array([one.chance for one in found])
    for level in (0.05, 0.2):
        assert np.mean(told <= level) <= level + 3 * np.sqrt(level * (1 - level) / 500)
    # What is read of them is noise: half of the bits agree.
    assert abs(np.mean([one.agreeing for one in found[3::5] + found[4::5]]) - BITS / 2) < 1


def test_another_payload_and_another_key_are_not_taken_for_ours() -> None:
    frames = textured(1, 256, 448, 2)
    there = marked(frames, Watermark(0x00FF))
    found = Watermark().read(there)
    assert found.payload == "00ff"
    assert found.agreeing < BITS
    assert not Watermark(0x00FF, key=b"another").read(there).marked


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_picture_of_one_colour_is_marked_though_cells_cannot_be_darker_than_black(
    level: int,
) -> None:
    frame = np.full((480, 832, 3), level, np.uint8)
    mark = Watermark()
    found = mark.read([mark.embed(frame)])
    assert found.payload == mark.payload
    assert found.chance < 1e-14  # each sum on its lattice: cells that can move take the share
    assert not mark.read([frame]).marked


def test_each_sum_lies_on_its_bits_lattice() -> None:
    """The formula, in fp64 from the pixels: s = sum of sign * mean luma over the root of the
    cells; s - dither is a whole number of spacings for a 0, and a half more for a 1."""
    frame, mark = textured(3, 240, 400, 1)[0], Watermark(0x0F3C)
    luma = mark.embed(frame).astype(np.float64) @ [0.2126, 0.7152, 0.0722]
    means = luma.reshape(24, 10, 40, 10).mean((1, 3)).ravel()
    code = mark._code
    for bit in range(BITS):
        cells, signs = code.cells[bit], code.signs[bit]
        place = (means[cells] @ signs / np.sqrt(len(cells)) - code.dither[bit]) / 35.0
        place -= 0.5 * (0x0F3C >> (BITS - 1 - bit) & 1)
        assert abs(place - round(place)) < 1 / 32 + 0.5 / np.sqrt(len(cells)) / 35.0


def test_the_writer_marks_what_it_writes_and_the_file_says_so(tmp_path: Path) -> None:
    frames, mark = textured(2, 256, 448, 3), Watermark()
    made = Provenance(prompt="x", settings={"solver": "euler"})
    for name in ("a.mp4", "a.webp", "folder"):
        path = write_video(tmp_path / name, frames, 8, provenance=made, watermark=mark)
        read = read_video(path)[0]
        assert mark.read(read).payload == mark.payload
        told = read_provenance(path)
        assert told is not None
        assert told.settings == {"solver": "euler", "watermark": mark.payload}
    np.testing.assert_array_equal(read, marked(frames, mark))  # a folder's PNGs are exact
    plain = write_video(tmp_path / "plain", frames, 8)
    np.testing.assert_array_equal(read_video(plain)[0], frames)


def test_the_signed_statement_names_the_mark(tmp_path: Path) -> None:
    c2pa = pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    from sora_engine.io.credentials import Credentials

    make_certificates(tmp_path, "Jane Doe")
    own = Credentials.read(tmp_path / CERTIFICATE, tmp_path / KEY)
    frame = textured(2, 256, 448, 1)
    path = write_video(tmp_path / "a.png", frame, 8, credentials=own, watermark=Watermark())
    with path.open("rb") as file, c2pa.Reader("image/png", file) as reader:
        assert reader.get_validation_state() == "Valid"
        report = json.loads(reader.json())
    text = json.dumps(report)
    assert '"c2pa.watermarked.unbound"' in text
    assert f'"watermark": "{Watermark().payload}"' in text


def test_small_and_unsigned_results_are_not_marked_by_themselves() -> None:
    assert [wanted("auto", rows, True) for rows in (255, 256)] == [False, True]
    assert not wanted("auto", 480, False)
    assert wanted("on", 64, False)
    assert not wanted("off", 480, True)
    with pytest.raises(MediaError, match="auto, on or off"):
        wanted("yes", 480, True)


def test_a_weaker_mark_is_nearer_to_the_picture_and_still_read() -> None:
    """On a still ramp of grey, where a mark is seen best."""
    ramp = np.rint(np.linspace(60, 190, 832)).astype(np.uint8)
    frame = np.broadcast_to(ramp[None, :, None], (480, 832, 3))
    errors = []
    for strength in (1.0, 0.75):
        mark = Watermark(0x1234, strength=strength)
        after = mark.embed(frame)
        found = mark.read([after])
        assert (found.payload, found.marked) == ("1234", True)
        errors.append(np.square(after.astype(float) - frame).mean())
    # Moves are 0.75 of what they were, each rounded to a level: variance 1/12, and so is the blend.
    assert errors[1] < 0.75**2 * errors[0] + 1 / 6
    for strength in (0.4, 1.1, float("nan")):
        with pytest.raises(MediaError, match="strength is from"):
            Watermark(strength=strength)


def test_what_cannot_be_marked_is_refused() -> None:
    for payload in (-1, 65536, True, "x"):
        with pytest.raises(MediaError, match="from 0 to 65535"):
            Watermark(payload)  # type: ignore[arg-type]
    with pytest.raises(MediaError, match="needs 40x24 pixels"):
        Watermark().embed(np.zeros((16, 64, 3), np.uint8))
    with pytest.raises(MediaError, match="at least one frame"):
        Watermark().read([])
