"""Train the sprites' text encoder to say what captions say, in five minutes of one CPU core.

    python examples/sprites/train_text.py --out runs/text

Captions are made here from a small grammar, with synonyms, words in between and attributes left
out; the target of each of a caption's tokens is the caption's `code` (see `text.py`). Writes
`OUT/model.safetensors`.
"""

from __future__ import annotations

import argparse
import random
import string
from pathlib import Path

import torch
import world
from encoder import new_text_encoder
from safetensors.torch import save_file
from text import CODE_DIM, GROUNDS, GROUPS, WORDS, code, new_tokenizer
from torch import Tensor
from training import Muon, say


def sample_caption(rng: random.Random, *, plain: bool = False) -> tuple[str, Tensor]:
    """A caption and its code. `plain`: put as the world itself puts it."""
    if rng.random() < 0.02:
        return "", code([], "")

    def way(word: str) -> str:
        ways = WORDS.get(word, (word,))
        return ways[0] if plain or rng.random() < 0.6 else rng.choice(ways)

    def either(values: list[str], chance: float) -> str:
        return rng.choice(values) if rng.random() < chance else ""

    said, phrases = [], []
    for _ in range(2 if rng.random() < 0.4 else 1):
        colour, shape = either([*world.COLOURS], 0.9), either([*world.SHAPES], 0.9)
        size, motion = either([*world.SIZES], 0.5), either([*world.MOTIONS], 0.9)
        said.append((colour, shape, size, motion))
        words = [way(word) for word in (size, colour) if word] + [way(shape)]
        article = "an" if words[0][0] in "aeiou" else "a"
        if not plain and rng.random() < 0.25:
            article = rng.choice(["the", ""])
        moves = [way(motion)] if motion else []
        if moves and not plain and rng.random() < 0.1:
            moves.insert(0, rng.choice(["that", "is"]))
        phrases.append(" ".join(word for word in (article, *words, *moves) if word))
    text, background = " and ".join(phrases), either([*world.BACKGROUNDS], 0.85)
    if background:
        ground = GROUNDS[0] if plain or rng.random() < 0.6 else rng.choice(GROUNDS)
        ground = ground.format(way(background))
        before = not plain and rng.random() < 0.1
        text = f"{ground}, {text}" if before else f"{text} {ground}"
    return (text if plain else _disturb(rng, text)), code(said, background)


def _disturb(rng: random.Random, text: str) -> str:
    """Capitals, a full stop, and at times a word that says nothing."""
    if rng.random() < 0.1:
        words = text.split()
        noise = "".join(rng.choices(string.ascii_lowercase, k=rng.randrange(2, 8)))
        words.insert(rng.randrange(len(words) + 1), noise)
        text = " ".join(words)
    if rng.random() < 0.15:
        text = text.title() if rng.random() < 0.3 else text.capitalize()
    return text + "." if rng.random() < 0.1 else text


def read(states: Tensor) -> list[tuple[str, ...]]:
    """What codes `[n, TEXT_DIM]` say, group by group."""
    parts = states[:, :CODE_DIM].split([len(group) for group in GROUPS], dim=1)
    best = torch.stack([part.argmax(dim=1) for part in parts], dim=1).tolist()
    return [tuple(g[i] for g, i in zip(GROUPS, row, strict=True)) for row in best]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--captions", type=int, default=192, help="a step")
    parser.add_argument("--rate", type=float, default=2e-3)
    args = parser.parse_args()
    rng, tokenizer = random.Random(0), new_tokenizer()
    model = new_text_encoder(tokenizer)
    tables = ("shared.weight", *(n for n, _ in model.named_parameters() if "relative" in n))
    optimiser = Muon(dict(model.named_parameters()), adam=tables)
    for step in range(args.steps):
        plain = rng.random() < 0.3
        pairs = [sample_caption(rng, plain=plain) for _ in range(args.captions)]
        rows = tokenizer([text for text, _ in pairs], padding=True, return_tensors="pt")
        states = model(**rows).last_hidden_state
        target = torch.stack([target for _, target in pairs])[:, None].expand_as(states)
        keep = rows.attention_mask.bool()
        loss = (states[keep] - target[keep]).pow(2).sum(dim=1).mean()
        loss.backward()
        optimiser.step(args.rate * min(1.0, (step + 1) / 50, 1.2 * (1 - step / args.steps)))
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            with torch.no_grad():
                hits = [a == b for a, b in zip(read(states[:, 0]), read(target[:, 0]), strict=True)]
            say(f"step {step + 1}: error {loss:.4f}, all read right {sum(hits) / len(hits):.1%}")
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(weights, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
