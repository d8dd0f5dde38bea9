"""The autoencoder's decode against diffusers' `AutoencoderKLWan` on one GPU, interleaved.

    python benchmarks/bench_vae_gpu.py [--sizes 480x832,720x1280] [--latents 21] [--rounds 5]
                                       [--json FILE]

Four sides with the same random weights, in bf16: diffusers as it comes, diffusers with its weights
channels-last, ours kernel by kernel, and ours with the steady step as a CUDA graph. They take turns
round by round, in another order each time; a ratio is of one round. Memory is the most that torch's
allocator held beside the weights: ours streams, and lets each frame go as it comes; diffusers
returns the whole video. `--device cpu` with small sizes is for trying the script out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench_vae import add_to, circumstances, make
from torch import Tensor

from sora_engine.vae import stream_decode
from sora_engine.vae.cuda_graph import GraphedVAE
from sora_engine.vae.wan import WanVAE

EAGER = "diffusers"
Side = Callable[[Tensor], None]


def sides(base_dim: int, device: torch.device, dtype: torch.dtype) -> dict[str, Side]:
    """What is compared, each as a function of normalised latents."""
    oracle, ours = make(base_dim)
    oracle.to(device, dtype)
    ours.to(device, dtype).prepare()
    last = copy.deepcopy(oracle)
    for module in last.modules():
        if isinstance(module, torch.nn.Conv3d):
            module.to(memory_format=torch.channels_last_3d)
        elif isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)

    def streamed(coder: WanVAE | GraphedVAE) -> Side:
        def run(latents: Tensor) -> None:
            for _ in stream_decode(coder, latents):
                pass

        return run

    found: dict[str, Side] = {
        EAGER: lambda latents: oracle.decode(ours.denormalise(latents)),
        "diffusers, channels-last": lambda latents: last.decode(
            ours.denormalise(latents).contiguous(memory_format=torch.channels_last_3d)
        ),
        "sora_engine": streamed(ours),
    }
    if device.type == "cuda":
        found["sora_engine, CUDA graph"] = streamed(GraphedVAE(ours, required=True))
    return found


def measure(run: Side, latents: Tensor) -> tuple[float, int]:
    """Seconds, and the peak of bytes beside what was held before (0 without a GPU)."""
    if latents.device.type != "cuda":
        begin = time.perf_counter()
        run(latents)
        return time.perf_counter() - begin, 0
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    run(latents)
    torch.cuda.synchronize()
    return time.perf_counter() - begin, torch.cuda.max_memory_allocated() - held


def compare(found: dict[str, Side], latents: Tensor, rounds: int) -> dict[str, object]:
    """Medians of each side, and its ratios to eager diffusers over `rounds`."""
    seconds: dict[str, list[float]] = {name: [] for name in found}
    peaks = dict.fromkeys(found, 0)
    for index in range(rounds + 1):  # the first one lays out weights and picks algorithms
        names = list(found)
        names = names[index % len(names) :] + names[: index % len(names)]
        for name in names:
            took, peak = measure(found[name], latents)
            if index:
                seconds[name].append(took)
                peaks[name] = max(peaks[name], peak)
    results: dict[str, object] = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds[EAGER], times, strict=True)]
        results[name] = {
            "seconds": times,
            "ratios": ratios,
            "peak_bytes": peaks[name],
        }
        print(
            f"{name}: {statistics.median(times):.3f} s, {statistics.median(ratios):.2f} times as "
            f"fast as {EAGER} ({min(ratios):.2f} to {max(ratios):.2f}), peak "
            f"{peaks[name] / 2**30:.2f} GiB",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-dim", type=int, default=96)
    parser.add_argument("--sizes", default="480x832,720x1280", help="pixels")
    parser.add_argument("--latents", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    results: list[object] = []
    with torch.inference_mode():
        found = sides(args.base_dim, device, dtype)
        for size in args.sizes.split(","):
            height, width = (int(side) // 8 for side in size.split("x"))
            latents = torch.randn(1, 16, args.latents, height, width, device=device, dtype=dtype)
            print(f"{args.latents} latents of {size} pixels, {dtype}", flush=True)
            sides_of = compare(found, latents, args.rounds)
            results.append({"name": f"decode {args.latents} latents, {size}", "sides": sides_of})
    if args.json:
        where = circumstances(torch.get_num_threads())
        if device.type == "cuda":
            where["gpu"] = torch.cuda.get_device_name(device)
        add_to(args.json, {**where, "dtype": str(dtype), "results": results})


if __name__ == "__main__":
    main()
