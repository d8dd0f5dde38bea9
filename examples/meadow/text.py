"""Train the meadow's text encoder to say what captions say, in a few minutes of one CPU core.

    python -m examples.meadow.text --out runs/meadow-text

Captions are made here from a small grammar, with synonyms, other orders and parts left out; the
target of each of a caption's tokens is the caption's `code`: a 1 in each group of values. So the
transformer need not learn to read while it learns to draw. Writes `OUT/model.safetensors`.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import T5Tokenizer

from examples.meadow.world import BERRIES, GROUNDS, PAINTS, Look
from examples.sprites.encoder import TEXT_DIM, encode, new_text_encoder, word_tokenizer
from examples.sprites.training import Muon, say

GROUPS = (("", *GROUNDS), ("", *BERRIES), ("", *PAINTS))
"""What a caption says: the colours of ground, berries and paint; "" is "left out"."""
PLACES = ("meadow", "field", "land", "place", "world")
FRUITS = ("berries", "fruit", "fruits")
GREEN = {"green": ("green", "grassy"), "sandy": ("sandy", "sand"), "snowy": ("snowy", "white")}
FILLERS = ("a", "an", "the", "with", "and", "of", "in", "to", "there", "are", "on")


def new_tokenizer() -> T5Tokenizer:
    """Every word that captions use is one token."""
    grounds = {way for ways in GREEN.values() for way in ways}
    return word_tokenizer(
        grounds | {*FILLERS, *PLACES, *FRUITS, *GROUNDS, *BERRIES, *PAINTS, "paint", "painted"}
    )


def code(said: tuple[str, str, str]) -> Tensor:
    """`[TEXT_DIM]`: a 1 in each group."""
    out, at = torch.zeros(TEXT_DIM), 0
    for group, value in zip(GROUPS, said, strict=True):
        out[at + group.index(value)] = 1.0
        at += len(group)
    return out


def caption_of(rng: random.Random, look: Look, *, plain: bool = False) -> tuple[str, Tensor]:
    """A caption of a look, and the code of what it says of it. plain: the look's own caption."""
    whole = (look.ground, look.berries, look.paint)
    if plain:
        return look.caption(), code(whole)
    ground, berries, paint = (value if rng.random() < 0.85 else "" for value in whole)
    adjective = rng.choice(GREEN[ground]) + " " if ground else ""
    first = f"{rng.choice(('a ', 'the ', ''))}{adjective}{rng.choice(PLACES)}"
    others = [f"{berries} {rng.choice(FRUITS)}"] if berries else []
    others += [rng.choice((f"{paint} paint", f"painted {paint}"))] if paint else []
    rng.shuffle(others)
    joined = rng.choice((" and ", ", ")).join(others)
    text = f"{first}{rng.choice((' with ', ', '))}{joined}" if joined else first
    if rng.random() < 0.15:
        text = text.capitalize() + rng.choice((".", ""))
    return text, code((ground, berries, paint))


def read(states: Tensor) -> list[tuple[str, ...]]:
    """What codes `[n, TEXT_DIM]` say, group by group."""
    lengths = [len(group) for group in GROUPS]
    parts = states[:, : sum(lengths)].split(lengths, dim=1)
    best = torch.stack([part.argmax(dim=1) for part in parts], dim=1).tolist()
    return [tuple(g[i] for g, i in zip(GROUPS, row, strict=True)) for row in best]


def some_caption(rng: random.Random) -> tuple[str, Tensor]:
    if rng.random() < 0.03:
        return "", code(("", "", ""))
    look = Look(rng.choice([*GROUNDS]), rng.choice([*BERRIES]), rng.choice([*PAINTS]))
    return caption_of(rng, look, plain=rng.random() < 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--captions", type=int, default=128, help="a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    rng, tokenizer = random.Random(0), new_tokenizer()
    model = new_text_encoder(tokenizer)
    tables = ("shared.weight", *(n for n, _ in model.named_parameters() if "relative" in n))
    optimiser = Muon(dict(model.named_parameters()), adam=tables)
    for step in range(args.steps):
        pairs = [some_caption(rng) for _ in range(args.captions)]
        states = encode(model, tokenizer, [text for text, _ in pairs])
        error = torch.stack(
            [
                (own - target).pow(2).sum(dim=1).mean()
                for own, (_, target) in zip(states, pairs, strict=True)
            ]
        ).mean()
        error.backward()
        optimiser.step(args.rate * min(1.0, (step + 1) / 50, 1.2 * (1 - step / args.steps)))
        if (step + 1) % 50 == 0 or step + 1 == args.steps:
            said = read(torch.stack([own[0] for own in states]).detach())
            meant = read(torch.stack([target for _, target in pairs]))
            hits = sum(a == b for a, b in zip(said, meant, strict=True))
            say(f"step {step + 1}: error {error.item():.4f}, read right {hits / len(pairs):.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(weights, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
