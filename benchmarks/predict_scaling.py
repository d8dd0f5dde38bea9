"""Prints the table of docs/parallel.md: predicted steps of Wan 14B over many H200s.

PYTHONPATH=.:kernels python benchmarks/predict_scaling.py
"""

from __future__ import annotations

from sora_engine.distributed.layout_cost import TransformerCost, VideoCost, layouts_by_cost

WAN_14B = TransformerCost(layers=40, heads=40, head_dim=128, ffn=13824, patch_channels=64)
VIDEOS = {
    "5 s": VideoCost(frames=21, height=90, width=160),
    "60 s": VideoCost(frames=241, height=90, width=160, window=21, overlap=5),
}


def main() -> None:
    print("| video | GPUs | layout | s a step | of linear | MB sent a rank | GB a rank |")
    print("|---|---|---|---|---|---|---|")
    for name, video in VIDEOS.items():
        alone = layouts_by_cost(1, WAN_14B, video)[0].step_s
        for gpus in (1, 8, 64, 512):
            best = layouts_by_cost(gpus, WAN_14B, video)[0]
            share = alone / gpus / best.step_s
            print(
                f"| {name} | {gpus} | {best.layout} | {best.step_s:.3f} | {share:.0%} "
                f"| {best.largest_sent / 1e6:.0f} | {best.memory_bytes / 1e9:.0f} |"
            )


if __name__ == "__main__":
    main()
