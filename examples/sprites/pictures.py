"""The README's moving picture, and a sheet of its stills, made from prompts by the command line.

    python examples/sprites/pictures.py --gif docs/sprites.gif --stills stills.png

Each prompt is one `sora generate` at the default settings; clips stand side by side. A GIF over the
budget is an error, and is not kept.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from sheets import sheet

from sora_engine.cli import main as sora
from sora_engine.io.video_reader import read_video
from sora_engine.io.video_writer import write_video

PROMPTS = (
    "a large red circle moves right on a white background",
    "a large blue star orbits on a yellow background",
    "a large green square bounces on a black background",
    "a large purple diamond moves up on a gray background",
    "an orange triangle grows on a blue background",
    "a large white star moves left on a green background",
)
COLUMNS = 3
BUDGET_KB = 600


def clips_of(args: argparse.Namespace, folder: Path) -> list[np.ndarray]:
    """One clip a prompt, by `sora generate`, each with its own seed."""
    options = ["--model", args.model, "--size", args.size, "--frames", str(args.frames)]
    made = []
    for seed, prompt in enumerate(PROMPTS, start=args.seed):
        out = folder / str(seed)
        seeded = [*options, "--fps", str(args.fps), "--seed", str(seed)]
        if code := sora(["generate", prompt, *seeded, "-o", str(out)]):
            raise SystemExit(code)
        made.append(read_video(out)[0])
    return made


def side_by_side(clips: list[np.ndarray], edge: int = 2) -> np.ndarray:
    """Clips of one size as one: uint8 `[n, rows * height, COLUMNS * width, 3]`, white between."""
    framed = [
        np.pad(c, ((0, 0), (edge, edge), (edge, edge), (0, 0)), constant_values=255) for c in clips
    ]
    starts = range(0, len(clips), COLUMNS)
    lines = [np.concatenate(framed[i : i + COLUMNS], axis=2) for i in starts]
    return np.concatenate(lines, axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sprites", help="'sprites' or a folder")
    parser.add_argument("--size", default="64x64", help="WIDTHxHEIGHT of each clip")
    parser.add_argument("--frames", type=int, default=17, help="of each clip; all play together")
    parser.add_argument("--fps", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0, help="of the first clip, then one more each")
    parser.add_argument("--gif", type=Path, default=Path("docs/sprites.gif"))
    parser.add_argument("--stills", type=Path, help="a sheet for the eye")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        clips = clips_of(args, Path(folder))
    write_video(args.gif, side_by_side(clips), args.fps)
    size_kb = args.gif.stat().st_size / 1000
    if size_kb > BUDGET_KB:
        args.gif.unlink()
        raise SystemExit(
            f"{args.gif} would take {size_kb:.0f} kB, over {BUDGET_KB}: fewer --frames would do"
        )
    print(f"{args.gif}: {size_kb:.0f} kB")
    if args.stills is not None:
        sheet(clips, columns=9).save(args.stills, optimize=True)


if __name__ == "__main__":
    main()
