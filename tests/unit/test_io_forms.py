"""A picture gives the same pixels as a path, as a PIL image and as an array."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from sora_engine.errors import MediaError, RequestError
from sora_engine.request.frames import as_array, load_frames

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (20, 32, 3), np.uint8)
ALPHA = RNG.integers(0, 256, (20, 32), np.uint8)
GREY = RGB[..., 0]
DEEP = RNG.integers(0, 65536, (20, 32), np.uint16)


def on_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return np.rint(rgb * share + 255 * (1 - share)).astype(np.uint8)


def grey_as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, -1)


def palette_image() -> tuple[Image.Image, np.ndarray]:
    indices = RNG.integers(0, 5, (20, 32), np.uint8)
    colours = RNG.integers(0, 256, (5, 3), np.uint8)
    image = Image.fromarray(indices, "P")
    image.putpalette(colours.tobytes())
    return image, colours[indices]


def pictures() -> dict[str, tuple[Image.Image, np.ndarray, dict[str, Any]]]:
    """name: (a picture, its pixels on white by arithmetic, how it is saved as PNG)."""
    palette, painted = palette_image()
    cleared = painted.copy()
    cleared[np.asarray(palette) == 2] = 255
    keyed = RGB.copy()
    keyed[4:9, 3:7] = (1, 2, 3)
    keyed_truth = keyed.copy()
    keyed_truth[(keyed == (1, 2, 3)).all(-1)] = 255
    bits = GREY > 128
    deep_keyed = grey_as_rgb((DEEP >> 8).astype(np.uint8))
    deep_keyed[DEEP[3, 4] == DEEP] = 255
    turned = Image.Exif()
    turned[0x112] = 6
    mirrored = Image.Exif()
    mirrored[0x112] = 7
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb, deep = Image.fromarray(RGB), Image.fromarray(DEEP)
    two = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(ALPHA)))
    four = Image.fromarray(np.dstack([RGB, ALPHA]))
    return {
        "RGB": (rgb, RGB, {}),
        "grey": (Image.fromarray(GREY), grey_as_rgb(GREY), {}),
        "bilevel": (Image.fromarray(bits), grey_as_rgb(bits.astype(np.uint8) * 255), {}),
        "16-bit grey": (deep, grey_as_rgb((DEEP >> 8).astype(np.uint8)), {}),
        "16-bit grey with a clear value": (deep, deep_keyed, {"transparency": int(DEEP[3, 4])}),
        "RGBA": (four, on_white(RGB, ALPHA), {}),
        "grey with alpha": (two, on_white(grey_as_rgb(GREY), ALPHA), {}),
        "palette": (palette, painted, {}),
        "palette with a clear colour": (palette, cleared, {"transparency": 2}),
        "a clear colour": (Image.fromarray(keyed), keyed_truth, {"transparency": (1, 2, 3)}),
        "turned": (rgb, np.rot90(RGB, -1), {"exif": turned}),
        "mirrored": (rgb, np.rot90(RGB.transpose(1, 0, 2), 2), {"exif": mirrored}),
        "turned 16-bit grey": (
            deep, np.rot90(grey_as_rgb((DEEP >> 8).astype(np.uint8)), -1), {"exif": turned}
        ),
        "turned RGBA": (four, np.rot90(on_white(RGB, ALPHA), -1), {"exif": turned}),
        "sRGB's profile": (rgb, RGB, {"icc_profile": srgb}),
    }  # fmt: skip


PICTURES = pictures()


@pytest.mark.parametrize("name", PICTURES)
def test_a_file_an_image_and_an_array_are_the_same(tmp_path: Path, name: str) -> None:
    image, truth, saved = PICTURES[name]
    path = tmp_path / "a.png"
    image.save(path, **saved)
    with Image.open(path) as opened:
        as_image = as_array(opened)
        assert as_image.shape == (1, *truth.shape)
        assert np.abs(as_image[0].astype(int) - truth).max() <= 1  # rounding, of alpha
        exact = as_image[0]
        for height, width in (truth.shape[:2], (16, 16), (64, 48)):
            read = load_frames(str(path), height, width, 8.0)
            np.testing.assert_array_equal(load_frames(opened, height, width, 8.0), read)
            np.testing.assert_array_equal(load_frames(exact, height, width, 8.0), read)


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA", "CMYK", "YCbCr", "HSV", "I", "RGBX"])
def test_images_of_modes_that_no_png_has(mode: str) -> None:
    source = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(mode, "RGB")
    image = Image.fromarray(np.dstack([RGB, ALPHA])) if source != "RGB" else Image.fromarray(RGB)
    if source == "LA":
        image = image.convert("LA")
    if mode == "I":
        converted = Image.fromarray(DEEP.astype(np.int32))
        truth = grey_as_rgb((DEEP >> 8).astype(np.uint8))
    elif mode == "PA":
        converted = palette_image()[0].convert("PA")
        converted.putalpha(Image.fromarray(ALPHA))
        truth = on_white(np.asarray(converted.convert("RGB")), ALPHA)
    else:
        converted = image.convert(mode)
        plain = np.asarray(image.convert("RGB"))
        truth = plain if source == "RGB" else on_white(plain, ALPHA)
    came = as_array(converted)[0].astype(int)
    # Hue and chroma are rounded, and so are colours that are stored times their opacity.
    bound = {"HSV": 8, "YCbCr": 3, "RGBa": 2, "La": 2}.get(mode, 1)
    assert np.abs(came - truth).max() <= bound


def test_the_caller_s_image_stays_as_it_was(tmp_path: Path) -> None:
    palette, _ = palette_image()
    palette.info["transparency"] = 2
    before = palette.tobytes(), palette.mode, dict(palette.info)
    as_array(palette)
    assert (palette.tobytes(), palette.mode, dict(palette.info)) == before


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (Image.new("F", (4, 4), 0.5), "floating-point"),
        (Image.fromarray(np.full((4, 4), 70000, np.int32)), "from 70000 to 70000"),
        (Image.fromarray(np.full((4, 4), -1, np.int32)), "from -1 to -1"),
        (Image.new("1", (9000, 9000)), "81000000 pixels"),
        (Image.new("RGB", (0, 4)), "empty"),
    ],
)
def test_images_that_cannot_be_taken_are_named(image: Image.Image, words: str) -> None:
    with pytest.raises(MediaError, match=words) as caught:
        as_array(image, "start video")
    assert "the start video's picture" in str(caught.value)


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((1, 0, 4, 3), np.uint8),
        object(),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(frames: object) -> None:
    with pytest.raises(RequestError, match=r"frames are"):
        as_array(frames)
