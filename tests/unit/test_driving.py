"""Worlds in the packed batch: action rows, places in rotary embedding, frames that are recalled."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sora_engine.denoise.canvas import Canvas, Known
from sora_engine.denoise.conditioning import Context, Prompts
from sora_engine.denoise.drive import Drive, sight
from sora_engine.denoise.packing import ANCHOR_GAP, Packer, Segment
from sora_engine.errors import CheckpointError
from sora_engine.models.wan.config import WORLD_CLASS_NAME, WanConfig
from sora_engine.models.wan.embedders import rope_tables
from sora_engine.models.wan.model import WanTransformer
from sora_engine.models.wan.shapes import infer_config
from sora_engine.request import Guidance, KnownMode
from sora_engine.samplers import SamplerConfig, make_solver

CPU = torch.device("cpu")
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 20,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}
WORLD = WanConfig(**SIZES, action_dim=5, rope_pairs=(2, 2, 2, 2, 2), rope_theta=20.0)


def sharpened(config: WanConfig, seed: int = 3) -> WanTransformer:
    """A transformer of random weights that are large enough for all of it to count."""
    torch.manual_seed(seed)
    model = WanTransformer(config, text_tokens=16).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "scale_shift_table" in name:
            parameter.normal_(0.0, 0.3)
        elif parameter.dim() > 1:
            parameter.normal_(0.0, 1.2 / math.sqrt(parameter[0].numel()))
    return model


def a_text(model: WanTransformer, seed: int, tokens: int = 4) -> Context:
    torch.manual_seed(seed)
    (context,) = model.encode_contexts([{"text": torch.randn(tokens, 8)}])
    return context


def a_segment(text: Context, seed: int, recalled: int = 2, context: int = 3) -> Segment:
    torch.manual_seed(seed)
    frames = recalled + context + 1
    levels = torch.cat([torch.zeros(frames - 1), torch.tensor([700.0])])
    return Segment(
        torch.randn(3, frames, 4, 6),
        levels,
        ((text, frames),),
        sees=sight(recalled, context),
        num_anchors=recalled,
        actions=torch.eye(5)[torch.arange(frames) % 5],
        places=torch.randint(-6, 7, (frames, 2)).float(),
    )


def predict(model: WanTransformer, segments: list[Segment]) -> list[torch.Tensor]:
    packer = Packer((1, 2, 2), CPU)
    batch = packer.pack(segments)
    return packer.unpack(model(batch), batch, 3)


def reference(model: WanTransformer, segment: Segment, embedding: torch.Tensor) -> torch.Tensor:
    """The forward pass of one segment, in fp64 and dense, as the paper of Wan has it, with an
    embedding of actions beside that of the noise level and five coordinates in RoPE."""
    w = {name: p.double() for name, p in model.state_dict().items()}

    def linear(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def two(x, name, act):
        return linear(act(linear(x, name + ".linear_1")), name + ".linear_2")

    def gelu(x):
        return F.gelu(x, approximate="tanh")

    def norm(x):
        return F.layer_norm(x, x.shape[-1:], eps=1e-6)

    def rms(x, name):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name + ".weight"]

    C, T, H, W = segment.latents.shape
    h, v = H // 2, W // 2
    x = F.conv3d(
        segment.latents.double()[None], w["patch_embedding.weight"], w["patch_embedding.bias"],
        stride=(1, 2, 2),
    )[0].flatten(1).T  # fmt: skip
    frame = torch.arange(T).repeat_interleave(h * v)
    row = torch.arange(h).repeat_interleave(v).repeat(T).double()
    column = torch.arange(v).repeat(T * h).double()
    time = (frame + ANCHOR_GAP * (frame >= segment.num_anchors)).double()
    place = segment.places.double()[frame]
    five = [time, row, column, 2 * row + place[:, 0], 2 * column + place[:, 1]]
    frequencies = 20.0 ** -(torch.arange(2).double() / 2)
    angle = torch.cat([a[:, None] * frequencies for a in five], dim=1)

    def turned(q):  # neighbouring channels are the two parts of a complex number
        q = torch.view_as_complex(q.unflatten(-1, (2, 10, 2)).contiguous())
        return torch.view_as_real(q * torch.polar(torch.ones_like(angle), angle)[:, None]).flatten(
            1
        )

    def attend(q, k, val, mask=None):
        q, k, val = (t.unflatten(-1, (2, 20)).transpose(0, 1) for t in (q, k, val))
        return F.scaled_dot_product_attention(q, k, val, attn_mask=mask).transpose(0, 1).flatten(1)

    steps = torch.exp(-math.log(10_000.0) * torch.arange(8).double() / 8)
    level = segment.timesteps.double()[:, None] * steps
    embedder = "condition_embedder."
    e = two(torch.cat([level.cos(), level.sin()], 1), embedder + "time_embedder", F.silu)
    e = e + two(segment.actions.double(), embedder + "action_embedder", F.silu)
    table = linear(F.silu(e), embedder + "time_proj").unflatten(-1, (6, -1))[frame]
    text = torch.cat([embedding.double(), torch.zeros(16 - len(embedding), 8).double()])
    text = two(text, embedder + "text_embedder", gelu)
    mask = segment.sees[frame][:, frame]
    for i in range(2):
        b = f"blocks.{i}."
        m = (table + w[b + "scale_shift_table"]).unbind(1)
        y = norm(x) * (1 + m[1]) + m[0]
        q, k = (rms(linear(y, f"{b}attn1.to_{n}"), f"{b}attn1.norm_{n}") for n in "qk")
        y = attend(turned(q), turned(k), linear(y, b + "attn1.to_v"), mask)
        x = x + m[2] * linear(y, b + "attn1.to_out.0")
        y = norm(x) * w[b + "norm2.weight"] + w[b + "norm2.bias"]
        q = rms(linear(y, b + "attn2.to_q"), b + "attn2.norm_q")
        k = rms(linear(text, b + "attn2.to_k"), b + "attn2.norm_k")
        x = x + linear(attend(q, k, linear(text, b + "attn2.to_v")), b + "attn2.to_out.0")
        y = norm(x) * (1 + m[4]) + m[3]
        x = x + m[5] * linear(gelu(linear(y, b + "ffn.net.0.proj")), b + "ffn.net.2")
    shift, scale = (w["scale_shift_table"] + e[frame][:, None]).unbind(1)
    x = linear(norm(x) * (1 + scale) + shift, "proj_out")
    x = x.reshape(T, h, v, 1, 2, 2, C).permute(6, 0, 3, 1, 4, 2, 5)
    return x.reshape(C, T, H, W)


def test_a_driven_transformer_is_its_dense_reference():
    model = sharpened(WORLD)
    torch.manual_seed(5)
    words = torch.randn(4, 8)
    (text,) = model.encode_contexts([{"text": words}])
    segment = a_segment(text, 6)
    (actual,) = predict(model, [segment])
    expected = reference(model, segment, words)
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 1e-5
    # Each of the three counts.
    for other in (
        {"actions": torch.zeros(6, 5)},
        {"places": torch.zeros(6, 2)},
        {"sees": torch.ones(6, 6, dtype=torch.bool)},
    ):
        changed = Segment(**{**fields_of(segment), **other})
        moved = (predict(model, [changed])[0] - actual).norm() / actual.norm()
        assert moved > 1e-3, other


def fields_of(segment: Segment) -> dict[str, object]:
    return {name: getattr(segment, name) for name in Segment.__slots__}


def test_sessions_in_one_batch_are_each_as_alone():
    model = sharpened(WORLD)
    texts = [a_text(model, seed) for seed in (1, 2)]
    segments = [
        a_segment(texts[0], 3),
        a_segment(texts[1], 4, recalled=0, context=1),
        a_segment(texts[0], 5, recalled=3, context=2),
        # One that nothing drives: no action, one place, all seen.
        Segment(torch.randn(3, 2, 4, 4), torch.full((2,), 300.0), ((texts[1], 2),)),
    ]
    together = predict(model, segments)
    for segment, packed in zip(segments, together, strict=True):
        (alone,) = predict(model, [segment])
        assert (packed - alone).norm() / alone.norm() < 1e-5


def test_no_action_is_an_action_of_zeros_and_a_new_embedder_changes_nothing():
    model = sharpened(WORLD)
    text = a_text(model, 1)
    latents, levels = torch.randn(3, 2, 4, 4), torch.tensor([0.0, 500.0])
    (plain,) = predict(model, [Segment(latents, levels, ((text, 2),))])
    zeros = Segment(latents, levels, ((text, 2),), actions=torch.zeros(2, 5))
    assert predict(model, [zeros])[0].equal(plain)
    # Training begins with a last layer of zeros: then it is the model without actions, bit for bit.
    last = model.condition_embedder.action_embedder.linear_2
    last.weight.zero_()
    last.bias.zero_()
    acting = Segment(latents, levels, ((text, 2),), actions=torch.eye(5)[:2])
    quiet = predict(model, [acting])[0]
    model.condition_embedder.action_embedder = None
    assert predict(model, [Segment(latents, levels, ((text, 2),))])[0].equal(quiet)


def test_rows_are_of_distinct_levels_and_actions():
    text = Context()
    actions = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    levels = torch.tensor([0.0, 0.0, 0.0, 250.0])
    driven = Segment(torch.randn(3, 4, 2, 2), levels, ((text, 4),), actions=actions)
    # Levels of every token, and no actions: zeros.
    plain = Segment(torch.randn(3, 1, 2, 4), torch.tensor([[[0.0, 250.0]]]), ((text, 1),))
    batch = Packer((1, 2, 2), CPU).pack([driven, plain])
    rows = torch.cat([batch.timesteps[:, None], batch.actions], dim=1)
    read = rows[batch.video.rows]
    assert read.tolist() == [
        [0.0, 0.0, 1.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
        [250.0, 0.0, 1.0],
        [0.0, 0.0, 0.0],
        [250.0, 0.0, 0.0],
    ]
    assert len(rows) == len(set(map(tuple, rows.tolist()))) == 5
    assert batch.timesteps.equal(batch.timesteps.sort().values)
    other = Segment(torch.randn(3, 1, 2, 2), torch.zeros(1), ((text, 1),), actions=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"of one width, got \[2, 3\]"):
        Packer((1, 2, 2), CPU).pack([driven, other])


def test_a_place_is_a_shift_of_where_in_the_world_a_token_lies():
    """A view that lies two tokens further right has, at a column, the world position that the other
    has two columns on."""
    coords = torch.tensor([[0, 1, c] for c in range(6)])
    right = torch.tensor([[0.0, 4.0]]).expand(6, 2)
    here, there = (torch.stack(rope_tables(coords, WORLD, at)) for at in (None, right))
    view, world = slice(0, 6), slice(6, 10)
    assert there[:, :, view].equal(here[:, :, view])
    assert there[:, :4, world].equal(here[:, 2:, world])
    assert not there[:, :4, world].equal(here[:, :4, world])


def test_a_driven_canvas_denoises_its_newest_frame_alone():
    """A canvas lays out the segment that a session means: what is recalled, what is known, and one
    frame at the step's level."""
    model = sharpened(WORLD)
    text = a_text(model, 1)
    recalled, known = torch.randn(3, 2, 4, 4), torch.randn(3, 3, 4, 4)
    mask = torch.tensor([True, True, False])[:, None, None].expand(3, 4, 4)
    config = SamplerConfig(solver="euler", space="flow", prediction_type="flow_prediction")
    solver = make_solver(config, num_inference_steps=2)
    drive = Drive(recalled, torch.eye(5), torch.arange(10.0).reshape(5, 2), sight(2, 2))
    canvas = Canvas(
        latents=known,
        noise=known,
        solver=solver,
        prompts=Prompts(({"text": torch.zeros(1, 8)},), (0, 0, 0), None),
        guidances=(Guidance(),),
        patch_size=(1, 2, 2),
        known=Known(KnownMode.NOISE_LEVEL, known, mask),
        contexts={0: [text]},
        drive=drive,
    )
    (window,) = canvas.windows()
    segment = canvas.segment(window, 0, conditional=True)
    assert segment.latents.equal(torch.cat([recalled, known], dim=1))
    assert segment.timesteps.tolist() == [0.0, 0.0, 0.0, 0.0, canvas.timestep]
    assert segment.contexts == ((text, 5),)
    assert (segment.num_anchors, segment.sees, segment.actions, segment.places) == (
        2,
        drive.sees,
        drive.actions,
        drive.places,
    )


def test_what_is_past_sees_itself_alone():
    assert sight(1, 2, 2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [0, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


def test_the_configuration_is_read_back_and_checked():
    values = WORLD.to_dict()
    assert values["_class_name"] == WORLD_CLASS_NAME
    assert WanConfig.from_dict(values) == WORLD
    plain = WanConfig(**SIZES).to_dict()
    assert not {"action_dim", "rope_pairs", "rope_theta"} & set(plain)
    with pytest.raises(CheckpointError, match=r"unknown configuration keys .'action_dim'"):
        WanConfig.from_dict({**plain, "action_dim": 5})
    for change, words in (
        ({"rope_pairs": [2, 2, 2, 2, 3]}, r"five positive integers that add up to 10"),
        ({"rope_pairs": [5, 5]}, "five positive integers"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0; it must be a number above 1"),
        ({"action_dim": 0}, "action_dim is 0; it must be a positive integer or null"),
        ({"action_dim": None}, "action_dim is missing"),
        ({"rope_pairs": None}, "a model that is driven needs both"),
    ):
        with pytest.raises(CheckpointError, match=words):
            WanConfig.from_dict({**values, **change})
    shapes = {name: tuple(p.shape) for name, p in sharpened(WORLD).named_parameters()}
    with pytest.raises(CheckpointError, match=r"a folder with transformer/config\.json would work"):
        infer_config(shapes, head_dim=20)


def test_what_attention_plans_is_kept_while_frames_see_alike():
    text = Context()
    packer = Packer((1, 2, 2), CPU)

    def plans(seen: torch.Tensor | None) -> dict[object, object]:
        segment = Segment(torch.randn(3, 4, 2, 2), torch.zeros(4), ((text, 4),), sees=seen)
        return packer.pack([segment]).video.sparse_plans

    first = plans(sight(1, 2))
    assert plans(sight(1, 2)) is first
    assert plans(sight(0, 3)) is first  # the two see alike
    other = plans(torch.ones(4, 4, dtype=torch.bool).tril())
    assert other is not first
    assert plans(sight(1, 2)) is not first
    assert plans(None) is not other
