"""Colours: HDR clips as SDR, wide colours and embedded profiles as sRGB. Truth is arithmetic."""

from __future__ import annotations

import logging
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from sora_engine.errors import MediaError
from sora_engine.io.hdr import needs_conversion, to_sdr
from sora_engine.io.images import read_image
from sora_engine.io.video_reader import read_video

PQ, HLG = 16, 18
TO_709 = np.array(  # as in ITU-R BT.2407, 2, with more digits
    [
        [1.66049100, -0.58764114, -0.07284986],
        [-0.12455047, 1.13289990, -0.00834942],
        [-0.01815076, -0.10057890, 1.11872966],
    ]
)


def nits_of_pq(code: np.ndarray) -> np.ndarray:
    """SMPTE ST 2084, equation 4.1."""
    root = np.asarray(code, float) ** (32 / 2523)
    fraction = np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)
    return 10000 * fraction ** (16384 / 2610)


def nits_of_hlg(code: np.ndarray) -> np.ndarray:
    """ITU-R BT.2100, table 5: R'G'B' `[..., 3]` on a screen of 1000 cd/m2."""
    code = np.asarray(code, float)
    scene = np.where(
        code <= 0.5, code**2 / 3, (np.exp((code - 0.55991073) / 0.17883277) + 0.28466892) / 12
    )
    luminance = scene @ [0.2627002, 0.6779981, 0.0593017]
    return 1000 * np.maximum(luminance, 1e-12)[..., None] ** 0.2 * scene


def sdr_of_nits(nits: np.ndarray) -> np.ndarray:
    """BT.2446-1, method C, from R, G, B in BT.2020 to 8-bit codes of BT.709 (BT.1886)."""
    luminance = np.maximum(nits @ [0.2627002, 0.6779981, 0.0593017], 1e-9)
    ratio = luminance / (58.535 / 0.83802)
    low = 0.83802 * luminance
    high = 15.09968 * np.log(np.maximum(ratio, 1) - 0.74204) + 78.99439
    mapped = np.where(ratio < 1, low, high)
    linear = (nits * (mapped / luminance)[..., None] / 100) @ TO_709.T
    return 255 * np.clip(linear, 0, 1) ** (1 / 2.4)


@pytest.mark.parametrize(("transfer", "nits_of"), [(PQ, nits_of_pq), (HLG, nits_of_hlg)])
def test_tone_mapping_is_the_published_one(transfer: int, nits_of: object) -> None:
    codes = np.random.default_rng(0).integers(0, 65536, (40, 50, 3), np.uint16)
    codes[:20] = codes[:20, :, :1] // 2 + np.random.default_rng(1).integers(0, 9000, (20, 50, 3))
    came = to_sdr(codes, transfer, 9)
    truth = sdr_of_nits(nits_of(codes / 65535))  # type: ignore[operator]
    assert came.dtype == np.uint8
    assert np.abs(came - truth).max() < 1


def test_landmarks_of_tone_mapping() -> None:
    def grey(transfer: int, code: float) -> int:
        came = to_sdr(np.full((1, 1, 3), round(65535 * code), np.uint16), transfer, 9)
        assert came.min() == came.max()  # neutral stays neutral
        return int(came.max())

    assert grey(PQ, 0) == grey(HLG, 0) == 0
    # Diffuse white, 203 cd/m2 (BT.2408): 90.7 of 100.
    assert grey(PQ, 0.5807) == grey(HLG, 0.75) == round(255 * 0.907 ** (1 / 2.4)) == 245
    assert grey(PQ, 0.7518) == grey(HLG, 1.0) == 255  # 1000 cd/m2
    ramp = to_sdr(np.arange(65536, dtype=np.uint16).reshape(256, 256, 1).repeat(3, 2), PQ, 9)
    assert (np.diff(ramp[..., 0].ravel().astype(int)) >= 0).all()


def coded(path: Path, codes: np.ndarray, transfer: int, primaries: int = 9) -> Path:
    """A clip of one 10-bit Y'CbCr colour (narrow range, BT.2020) in squares of 64: codes [n, 3]."""
    width = 64 * len(codes)
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx265", rate=8)
        stream.width, stream.height, stream.pix_fmt = width, 64, "yuv420p10le"
        stream.options = {
            "x265-params": f"log-level=none:qp=4:colorprim={primaries}:transfer={transfer}:"
            "colormatrix=9:range=limited"
        }
        context = stream.codec_context
        context.color_primaries, context.color_trc = primaries, transfer
        context.colorspace, context.color_range = 9, 1
        for _ in range(3):
            frame = av.VideoFrame(width, 64, "yuv420p10le")
            for plane, values in zip(frame.planes, codes.T, strict=True):
                rows = np.zeros((plane.height, plane.line_size // 2), np.uint16)
                rows[:, : plane.width] = np.repeat(values, plane.width // len(codes))
                plane.update(rows.tobytes())
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return path


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    """R'G'B' `[n, 3]` in [0, 1] as 10-bit codes: BT.2100, tables 6 and 9."""
    y = rgb @ [0.2627, 0.6780, 0.0593]
    cb, cr = (rgb[:, 2] - y) / 1.8814, (rgb[:, 0] - y) / 1.4746
    return np.stack([876 * y + 64, 896 * cb + 512, 896 * cr + 512], -1).round().astype(np.uint16)


def shown(codes: np.ndarray) -> np.ndarray:
    """`ycbcr` backwards, so that what rounding to 10 bits takes away does not count."""
    y, cb, cr = (np.subtract(codes, [64, 512, 512.0]) / [876, 896, 896]).T
    red, blue = y + 1.4746 * cr, y + 1.8814 * cb
    return np.stack([red, (y - 0.2627 * red - 0.0593 * blue) / 0.6780, blue], -1)


@pytest.mark.parametrize(("transfer", "nits_of"), [(PQ, nits_of_pq), (HLG, nits_of_hlg)])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "mov", "ts"])
def test_hdr_clips_are_tone_mapped(
    tmp_path: Path, suffix: str, transfer: int, nits_of: object
) -> None:
    rgb = np.array([(0.58, 0.58, 0.58), (0.4, 0.3, 0.25), (0.3, 0.45, 0.3), (0.2, 0.25, 0.5)])
    path = coded(tmp_path / f"a.{suffix}", ycbcr(rgb), transfer)
    frames, _ = read_video(path)
    came = frames[1, 16:48].reshape(32, len(rgb), 64, 3)[:, :, 16:48].mean((0, 2))
    truth = sdr_of_nits(nits_of(shown(ycbcr(rgb))))  # type: ignore[operator]
    assert np.abs(came - truth).max() < 3


def test_wide_colours_of_an_sdr_clip_are_brought_to_bt709(tmp_path: Path) -> None:
    rgb = np.array([(0.5, 0.5, 0.5), (0.6, 0.4, 0.35), (0.35, 0.55, 0.4)])
    frames, _ = read_video(coded(tmp_path / "a.mp4", ycbcr(rgb), 14))
    came = frames[1, 16:48].reshape(32, len(rgb), 64, 3)[:, :, 16:48].mean((0, 2))
    truth = 255 * (shown(ycbcr(rgb)) ** 2.4 @ TO_709.T).clip(0, 1) ** (1 / 2.4)
    assert np.abs(came - truth).max() < 3
    assert np.abs(truth - 255 * rgb).max() > 15


def test_transfers_that_are_not_known_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"a\.mp4: its transfer is linear light"):
        read_video(coded(tmp_path / "a.mp4", ycbcr(np.full((1, 3), 0.5)), 8))
    for transfer in (1, 2, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        assert not needs_conversion(transfer, 1)


def test_dolby_vision_without_a_plain_layer_is_refused_by_name(tmp_path: Path) -> None:
    path = coded(tmp_path / "a.mp4", ycbcr(np.full((1, 3), 0.5)), 2, 2)
    data = path.read_bytes().replace(b"hev1", b"dvh1").replace(b"hvc1", b"dvh1")
    assert b"dvh1" in data
    path.write_bytes(data)
    with pytest.raises(MediaError, match="Dolby Vision"):
        read_video(path)


def fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def display_p3(kind: bytes = b"RGB ", cicp: int | None = None) -> bytes:
    """A version 2 ICC profile: Display P3's primaries (D50-adapted), gamma 2.2."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(2.2 * 256)) + bytes(2)
    columns = {
        b"rXYZ": (0.51512, 0.24120, -0.00105),
        b"gXYZ": (0.29198, 0.69225, 0.04189),
        b"bXYZ": (0.15710, 0.06657, 0.78407),
        b"wtpt": (0.9642, 1.0, 0.8249),
    }
    tags = {name: b"XYZ " + bytes(4) + b"".join(map(fixed, xyz)) for name, xyz in columns.items()}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC", b"kTRC"), curve)
    if cicp is not None:
        tags[b"cicp"] = b"cicp" + bytes(4) + bytes([9, cicp, 0, 1])
    table, body, at = b"", b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", at, len(data))
        body += data
        at += len(data)
    head = struct.pack(
        ">I4sI4s4s4s12x4s", at, bytes(4), 0x02400000, b"mntr", kind, b"XYZ ", b"acsp"
    )
    head += bytes(28) + b"".join(map(fixed, (0.9642, 1.0, 0.8249)))
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_an_embedded_profile_is_brought_to_srgb(tmp_path: Path, suffix: str) -> None:
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 120, 60), (90, 160, 140)
    path = tmp_path / f"a.{suffix}"
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}
    Image.fromarray(picture).save(path, icc_profile=display_p3(), **options.get(suffix, {}))
    to_xyz = np.array([(0.51512, 0.29198, 0.15710), (0.24120, 0.69225, 0.06657),
                       (-0.00105, 0.04189, 0.78407)])  # fmt: skip
    srgb = np.array([(0.43607, 0.38515, 0.14307), (0.22249, 0.71687, 0.06061),
                     (0.01392, 0.09708, 0.71410)])  # fmt: skip
    linear = (picture[0, [0, 40]] / 255) ** 2.2 @ (np.linalg.inv(srgb) @ to_xyz).T
    truth = 255 * np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 0) ** (1 / 2.4) - 0.055
    )
    came = read_image(path)[16, [8, 56]]
    assert np.abs(came - truth).max() < (3 if suffix == "jpg" else 1)
    assert np.abs(picture[0, [0, 40]] - truth).max() > 8


def test_primaries_that_a_png_names_are_brought_to_bt709(tmp_path: Path) -> None:
    from PIL import PngImagePlugin

    picture = np.zeros((8, 16, 3), np.uint8)
    picture[:, :8], picture[:, 8:] = (200, 120, 60), (90, 160, 140)
    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes([9, 13, 0, 1]))
    Image.fromarray(picture).save(tmp_path / "a.png", pnginfo=info)
    truth = 255 * ((picture / 255) ** 2.4 @ TO_709.T).clip(0, 1) ** (1 / 2.4)
    assert np.abs(read_image(tmp_path / "a.png") - truth).max() < 1


def test_srgb_s_own_profile_changes_nothing(tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)


@pytest.mark.parametrize(
    "profile", [b"no profile at all", display_p3()[:150], display_p3(b"CMYK"), bytes(400)]
)
def test_a_profile_that_cannot_be_used_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, profile: bytes
) -> None:
    picture = np.full((8, 8, 3), (200, 120, 60), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png", icc_profile=profile)
    with caplog.at_level(logging.WARNING, "sora_engine"):
        np.testing.assert_array_equal(read_image(tmp_path / "a.png"), picture)
    assert "profile is not applied" in caplog.text


@pytest.mark.parametrize(("transfer", "name"), [(PQ, "PQ"), (HLG, "HLG")])
def test_stills_that_say_they_are_hdr_are_refused(tmp_path: Path, transfer: int, name: str) -> None:
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add(b"cICP", bytes([9, transfer, 0, 1]))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=info)
    profile = display_p3(cicp=transfer)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", icc_profile=profile)
    for suffix in ("png", "jpg"):
        with pytest.raises(MediaError, match=rf"HDR picture \({name}\)"):
            read_image(tmp_path / f"a.{suffix}")
