"""The autoencoder against diffusers' `AutoencoderKLWan`, on the CPU, interleaved.

    python benchmarks/bench_vae.py [--base-dim 96] [--sizes 16,32] [--latents 3] [--rounds 5]
                                   [--threads 2] [--encode] [--json FILE]
    python benchmarks/bench_vae.py --memory [--resident] [--lengths 5,21,81] ...

Both have the same random weights and threads and take turns round by round, each time in the other
order; the ratio of a round is paired, so that a machine that slows down slows both. CPU time is
reported beside wall time: it hardly notices who else is on the machine. `--memory` measures
decodes of these lengths, in latents: the most bytes of tensors that are alive at a time, beside
weights and latents, on meta tensors (so at any size), and with `--resident` how far the resident
size rises too, each in a process of its own, with the model and without, and what the whole process
takes. diffusers returns the whole video, so what it has to hold for that is told apart. `--json`
adds the measurements to FILE, with the machine, the versions and the commit; results/ holds such
files.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKLWan

from sora_engine.vae import stream_decode
from sora_engine.vae.meter import NoScores, StorageMeter
from sora_engine.vae.rehearsal import decode_memory
from sora_engine.vae.wan import WanVAE
from sora_engine.vae.wan_config import WanVAEConfig
from sora_kernels import csrc


def make(base_dim: int) -> tuple[AutoencoderKLWan, WanVAE]:
    torch.manual_seed(0)
    oracle = AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
    ours = WanVAE(WanVAEConfig.from_dict(dict(oracle.config))).eval().requires_grad_(False)
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours.prepare()


def timed(run: Callable[[], torch.Tensor]) -> tuple[float, float, torch.Tensor]:
    wall, cpu = time.perf_counter(), time.process_time()
    out = run()
    return time.perf_counter() - wall, time.process_time() - cpu, out


def compare(
    name: str, theirs: Callable[[], torch.Tensor], mine: Callable[[], torch.Tensor], rounds: int
) -> dict[str, object]:
    """Paired ratios (theirs / ours) over `rounds`."""
    pairs, difference = [], 0.0
    for index in range(rounds):
        order = [theirs, mine] if index % 2 == 0 else [mine, theirs]
        times = {run: timed(run) for run in order}
        pairs.append((times[theirs][:2], times[mine][:2]))
        want, got = times[theirs][2], times[mine][2]
        difference = max(difference, float((want - got).norm() / want.norm()))
    wall = [a[0] / b[0] for a, b in pairs]
    cpu = [a[1] / b[1] for a, b in pairs]
    result: dict[str, object] = {
        "name": name,
        "diffusers_s": statistics.median(a[0] for a, _ in pairs),
        "ours_s": statistics.median(b[0] for _, b in pairs),
        "wall_ratio": {"median": statistics.median(wall), "all": wall},
        "cpu_ratio": {"median": statistics.median(cpu), "all": cpu},
        "relative_difference": difference,
    }
    print(
        f"{name}: diffusers {result['diffusers_s']:.2f} s, ours {result['ours_s']:.2f} s, paired "
        f"ratio {statistics.median(wall):.2f} wall ({min(wall):.2f} to {max(wall):.2f}), "
        f"{statistics.median(cpu):.2f} CPU time; difference {difference:.1e}",
        flush=True,
    )
    return result


def resident(kind: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        found = re.search(kind + r":\s*(\d+) kB", file.read())
    assert found is not None
    return int(found[1]) * 1024


def peak(side: str, base_dim: int, size: int, latents: int) -> None:
    """Prints how far a decode of `latents` latent frames raises the resident size, how far the
    model and the decode together do, and the most that the whole process takes."""
    bare = resident("VmRSS")
    decode: Callable[[torch.Tensor], object]
    if side == "diffusers":
        oracle = AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
        decode = oracle.decode
    else:
        ours = WanVAE(WanVAEConfig(base_dim=base_dim)).eval().requires_grad_(False).prepare()

        def decode(video: torch.Tensor) -> None:
            for _ in stream_decode(ours, video):
                pass

    video = torch.randn(1, 16, latents, size, size)
    with torch.inference_mode():
        decode(video[:, :, :3, :2, :2])  # weights are laid out on the first run
        before, loading = resident("VmRSS"), resident("VmHWM")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
        decode(video)
    high = resident("VmHWM")
    print(high - before, high - bare, max(high, loading))


def alive(base_dim: int, size: int, lengths: list[int]) -> dict[str, object]:
    """The most bytes of tensors alive at a time, of both at several lengths, in fp32."""
    with torch.device("meta"):
        oracle = AutoencoderKLWan(base_dim=base_dim).eval().requires_grad_(False)
        ours = WanVAE(WanVAEConfig(base_dim=base_dim)).eval().requires_grad_(False)
    ours.prepare(onednn=False)

    def streamed(latents: torch.Tensor) -> None:
        state = None
        for latent in latents.split(1, dim=2):
            _, state = ours.decode_chunk(latent, state, consume=True)

    runs: dict[str, Callable[[torch.Tensor], object]] = {
        "diffusers": oracle.decode,
        "ours": streamed,
    }
    found: dict[str, dict[int, int]] = {name: {} for name in runs}
    for latents in lengths:
        z = torch.empty(1, 16, latents, size, size, device="meta")
        for name, run in runs.items():
            with torch.no_grad(), NoScores():
                run(z[:, :, :3])  # weights are laid out on the first run
                with StorageMeter([z, *oracle.parameters(), *ours.parameters()]) as meter:
                    run(z)
            peak_bytes = found[name][latents] = meter.peak
            print(f"{name}, {latents} latents of {size}x{size}, base_dim {base_dim}: "
                  f"{peak_bytes / 2**20:.2f} MiB of live tensors", flush=True)  # fmt: skip
    return {**memory_of(base_dim, size, lengths), "measure": "live tensors", "peak_bytes": found}


def resident_peak(
    base_dim: int, size: int, lengths: list[int], threads: int, rounds: int
) -> list[dict[str, object]]:
    """How far the resident size rises, of both at several lengths, each in a fresh process.

    Once where freed blocks go back to the system at once, so that the resident size is what is in
    use; and in turns with the allocator as it is, `rounds` times: there blocks fall as they may.
    """
    tight = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    sides = ("diffusers", "ours")

    def peaks_of(side: str, latents: int, env: dict[str, str]) -> list[int]:
        command = [sys.executable, __file__, "--peak", side, "--base-dim", str(base_dim)]
        command += ["--sizes", str(size), "--latents", str(latents), "--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, env=env, check=True)
        return [int(word) for word in done.stdout.split()[-3:]]

    measures = (
        "VmHWM of the decode", "VmHWM of the model and the decode", "VmHWM of the process",
        "VmHWM of the process, glibc's allocator as it is, median",
    )  # fmt: skip
    found: list[dict[str, dict[int, int]]] = [{side: {} for side in sides} for _ in measures]
    all_peaks: dict[str, dict[int, list[int]]] = {side: {} for side in sides}
    for latents in lengths:
        plain: dict[str, list[int]] = {side: [] for side in sides}
        for _ in range(rounds):
            for side in sides:
                plain[side].append(peaks_of(side, latents, dict(os.environ))[-1])
        for side in sides:
            rises = [*peaks_of(side, latents, tight), int(statistics.median(plain[side]))]
            for peaks, rise in zip(found, rises, strict=True):
                peaks[side][latents] = rise
            all_peaks[side][latents] = sorted(plain[side])
            print(f"{side}, {latents} latents of {size}x{size}, base_dim {base_dim}: resident "
                  f"{rises[0] / 2**20:.1f} MiB, with the model {rises[1] / 2**20:.1f} MiB, "
                  f"the process {rises[2] / 2**20:.1f} MiB, with freed blocks "
                  f"{rises[3] / 2**20:.1f} ({min(plain[side]) / 2**20:.1f} to "
                  f"{max(plain[side]) / 2**20:.1f}) MiB", flush=True)  # fmt: skip
    about = memory_of(base_dim, size, lengths)
    results: list[dict[str, object]] = [
        {**about, "measure": measure, "peak_bytes": peaks}
        for measure, peaks in zip(measures, found, strict=True)
    ]
    results[-1]["all_peak_bytes"] = all_peaks
    return results


def memory_of(base_dim: int, size: int, lengths: list[int]) -> dict[str, object]:
    """What a measurement of memory is about, and what it is held against."""
    config = WanVAEConfig(base_dim=base_dim)
    frame = 3 * 4 * (size * config.factor_spatial) ** 2
    return {
        "name": f"memory of decoding {size}x{size} latents, base_dim {base_dim}, fp32",
        "video_bytes": {n: frame * (1 + (n - 1) * config.factor_temporal) for n in lengths},
        "promised_bytes": decode_memory(config, size, size).peak,
    }


def output(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def circumstances(threads: int) -> dict[str, object]:
    """What a figure depends on: machine, versions, commit."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        cpu = re.search(r"model name\s*: (.*)", file.read())
    return {
        "cpu": cpu[1] if cpu else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "native_kernels": csrc.instruction_set(),
        "onednn_isa": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
        "changed": output("git", "status", "--porcelain", "--untracked-files=no").split("\n"),
        "utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def add_to(path: Path, record: dict[str, object]) -> None:
    records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*records, record], indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base-dim", type=int, default=96)
    parser.add_argument("--sizes", default="16,32")
    parser.add_argument("--latents", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--encode", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--resident", action="store_true")
    parser.add_argument("--lengths", default="5,21,81")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peak", choices=["diffusers", "ours"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = [int(size) for size in args.sizes.split(",")]
    if args.peak:
        peak(args.peak, args.base_dim, sizes[0], args.latents)
        return
    results: list[object] = []
    if args.memory:
        lengths = [int(length) for length in args.lengths.split(",")]
        results.append(alive(args.base_dim, sizes[0], lengths))
        if args.resident:
            results += resident_peak(args.base_dim, sizes[0], lengths, args.threads, args.rounds)
    else:
        oracle, ours = make(args.base_dim)
        with torch.inference_mode():
            warm = torch.randn(1, 16, 3, 8, 8)  # weights are laid out on the first run
            ours.encode(oracle.decode(warm).sample)
            ours.decode(warm)
            for size in sizes:
                latents = torch.randn(1, 16, args.latents, size, size)
                raw = ours.denormalise(latents)
                shape = f"{args.latents}x{size}x{size} latents, base_dim {args.base_dim}"
                results.append(
                    compare(
                        f"decode {shape}",
                        lambda raw=raw: oracle.decode(raw).sample,
                        lambda latents=latents: ours.decode(latents),
                        args.rounds,
                    )
                )
                if args.encode:
                    video = ours.decode(latents)
                    results.append(
                        compare(
                            f"encode {shape}",
                            lambda video=video: oracle.encode(video).latent_dist.mean,
                            lambda video=video: ours.encode_moments(video)[0],
                            args.rounds,
                        )
                    )
    if args.json:
        add_to(args.json, {**circumstances(args.threads), "results": results})


if __name__ == "__main__":
    main()
