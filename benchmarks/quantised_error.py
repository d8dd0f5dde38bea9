"""What each quantisation of the sprites checkpoint loses, against float32, from weights to pixels.

    python benchmarks/quantised_error.py -o benchmarks/results/quantised-error.json

Of each form: relative error of the blocks' weights, relative error of final latents and PSNR of
frames over the same prompts and seeds, and how often the reader finds what a prompt names. Files
are made by `sora quantize`, and those of GGUF types that it does not write by the gguf package,
which the tests install. `--memory 11` loads a transformer of Wan 1.3B's width from files of random
weights instead, and says what it holds.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
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


def forms(folder: Path) -> Iterator[tuple[str, Path, str, float]]:
    """Name, file, dtype and error of the weights."""
    for to, suffix in (("int8", "safetensors"), ("fp8", "safetensors"), ("q8_0", "gguf")):
        path = folder / f"{to}.{suffix}"
        report = quantise_model("sprites", path, to)
        yield to.upper() if to == "q8_0" else f"{to}, kept", path, "as-stored:float32", report.error
        if to == "int8":
            yield "int8, int8 products", path, "int8:float32", report.error
    with Weights.open(SPRITES / "transformer/diffusion_pytorch_model.safetensors") as weights:
        tensors = {to_wan_name(name): weights.read(name, dtype=torch.float32) for name in weights}
    for kind in BLOCKS:
        if kind != "Q8_0":
            path = folder / f"{kind}.gguf"
            yield kind, path, "as-stored:float32", gguf_file(path, kind, tensors)


def measure(
    path: Path | str, dtype: str, count: int, options: dict[str, Any]
) -> tuple[list[sora.Video], dict[str, Any]]:
    """Videos of held-out prompts, and what the reader finds in them."""
    components = None if path == "sprites" else SPRITES
    scenes = evaluate.scenes_of((64, 64), count, seed=1)
    with sora.Engine.from_pretrained(
        path, components=components, device="cpu", dtype=dtype
    ) as engine:
        videos = [
            engine.generate(sora.VideoRequest(scene.caption(size=True), seed=i, **options))
            for i, scene in enumerate(scenes)
        ]
    found = evaluate.table(scenes, [video.frames for video in videos])["right"]
    return videos, found


def compare(videos: list[sora.Video], exact: list[sora.Video]) -> dict[str, float]:
    """Latents: relative error over all. Frames: PSNR of 8-bit values."""
    pairs = list(zip(videos, exact, strict=True))
    lost = sum(float((v.latents - e.latents).square().sum()) for v, e in pairs)
    whole = sum(float(e.latents.square().sum()) for e in exact)
    frames = [np.square(v.frames.astype(np.float64) - e.frames) for v, e in pairs]
    error = float(np.mean([f.mean() for f in frames]))
    psnr = 10 * math.log10(255**2 / error) if error else math.inf
    return {"latents": math.sqrt(lost / whole), "psnr_db": psnr}


def errors(count: int, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    exact, found = measure("sprites", "float32", count, options)
    rows: dict[str, dict[str, Any]] = {"float32": {"right": found}}
    videos, found = measure("sprites", "bfloat16", count, options)
    rows["bfloat16"] = {**compare(videos, exact), "right": found}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(SPRITES / "transformer/config.json", folder)
        for name, path, dtype, weights in forms(Path(folder)):
            videos, found = measure(path, dtype, count, options)
            rows[name] = {"weights": weights, **compare(videos, exact), "right": found}
            print(row(name, rows[name]), flush=True)
    return rows


def row(name: str, told: dict[str, Any]) -> str:
    def shown(key: str, form: str) -> str:
        return form.format(told[key]) if key in told else "-"

    right = told["right"]["colour, shape and motion"]
    return (
        f"| {name} | {shown('weights', '{:.2%}')} | {shown('latents', '{:.2%}')} | "
        f"{shown('psnr_db', '{:.1f} dB')} | {right:.0%} |"
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
    print("| form | weights | latents | frames | colour, shape and motion right |")
    print("|---|---|---|---|---|")
    # A file by itself does not bring the folder's defaults.
    own = json.loads((SPRITES / "generation_config.json").read_text())
    options = {name: own[name] for name in SETTINGS}
    options["num_frames"] = args.frames or own["num_frames"]
    options["num_inference_steps"] = args.steps or own["num_inference_steps"]
    rows = errors(args.clips, options)
    for name in ("float32", "bfloat16"):
        print(row(name, rows[name]))
    if args.output is not None:
        write_atomically(args.output, json.dumps(rows, indent=1).encode())


if __name__ == "__main__":
    main()
