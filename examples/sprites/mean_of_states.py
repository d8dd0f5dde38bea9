"""Export the mean of several states of one run: often better than each of them.

    python examples/sprites/mean_of_states.py --states runs/a.pt runs/b.pt --out runs/sprites

States along one way lie round about a better place (stochastic weight averaging, arXiv 1803.05407).
Copy a run's `state.pt` aside before it goes on, to have several.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from model import Sprites, export
from torch import Tensor
from train_transformer import BUNDLED


def mean_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the averaged weights of states that `train_transformer.py` saved."""
    states = [torch.load(path, map_location="cpu")["average"] for path in paths]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(dim=0)
        for name in states[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--states", nargs="+", type=Path, required=True)
    parser.add_argument("--vae", type=Path, default=BUNDLED / "vae", help="a VAE's folder")
    parser.add_argument("--text", type=Path, default=BUNDLED / "text_encoder")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    args = parser.parse_args()
    export(mean_weights(args.states), Sprites(args.text), args.vae, args.out)


if __name__ == "__main__":
    main()
