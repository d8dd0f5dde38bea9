"""The parts of the sprites' training that a mistake would spoil without an error."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "sprites"))

import clips
import condense
import mean_of_states
import model as sprites_model
import reader
import train_text
import train_transformer
import train_vae
import training
import world
from encoder import encode
from text import new_tokenizer

from sora_engine.denoise.packing import Packer, Segment

BUNDLED = train_transformer.BUNDLED


@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (32, 32)])
def test_orthogonal_is_near_the_polar_factor(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    found = training.orthogonal(matrix)
    values = torch.linalg.svdvals(found.float())
    assert values.max() < 1.35
    assert values.median() > 0.65
    assert torch.cosine_similarity(found.float().flatten(), (left @ right).flatten(), dim=0) > 0.95


def test_resuming_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    def new() -> tuple[nn.Module, training.Muon]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        return net, training.Muon(dict(net.named_parameters()))

    def steps(net: nn.Module, optimiser: training.Muon, count: int, first: int = 0) -> None:
        for i in range(first, first + count):
            data = torch.randn(16, 6, generator=torch.Generator().manual_seed(i))
            (net(data) - data[:, :2]).pow(2).mean().backward()
            optimiser.step(0.01)

    straight, optimiser = new()
    steps(straight, optimiser, 6)
    halved, optimiser = new()
    steps(halved, optimiser, 3)
    training.save(tmp_path / "state.pt", optimiser.state_dict())
    resumed, optimiser = new()
    optimiser.load_state_dict(torch.load(tmp_path / "state.pt"))
    steps(resumed, optimiser, 3, first=3)
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_optimiser_learns() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 6))
    optimiser = training.Muon(dict(net.named_parameters()))
    data = torch.randn(64, 6)
    losses = []
    for _ in range(150):
        loss = (net(data) - data.flip(1)).pow(2).mean()
        loss.backward()
        optimiser.step(0.01)
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]


def test_given_frames_are_some_but_never_all() -> None:
    rng = random.Random(0)
    for _ in range(500):
        t = rng.randrange(2, 10)
        known = clips.known_frames(rng, t)
        assert len(known) == t
        assert not all(known)


def test_noise_levels_are_zero_where_frames_are_given_and_equal_elsewhere_mostly() -> None:
    rng = random.Random(1)
    scene = world.sample_scene(rng, 64, 64)
    clip = clips.Clip(scene, torch.zeros(24, 5, 8, 8), 0)
    stage = clips.STAGES["all"]
    levels = [clips.noise_levels(rng, clip, stage) for _ in range(600)]
    given = [level for level in levels if (level == 0).any()]
    assert 0.24 < len(given) / 600 < 0.36
    assert all((level < 1.0001).all() and (level > 0).any() for level in levels)
    assert all(len(level[level > 0].unique()) == 1 for level in given)


def test_windows_from_the_middle_are_mere_noise_only_where_they_go_on_from_something() -> None:
    rng = random.Random(1)
    scene = world.sample_scene(rng, 64, 64)
    window = clips.Clip(scene, torch.zeros(24, 5, 8, 8), 2)
    levels = [clips.noise_levels(rng, window, clips.STAGES["long"]) for _ in range(600)]
    given = [level for level in levels if (level == 0).any()]
    assert 0.69 < len(given) / 600 < 0.81
    assert max(float(level.max()) for level in given) > 0.99
    assert max(float(level.max()) for level in levels if (level > 0).all()) < 0.96
    # Most go on from the one to three latents before them, as windows of a long video do.
    heads = [sum(level == 0) for level in given if level[0] == 0 and (level.diff() >= 0).all()]
    assert len([n for n in heads if n <= 3]) / len(given) > 0.6


def test_anchors_show_the_scene_and_what_has_strayed_another(tmp_path: Path) -> None:
    stage = dataclasses.replace(
        clips.STAGES["long"], short_sides=(64,), lengths=(9,), two_sprites=0, later=1, anchored=1
    )
    vae = train_vae.load_vae(BUNDLED / "vae").eval()
    pool = clips.Pool(vae, stage, random.Random(3), tmp_path / "none", 12)
    made = [pool.make() for _ in range(12)]
    for clip in made:
        (sprite,) = clip.scene.sprites
        assert clip.anchors.shape == (24, clips.ANCHORS, *clip.latents.shape[2:])
        # They are from the midst of a clip: the decoder takes the first for a beginning.
        shown = reader.read(clips.to_frames(vae, clip.anchors.float())[1:]).sprites[0]
        assert (shown.colour, shown.shape) == (sprite.colour, sprite.shape)
    strayed = [clip for clip in made if clip.strayed is not None]
    assert 1 <= len(strayed) < 12
    for clip in strayed:
        assert clip.strayed.shape == clip.latents.shape
        assert not torch.allclose(clip.strayed, clip.latents, atol=0.05)


def test_what_strays_is_one_thing_at_a_time() -> None:
    rng = random.Random(5)
    kinds = set()
    for _ in range(200):
        scene = world.sample_scene(rng, 64, 64)
        other, share = clips.stray(rng, scene)
        assert 0.1 <= share <= 1
        assert other.background == scene.background
        if len(other.sprites) < len(scene.sprites):
            kinds.add("fades")
            assert share <= 0.5
            continue
        before, after = map(dataclasses.asdict, (scene.sprites[0], other.sprites[0]))
        (changed,) = (name for name in before if before[name] != after[name])
        assert after["colour"] != scene.background
        kinds.add(changed)
    assert kinds == {"fades", "shape", "size", "colour", "swing"}


def test_a_perturbation_is_of_one_thing_and_its_smaller_part() -> None:
    rng = random.Random(6)
    most: dict[str, float] = {}
    for _ in range(600):
        scene = world.sample_scene(rng, 64, 64)
        other, share = clips.perturbing(rng, scene)
        assert (other.background, other.height) == (scene.background, scene.height)
        if len(other.sprites) < len(scene.sprites):
            most["fades"] = share
            continue
        before, after = map(dataclasses.asdict, (scene.sprites[0], other.sprites[0]))
        (changed,) = (name for name in before if before[name] != after[name])
        most[changed] = share
        if changed in ("x", "y"):
            assert abs(after[changed] - before[changed]) in (world.GRID, 2 * world.GRID)
    assert most.keys() == {"fades", "shape", "size", "colour", "swing", "x", "y", "phase"}
    assert {name for name, share in most.items() if share >= 0.5} == {"fades", "swing"}


def test_a_perturbed_clip_is_mostly_itself() -> None:
    rng = random.Random(7)
    perturbation = clips.Perturbation(torch.ones(24, 5, 4, 4), 0.4)
    kinds = set()
    for _ in range(100):
        mixed = perturbation.mixed(rng, torch.zeros(24, 5, 4, 4))
        shares = mixed[0, :, 0, 0]
        assert (mixed == shares[:, None, None]).all()
        assert shares.sum() < 0.5 * 5 + 0.4
        assert len(shares.unique()) == 1 or (shares > 0.4).sum() <= 2
        assert 0 <= shares.min() <= 0.4
        kinds.add(len(shares.unique()) > 1)
    assert kinds == {True, False}
    for t in (1, 2):
        short = clips.Perturbation(torch.ones(24, t, 4, 4), 0.4).mixed(
            rng, torch.zeros(24, t, 4, 4)
        )
        assert 0 < short.max() <= 0.4
    still = clips.Perturbation(torch.ones(24, 5, 4, 4), 0.4).mixed(rng, torch.ones(24, 5, 4, 4))
    torch.testing.assert_close(still, torch.ones(24, 5, 4, 4))
    whole = clips.Perturbation(torch.ones(24, 1, 4, 4), 1.0).mixed(rng, torch.zeros(24, 1, 4, 4))
    assert (whole == 1).all()


def test_some_clips_of_the_last_stage_are_perturbed(tmp_path: Path) -> None:
    stage = dataclasses.replace(clips.STAGES["long"], short_sides=(64,), longest_side=64)
    vae = train_vae.load_vae(BUNDLED / "vae").eval()
    made = [clips.Pool(vae, stage, random.Random(i), tmp_path / "no", 1).make() for i in range(12)]
    perturbed = [clip for clip in made if clip.perturbation is not None]
    assert 1 <= len(perturbed) < 12
    for clip in perturbed:
        assert clip.perturbation.latents.shape == clip.latents.shape
        assert not torch.allclose(clip.perturbation.latents, clip.latents, atol=0.05)


def test_a_sprite_that_swings_less_stays_on_its_way() -> None:
    frames = torch.arange(16.0)
    for motion in ("bounces", "orbits", "grows"):
        whole = world.Sprite("red", "circle", "small", motion, 32.0, 32.0, 0.0)
        half = dataclasses.replace(whole, swing=0.5)
        for full, less in zip(whole.path(frames), half.path(frames), strict=True):
            spread, smaller = float(full.max() - full.min()), float(less.max() - less.min())
            assert smaller == pytest.approx(spread / 2, abs=1e-4)


def test_a_caption_tells_of_a_scene_as_often_as_asked() -> None:
    rng = random.Random(2)
    scenes = [world.sample_scene(rng, 64, 64, sprites=1) for _ in range(400)]
    for chance in (0.5, 0.9):
        told = [scene.sprites[0].shape in scene.caption(rng, tells=chance) for scene in scenes]
        assert abs(sum(told) / 400 - chance) < 0.08
    sparse = [(scene, scene.caption(rng, tells=0.9, looks=0.2)) for scene in scenes]
    looks = [scene.sprites[0].colour in text.split(" on ")[0] for scene, text in sparse]
    sizes = [scene.sprites[0].size in text for scene, text in sparse]
    motions = [world.MOTIONS[scene.sprites[0].motion] in text for scene, text in sparse]
    assert abs(sum(looks) / 400 - 0.2) < 0.08
    assert sum(sizes) / 400 < 0.28
    assert abs(sum(motions) / 400 - 0.9) < 0.08


def test_targets_are_laid_out_as_the_engine_unpacks_predictions() -> None:
    latents = torch.randn(24, 3, 4, 6)
    tokens = sprites_model.as_targets(latents)
    torch.testing.assert_close(sprites_model.from_targets(tokens, latents.shape), latents)
    from sora_engine.denoise.packing import unpatchify

    torch.testing.assert_close(unpatchify(tokens, (3, 2, 3), (1, 2, 2), 24), latents)


def test_condensed_latents_are_the_same_code_in_other_axes() -> None:
    config = train_vae.CONFIG | {"base_dim": 4, "z_dim": 6, "dim_mult": [1, 2, 2]}
    config |= {"latents_mean": [0.1 * i for i in range(6)], "latents_std": [0.5] * 6}
    torch.manual_seed(0)
    vae = train_vae.WanVAE(train_vae.WanVAEConfig(**config)).eval().requires_grad_(False)
    whole, matrix, offset = condense.condense(vae, 6, clips=4, probed=2)
    video = world.sample_scene(random.Random(1), 64, 64).render(9).permute(3, 0, 1, 2)[None] * 2 - 1
    old = vae.encode(video, latents_per_call=None)
    new = whole.encode(video, latents_per_call=None)
    mapped = torch.einsum("ij,bj...->bi...", matrix, old) + offset[:, None, None, None]
    torch.testing.assert_close(new, mapped, rtol=1e-3, atol=1e-3)
    # Borders too, where the decoder pads its latents with zeros.
    torch.testing.assert_close(
        whole.decode(new, latents_per_call=None),
        vae.decode(old, latents_per_call=None),
        rtol=1e-3,
        atol=1e-3,
    )
    # The first axes are those that pixels depend on most.
    fewer, _, _ = condense.condense(vae, 3, clips=4, probed=2)
    kept = fewer.decode(fewer.encode(video, latents_per_call=None), latents_per_call=None)
    error = (kept - vae.decode(old, latents_per_call=None)).pow(2).mean()
    zero = vae.decode(torch.zeros_like(old), latents_per_call=None)
    assert error < 0.3 * (zero - vae.decode(old, latents_per_call=None)).pow(2).mean()


def test_given_frames_carry_no_loss_and_all_parts_learn() -> None:
    torch.manual_seed(0)
    rng = random.Random(2)
    net = sprites_model.Sprites()
    packer = Packer((1, 2, 2), torch.device("cpu"), max_layouts=1)
    batch = [
        clips.Clip(world.sample_scene(rng, 64, 64), torch.randn(24, t, 4, 4), 0) for t in (1, 3, 3)
    ]
    loss = train_transformer.loss_of(net, packer, batch, rng, clips.STAGES["all"])
    loss.backward()
    assert net.transformer.proj_out.weight.grad.abs().sum() > 0
    with torch.no_grad():
        net.transformer.proj_out.weight.normal_(std=0.02)
    train_transformer.loss_of(net, packer, batch, rng, clips.STAGES["all"]).backward()
    learning = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    assert not any(n.startswith("text.") for n, _ in learning)  # it was trained before
    silent = [n for n, p in learning if p.grad is None or not p.grad.abs().sum()]
    # Attention does not see a bias of all keys of a query (nor, then, the text keys' bias).
    assert [n for n in silent if "to_k.bias" not in n] == []


def showings(clip: clips.Clip) -> Iterator[tuple[float, Segment]]:
    """The loss of a model that predicts 0, and what it saw of a clip, a dozen times."""
    seen = []

    class Kept(Packer):
        def pack(self, segments):
            seen.extend(segments)
            return super().pack(segments)

    torch.manual_seed(0)
    net = sprites_model.Sprites()  # whose predictions are 0 at first
    packer = Kept((1, 2, 2), torch.device("cpu"), max_layouts=1)
    stage = clips.STAGES["long"]
    for seed in range(12):
        with torch.no_grad():
            loss = train_transformer.loss_of(net, packer, [clip], random.Random(seed), stage)
        yield float(loss), seen.pop()


def test_anchors_are_seen_as_such_and_carry_no_loss() -> None:
    """What a window goes on from is what has strayed; what it is to make is the scene."""
    # In an anchor's or a given frame's place of the targets these would be felt.
    clip = clips.Clip(
        world.sample_scene(random.Random(2), 64, 64),
        latents=torch.ones(24, 5, 4, 4),
        later=2,
        anchors=torch.full((24, 2, 4, 4), 300.0),
        strayed=torch.full((24, 5, 4, 4), 200.0),
    )
    for loss, segment in showings(clip):
        assert loss == pytest.approx(1, abs=1e-5)
        levels = segment.timesteps
        assert segment.num_anchors == 2
        assert levels[:2].tolist() == [0, 0]
        assert float((segment.latents[:, :2] - 300).abs().max()) < 60
        given = segment.latents[:, 2:][:, levels[2:] == 0]
        assert (given - 200).abs().lt(80).all()


def test_what_is_noised_of_a_perturbed_clip_is_its_perturbation() -> None:
    """What is given of it, and what it is to make, is the clip."""
    clip = clips.Clip(
        world.sample_scene(random.Random(2), 64, 64),
        latents=torch.ones(24, 5, 4, 4),
        later=0,
        perturbation=clips.Perturbation(torch.full((24, 5, 4, 4), 1e4), 1.0),
    )
    given = 0
    for loss, segment in showings(clip):
        assert loss == pytest.approx(1, abs=1e-5)
        noised = segment.timesteps > 0
        given += int((~noised).sum())
        assert segment.latents[:, noised].float().mean() > 20
        assert (segment.latents[:, ~noised].float().abs() < 4).all()
    assert given


def test_cross_attention_starts_on_words_not_on_padding() -> None:
    """Of the 512 places that Wan's cross-attention sees, all but a dozen are padding."""
    net = sprites_model.Sprites(BUNDLED / "text_encoder")
    caption = "a red circle moves right on a white background"
    keys = net.contexts([caption])[0].sources["text"]
    block = net.transformer.blocks[0]
    torch.manual_seed(0)
    y = torch.randn(50, 192)
    q = torch.nn.functional.rms_norm(block.attn2.to_q(y), (192,), block.attn2.norm_q.weight)
    q = q.unflatten(1, (4, 48))
    words = torch.einsum("nhd,khd->nhk", q, keys.keys[0]) / 48**0.5
    padding = torch.einsum("nhd,hd->nh", q, keys.padding_keys[0]) / 48**0.5
    share = words.exp().sum(2) / (words.exp().sum(2) + keys.padding * padding.exp())
    assert keys.padding == 512 - words.shape[2]
    assert share.median() > 0.9


def test_the_text_encoder_says_what_captions_say() -> None:
    net = sprites_model.Sprites(BUNDLED / "text_encoder")
    rng = random.Random(12)

    def score(plain: bool, count: int) -> float:
        pairs = [train_text.sample_caption(rng, plain=plain) for _ in range(count)]
        states = encode(net.text, net.tokenizer, [caption for caption, _ in pairs])
        right = 0
        for state, (_, code) in zip(states, pairs, strict=True):
            right += set(train_text.read(state)) == set(train_text.read(code[None]))
        return right / count

    assert score(plain=True, count=200) == 1.0
    assert score(plain=False, count=200) > 0.95


def test_the_mean_of_states_is_of_their_averaged_weights(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.pt" for i in range(3)]
    weights = [{"w": torch.randn(4, 3).half(), "b": torch.randn(5)} for _ in paths]
    for path, average in zip(paths, weights, strict=True):
        training.save(path, {"average": average, "optimiser": {}, "step": 1, "seconds": 1.0})
    mean = mean_of_states.mean_weights(paths)
    for name, value in mean.items():
        want = sum(average[name].double() for average in weights) / 3
        torch.testing.assert_close(value, want.float())


def test_every_word_of_the_world_is_one_token() -> None:
    tokenizer = new_tokenizer()
    rng = random.Random(0)
    for _ in range(100):
        caption = world.sample_scene(rng, 64, 64).caption(rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 1, caption
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id not in tokenizer("An astronaut, riding 2 horses!").input_ids
