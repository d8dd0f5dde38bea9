"""What each quantisation of the sprites checkpoint loses, against float32, from weights to pixels.

    python benchmarks/quantised_error.py -o benchmarks/results/quantised-error.json

Of each form: relative error of the blocks' weights, relative error of final latents and PSNR of
frames over the same prompts and seeds, and how often the reader finds what a prompt names. Files
are made by `sora quantize`, and those of GGUF types that it does not write by the gguf package,
which the tests install. `--forms` takes some of them. Videos are kept in `--keep FOLDER`, twenty to
a file: a run that was ended goes on from there. `--memory 11` loads a transformer of Wan 1.3B's
width from files of random weights instead, and says what it holds.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.bench.models import WanShape
from sora_engine.io.atomic import write_atomically
from sora_engine.io.safetensors import Weights
from sora_engine.models.quantised import Keeper, held_bytes
from sora_engine.models.quantising import quantise_model
from sora_engine.models.wan.checkpoint import TransformerSource
from sora_engine.models.wan.config import WanConfig
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.names import to_wan_name

ROOT = Path(__file__).resolve().parents[1]
SPRITES = ROOT / "sora_engine/checkpoints/sprites"
sys.path.insert(0, str(ROOT / "examples/sprites"))

import evaluate  # noqa: E402 - the example's own

SETTINGS = ("height", "width", "fps", "solver", "guidance_scale")
TOGETHER = 20
"""Clips that are made, and kept, at a time."""
BLOCKS = {"Q8_0": 32, "Q5_1": 32, "Q5_0": 32, "Q4_1": 32, "Q4_0": 32}


def gguf_file(path: Path, kind: str, tensors: dict[str, torch.Tensor]) -> float:
    """Blocks' matrices in that type by the gguf package; returns their relative error."""
    import gguf

    form = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch="wan")
    lost = whole = 0.0
    for name, value in tensors.items():
        chosen = name.startswith("blocks.") and name.endswith(".weight") and value.ndim == 2
        own = form if chosen else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(value.float().numpy(), own)
        writer.add_tensor(name, data, raw_dtype=own)
        if chosen:
            read = gguf.quants.dequantize(data, own)
            lost += float(np.square(read - value.float().numpy(), dtype=np.float64).sum())
            whole += float(np.square(value.float().numpy(), dtype=np.float64).sum())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return math.sqrt(lost / whole)


def forms(folder: Path, only: Sequence[str] = ()) -> Iterator[tuple[str, Path, str, float]]:
    """Name, file, dtype and error of the weights; of `only`, where it names some."""

    def is_wanted(*names: str) -> bool:
        return not only or any(name in only for name in names)

    for to, suffix in (("int8", "safetensors"), ("fp8", "safetensors"), ("q8_0", "gguf")):
        kept = to.upper() if to == "q8_0" else f"{to}, kept"
        lossy = f"{to}, {to} products"
        if not is_wanted(kept, *([lossy, f"{lossy}, bfloat16"] if to == "int8" else [])):
            continue
        path = folder / f"{to}.{suffix}"
        report = quantise_model("sprites", path, to)
        if is_wanted(kept):
            yield kept, path, "as-stored:float32", report.error
        if to == "int8":
            for name, dtype in ((lossy, "int8:float32"), (f"{lossy}, bfloat16", "int8:bfloat16")):
                if is_wanted(name):
                    yield name, path, dtype, report.error
    blocks = [kind for kind in BLOCKS if kind != "Q8_0" and is_wanted(kind)]
    if blocks:
        with Weights.open(SPRITES / "transformer/diffusion_pytorch_model.safetensors") as weights:
            tensors = {to_wan_name(n): weights.read(n, dtype=torch.float32) for n in weights}
    for kind in blocks:
        path = folder / f"{kind}.gguf"
        yield kind, path, "as-stored:float32", gguf_file(path, kind, tensors)


Made = list[tuple[torch.Tensor, np.ndarray]]
"""Latents and frames of each clip."""


def measure(
    path: Path | str, dtype: str, count: int, options: dict[str, Any], keep: Path | None
) -> tuple[Made, dict[str, Any]]:
    """Videos of held-out prompts, and what the reader finds in them.

    keep: the folder of what was made before; it is taken for the same settings alone.
    """
    components = None if path == "sprites" else SPRITES
    scenes = evaluate.scenes_of((64, 64), count, seed=1)
    made: Made = []
    right: dict[str, float] = {}
    with ExitStack() as stack:
        engine: sora.Engine | None = None
        for low in range(0, count, TOGETHER):
            part = scenes[low : low + TOGETHER]
            key = json.dumps([Path(path).name, dtype, low, len(part), options], sort_keys=True)
            file = keep and keep / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
            if file and file.exists():
                new, found = torch.load(file, weights_only=False)
                _add(made, right, new, found, count)
                continue
            if engine is None:
                engine = stack.enter_context(
                    sora.Engine.from_pretrained(
                        path, components=components, device="cpu", dtype=dtype
                    )
                )
            requests = [
                sora.VideoRequest(scene.caption(size=True), seed=low + i, **options)
                for i, scene in enumerate(part)
            ]
            new = [(video.latents, video.frames) for video in engine.generate(requests)]
            found = evaluate.table(part, [frames for _, frames in new])["right"]
            _add(made, right, new, found, count)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                content = io.BytesIO()
                torch.save((new, found), content)
                write_atomically(file, content.getvalue())
                print(f"{Path(path).name}, {dtype}: {low + len(part)} of {count}", flush=True)
    return made, right


def _add(
    made: Made, right: dict[str, float], new: Made, found: dict[str, float], count: int
) -> None:
    """Put a part beside the others, its shares by its clips."""
    made += new
    for name, share in found.items():
        right[name] = right.get(name, 0.0) + share * len(new) / count


def compare(made: Made, exact: Made) -> dict[str, float]:
    """Latents: relative error over all. Frames: PSNR and mean difference of 8-bit values."""
    pairs = list(zip(made, exact, strict=True))
    lost = sum(float((latents - due).square().sum()) for (latents, _), (due, _) in pairs)
    whole = sum(float(due.square().sum()) for due, _ in exact)
    away = [np.abs(frames.astype(np.float64) - due) for (_, frames), (_, due) in pairs]
    error = float(np.mean([np.square(one).mean() for one in away]))
    return {
        "latents": math.sqrt(lost / whole),
        "psnr_db": 10 * math.log10(255**2 / error) if error else math.inf,
        "levels": float(np.mean([one.mean() for one in away])),
    }


def errors(
    count: int, options: dict[str, Any], only: Sequence[str] = (), keep: Path | None = None
) -> dict[str, dict[str, Any]]:
    exact, found = measure("sprites", "float32", count, options, keep)
    rows: dict[str, dict[str, Any]] = {"float32": {"right": found}}
    if not only or "bfloat16" in only:
        made, found = measure("sprites", "bfloat16", count, options, keep)
        rows["bfloat16"] = {**compare(made, exact), "right": found}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SPRITES / "transformer/config.json", folder)
        for name, path, dtype, weights in forms(Path(folder), only):
            made, found = measure(path, dtype, count, options, keep)
            rows[name] = {"weights": weights, **compare(made, exact), "right": found}
    return rows


def row(name: str, told: dict[str, Any]) -> str:
    def shown(key: str, form: str) -> str:
        return form.format(told[key]) if key in told else "-"

    right = told["right"]["colour, shape and motion"]
    return (
        f"| {name} | {shown('weights', '{:.2%}')} | {shown('latents', '{:.2%}')} | "
        f"{shown('psnr_db', '{:.1f} dB')} | {shown('levels', '{:.1f}')} | {right:.1%} |"
    )


def read_once(path: Path) -> np.ndarray:
    """All of a file, into memory that it takes for that."""
    held = np.empty(path.stat().st_size, np.uint8)
    view, done = memoryview(held), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view[done:]):
            done += count
    return held


def wan_file(folder: Path, form: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A file of random bytes whose blocks' matrices have that form, and all else is bf16."""
    rng = np.random.default_rng(0)

    def is_chosen(name: str) -> bool:
        return name.startswith("blocks.") and name.endswith(".weight") and len(shapes[name]) == 2

    if form in ("bf16", "int8", "fp8"):
        tensors: dict[str, torch.Tensor] = {}
        stored = {"bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[form]
        for name, shape in shapes.items():
            own = stored if is_chosen(name) else torch.bfloat16
            raw = rng.integers(0, 60, (*shape[:-1], own.itemsize * shape[-1]), dtype=np.uint8)
            tensors[to_wan_name(name)] = torch.from_numpy(raw).view(own)
            if own != torch.bfloat16:
                scale = torch.full((shape[0], 1) if form == "int8" else (), 1e-3)
                tensors[to_wan_name(name) + "_scale"] = scale
        save_file(tensors, folder / "wan.safetensors")
        return folder / "wan.safetensors"
    import gguf

    kind = gguf.GGMLQuantizationType[form]
    values, size = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(folder / "wan.gguf", arch="wan", use_temp_file=True)
    for name, shape in shapes.items():
        own = kind if is_chosen(name) else gguf.GGMLQuantizationType.BF16
        width = shape[-1] // values * size if is_chosen(name) else 2 * shape[-1]
        raw = rng.integers(0, 60, (*shape[:-1], width), dtype=np.uint8)
        writer.add_tensor(to_wan_name(name), raw, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "wan.gguf"


def memory(layers: int) -> Iterator[tuple[str, int, float, float]]:
    """Of a transformer of Wan 1.3B's width, by the form of its file: live bytes after loading it,
    the seconds which that takes, and those of reading the file once into fresh memory. Medians of
    seven in turns, the file in the page cache."""
    config = WanConfig(**replace(WanShape(), layers=layers).transformer_config())
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in WanTransformer(config).state_dict().items()}
    for form in ("bf16", "int8", "fp8", "Q8_0", "Q4_K"):
        with tempfile.TemporaryDirectory() as folder:
            path = wan_file(Path(folder), form, shapes)
            times: list[tuple[float, float]] = []
            for turn in range(8):
                with torch.device("meta"):
                    transformer = WanTransformer(config)
                transformer = transformer.to(torch.bfloat16).eval().requires_grad_(False)
                keep = Keeper("as-stored", transformer.block_lists)
                source = TransformerSource(path, config)
                begun = time.perf_counter()
                source.load(transformer, dtype=torch.bfloat16, keep=keep)
                loaded = time.perf_counter()
                held = held_bytes(transformer)
                del transformer
                again = time.perf_counter()
                whole = read_once(path)
                if turn:  # the first brings the file into the page cache
                    times.append((loaded - begun, time.perf_counter() - again))
                del whole
            load_s, read_s = (statistics.median(side) for side in zip(*times, strict=True))
            yield form, held, load_s, read_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--frames", type=int, help="of a clip; the checkpoint's own by default")
    parser.add_argument("--steps", type=int, help="likewise")
    parser.add_argument("--memory", type=int, metavar="LAYERS", help="11 are 1 GB in bf16")
    parser.add_argument("--forms", nargs="*", default=(), help="some forms of the table; all")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="videos made, to go on from")
    args = parser.parse_args()
    if args.memory:
        dense = 0
        for form, held, load_s, read_s in memory(args.memory):
            dense = dense or held
            print(
                f"{form}: {held / 1e9:.3f} GB, {held / dense:.3f} of bf16; loaded in "
                f"{load_s:.3f} s, its file read once in {read_s:.3f} s"
            )
        return
    # A file by itself does not bring the folder's defaults.
    own = json.loads((SPRITES / "generation_config.json").read_text())
    options = {name: own[name] for name in SETTINGS}
    options["num_frames"] = args.frames or own["num_frames"]
    options["num_inference_steps"] = args.steps or own["num_inference_steps"]
    rows = errors(args.clips, options, args.forms, args.keep)
    print("| form | weights | latents | frames | levels | colour, shape and motion right |")
    print("|---|---|---|---|---|---|")
    for name, told in rows.items():
        print(row(name, told))
    if args.output is not None:
        write_atomically(args.output, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
