"""What the watermark costs, and when it is read: the tables of docs/provenance.md.

    python benchmarks/watermark.py          # two minutes of one core

Pictures are 832x480. CPU seconds are counted, so that a busy machine makes no difference. A clip is
read as it was written and after x264 at preset medium. `smooth` is a still ramp of grey, on which a
mark is seen best; `slow` is a smooth ground that grows brighter.
"""

from __future__ import annotations

import argparse
import io
import time

import av
import numpy as np

from sora_engine.io.watermark import Watermark

WIDTH, HEIGHT, FRAMES = 832, 480, 12
PASSES = (("crf 28", 28, 1.0), ("crf 23, half size", 23, 0.5), ("crf 28, half size", 28, 0.5))


def clips() -> dict[str, np.ndarray]:
    """Three grounds without texture, uint8 [frames, height, width, 3]."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    ramp = np.rint(60 + 130 * columns / (WIDTH - 1))
    waves = 90 + 60 * np.sin(columns / 400) + 40 * np.cos(rows / 300)
    frames = np.arange(FRAMES)[:, None, None]
    slow = np.rint(waves + 0.7 * frames)[..., None] * np.array([1.0, 0.95, 0.9])
    return {
        "smooth": np.broadcast_to(ramp[None, :, :, None], (FRAMES, HEIGHT, WIDTH, 3)).astype(
            np.uint8
        ),
        "slow": np.clip(slow, 0, 255).astype(np.uint8),
        "one colour": np.full((FRAMES, HEIGHT, WIDTH, 3), (90, 140, 200), np.uint8),
    }


def encoded(frames: np.ndarray, crf: int, scale: float) -> np.ndarray:
    """Frames after H.264."""
    file, height, width = io.BytesIO(), int(HEIGHT * scale), int(WIDTH * scale)
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.pix_fmt, stream.height, stream.width = "yuv420p", height, width
        stream.options = {"crf": str(crf), "preset": "medium"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture = picture.reformat(width, height, "yuv420p", dst_colorspace="itu709")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
    file.seek(0)
    with av.open(file) as container:
        decoded = (f.reformat(format="rgb24", src_colorspace="itu709") for f in container.decode())
        return np.stack([frame.to_ndarray() for frame in decoded])


def psnr(before: np.ndarray, after: np.ndarray) -> float:
    error = float(np.mean((before.astype(np.float64) - after) ** 2))
    return float(10 * np.log10(255**2 / error))


def told(mark: Watermark, frames: np.ndarray) -> str:
    found = mark.read(frames)
    sure = found.payload == mark.payload and found.marked
    return f"{'read' if sure else 'not'}, {found.agreeing} bits, {found.chance:.0e}"


def seconds_a_frame(rounds: int) -> tuple[float, float]:
    """CPU seconds to write the mark into a frame, and to read it: medians."""
    frame = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    mark, wrote, read = Watermark(), [], []
    for _ in range(rounds):
        begun = time.process_time()
        after = mark.embed(frame)
        between = time.process_time()
        mark.read([after])
        wrote.append(between - begun)
        read.append(time.process_time() - between)
    return float(np.median(wrote)), float(np.median(read))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strengths", type=float, nargs="+", default=[1.0, 0.75, 0.6])
    parser.add_argument("--rounds", type=int, default=41)
    given = parser.parse_args()
    wrote, read = seconds_a_frame(given.rounds)
    print(
        f"a frame of {WIDTH}x{HEIGHT}: {1e3 * wrote:.0f} ms to write, {1e3 * read:.0f} ms to read"
    )
    print()
    names = " | ".join(name for name, _, _ in PASSES)
    print(f"| ground, strength | PSNR | most levels | as written | {names} |")
    print("|---|---|---|---|" + "---|" * len(PASSES))
    for name, clip in clips().items():
        for strength in given.strengths:
            mark = Watermark(0x1234, strength=strength)
            after = np.stack([mark.embed(frame) for frame in clip])
            most = int(np.abs(after.astype(int) - clip).max())
            cells = [told(mark, after)]
            cells += [told(mark, encoded(after, crf, scale)) for _, crf, scale in PASSES]
            shown = f"| {name}, {strength:g} | {psnr(clip, after):.1f} dB | {most} |"
            print(shown, " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
