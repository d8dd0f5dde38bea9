"""Ladders of few-step models: held against diffusers' scheduler at the same levels; who has one,
and what goes with it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as theirs_module
from safetensors.torch import save_file
from typer.testing import CliRunner

import sora_engine as sora
from sora_engine import tasks
from sora_engine.cli.app import app
from sora_engine.config import Limits
from sora_engine.denoise.canvas import solver_of
from sora_engine.denoise.denoise import prepare
from sora_engine.errors import CheckpointError, RequestError
from sora_engine.models.generation_config import GENERATION_CONFIG, on_ladder
from sora_engine.models.registry import BUNDLED, families, open_checkpoint
from sora_engine.models.wan.ladders import WAN_LADDERS as LADDERS
from sora_engine.request import GenerationDefaults, KnownMode, LatentGrid, resolve_request
from sora_engine.request.ladders import ladder_of_file
from sora_engine.samplers import SOLVERS, noise_for
from tests.parity.oracles import tiny_pipeline, tiny_transformer
from tests.unit.test_checkpoint import original_name

DEFAULTS = GenerationDefaults(
    height=64, width=64, num_frames=9, fps=16, num_inference_steps=50, guidance_scale=5.0,
    guidance_scale_2=3.0, negative_prompt="bad",
)  # fmt: skip
GRID = LatentGrid(channels=16, vae_spatial=8, patch=(1, 2, 2), time=4)
SMALL = {"height": 32, "width": 32, "num_frames": 5, "seed": 3}


families()  # theirs are known with them


def resolve(own=None, **values):
    defaults = on_ladder(replace(DEFAULTS, ladder=own))
    facts = SimpleNamespace(
        grid=GRID, defaults=defaults, known_mode=KnownMode.REPLACEMENT, labels=None
    )
    request = sora.VideoRequest(**{"prompt": "a", **values})
    return resolve_request(request, facts, Limits(), solvers=SOLVERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random pipelines by kind, made when they are asked for."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind)
            tiny_pipeline(kind, 0).save_pretrained(made[kind])
        return made[kind]

    return of


def v(sample, timestep):
    """A velocity that depends on both."""
    return torch.tanh(sample.flip(-1)) * (0.5 + timestep / 1000)


@pytest.mark.parametrize("name", LADDERS)
def test_each_is_diffusers_scheduler_at_its_levels(name, models, monkeypatch):
    with sora.Engine.from_pretrained(models("t2v"), device="cpu") as engine:
        model = engine.model
        request = resolve_request(
            sora.VideoRequest("a", ladder=name, **SMALL), model, Limits(), solvers=SOLVERS
        )
        solver = solver_of(request, model)
        canvas = prepare(request, model)
        plain = prepare(resolve_request(sora.VideoRequest("a", **SMALL), model, Limits()), model)
    ladder = LADDERS[name]
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=ladder.solver == "renoise")
    scheduler.set_timesteps(sigmas=list(ladder.sigmas))
    start = plain.latents.double()  # pure noise of the same seed
    ours = theirs = start * (ladder.sigmas[0] if ladder.scaled_start else 1.0)
    torch.testing.assert_close(canvas.latents, ours.float())
    state = solver.init()
    for i, timestep in enumerate(scheduler.timesteps):
        assert float(timestep) == pytest.approx(solver.schedule.timesteps[i], rel=1e-6)
        fresh = noise_for(request.seed, i, ours.shape).double()
        monkeypatch.setattr(theirs_module, "randn_tensor", lambda *_, fresh=fresh, **__: fresh)
        ours, state = solver.step(state, i, ours, v(ours, float(timestep)), noise=fresh)
        theirs = scheduler.step(v(theirs, float(timestep)), timestep, theirs).prev_sample.double()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert i == len(ladder.sigmas) - 1


def test_published_levels():
    """As their publishers print them."""
    assert LADDERS["lightx2v-4"].sigmas == pytest.approx((1, 0.9375, 0.83333, 0.625), abs=1e-5)
    rcm = (0.98765, 0.93378, 0.85290, 0.60898)
    assert LADDERS["rcm-4"].sigmas == pytest.approx(rcm, abs=1e-5)
    assert [name.rpartition("-")[2] for name in LADDERS] == [
        str(len(ladder.sigmas)) for ladder in LADDERS.values()
    ]


def test_it_brings_levels_solver_and_no_guidance():
    made = resolve(ladder="self-forcing-4")
    ladder = LADDERS["self-forcing-4"]
    assert (made.sigmas, made.solver, made.shift) == (ladder.sigmas, "renoise", 1.0)
    assert (made.num_inference_steps, made.guidance_scale, made.guidance_scale_2) == (4, 1.0, 1.0)
    assert (made.ladder, made.guided) == ("self-forcing-4", False)
    own = resolve(ladder="lightx2v-4", guidance_scale=2.0, solver="unipc", num_inference_steps=4)
    assert (own.guidance_scale, own.guidance_scale_2, own.solver) == (2.0, 2.0, "unipc")
    ruled = resolve(ladder="lightx2v-4", guidance=sora.Guidance(scale=3.0))
    assert ruled.guidance_scale == 3.0
    assert resolve().ladder == ""


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"ladder": "lightx2v"}, r"ladder 'lightx2v' is not known; there are lightx2v-4, self-"),
        ({"ladder": 4}, r"ladder 4 is not known"),
        (
            {"ladder": "fastwan-3", "num_inference_steps": 8},
            r"num_inference_steps is 8: ladder 'fastwan-3' has 3 steps .*; 3 would work, another "
            r"ladder \(lightx2v-4, .*\), or ladder='' for a schedule of any length",
        ),
        ({"ladder": "fastwan-3", "sigmas": (1.0, 0.5)}, r"sigmas and ladder 'fastwan-3'"),
        ({"ladder": "fastwan-3", "shift": 5.0}, r"shift is 5.0: .* shifted already; leave it out"),
    ],
)
def test_what_does_not_go_with_it(values, says):
    with pytest.raises(RequestError, match=says):
        resolve(**values)


def test_a_checkpoints_own_ladder():
    made = resolve(own="fastwan-3")
    assert (made.ladder, made.num_inference_steps, made.guidance_scale) == ("fastwan-3", 3, 1.0)
    with pytest.raises(RequestError, match="ladder 'fastwan-3' has 3 steps"):
        resolve(own="fastwan-3", num_inference_steps=20)
    free = resolve(own="fastwan-3", ladder="", num_inference_steps=20)
    assert (free.ladder, free.sigmas, free.num_inference_steps) == ("", None, 20)
    other = resolve(own="fastwan-3", ladder="lightx2v-4")
    assert (other.ladder, other.num_inference_steps) == ("lightx2v-4", 4)
    levels = resolve(own="fastwan-3", sigmas=(1.0, 0.6), shift=1.0)
    assert (levels.ladder, levels.sigmas) == ("", (1.0, 0.6))


def test_a_draft_keeps_its_steps():
    facts = SimpleNamespace(grid=GRID, defaults=on_ladder(replace(DEFAULTS, ladder="fastwan-3")))
    assert tasks.draft(facts, sora.VideoRequest("a")).num_inference_steps is None
    assert tasks.draft(facts, sora.VideoRequest("a", ladder="")).num_inference_steps == 2


FILES = {
    "Wan2.1_T2V_14B_lightx2v_cfg_step_distill_lora_rank64_bf16.safetensors": "lightx2v-4",
    "wan2.2_t2v_lightx2v_4steps_lora_v1.1_high_noise.safetensors": "lightx2v-4",
    "Wan2.2-Lightning_T2V-A14B-4steps-lora_LOW_fp16.safetensors": "lightx2v-4",
    "Wan2_1_self_forcing_dmd_1_3B.safetensors": "self-forcing-4",
    "Wan2_1_SelfForcing_lightx2v_4step.gguf": "self-forcing-4",
    "FastWan2.1-T2V-1.3B.safetensors": "fastwan-3",
    "Wan21_CausVid_14B_T2V_lora_rank32.safetensors": "causvid-9",
    "rCM_Wan2.1_T2V_1.3B_480p.safetensors": "rcm-4",
    "TurboWan2.1-T2V-14B-480P.safetensors": "rcm-4",
    "wan2.1_t2v_1.3B_bf16.safetensors": None,
    "wan2.2_t2v_high_noise_14B_fp8_scaled.safetensors": None,
    "Wan2_1_VACE_1_3B_arcmoon.safetensors": None,
}


@pytest.mark.parametrize("name", FILES)
def test_names_of_files(name):
    assert ladder_of_file(name) == FILES[name]


def test_a_requests_adapters_tell_it():
    distill = sora.Lora("loras/Wan21_CausVid_14B_T2V_lora_rank32.safetensors", 0.7)
    style = sora.Lora("loras/ink.safetensors")
    made = resolve(loras=(distill, style))
    assert (made.ladder, made.num_inference_steps, made.guidance_scale) == ("causvid-9", 9, 1.0)
    assert resolve(own="fastwan-3", loras=(distill,)).ladder == "causvid-9"
    assert resolve(own="fastwan-3", loras=(style,)).ladder == "fastwan-3"
    assert resolve(loras=(distill,), ladder="").num_inference_steps == 50
    assert resolve(loras=(distill, sora.Lora("self_forcing.safetensors"))).ladder == ""
    pair = [sora.Lora(f"Wan2.2-Lightning-4steps_{noise}.safetensors") for noise in ("HIGH", "low")]
    assert resolve(loras=pair).ladder == "lightx2v-4"


def test_an_adapter_that_is_merged_on_loading_tells_it(models, tmp_path):
    name, rank, width = "blocks.0.attn1.to_q", 2, 24
    tensors = {
        f"transformer.{name}.lora_A.weight": torch.randn(rank, width),
        f"transformer.{name}.lora_B.weight": torch.randn(width, rank),
    }
    for file, ladder, steps in (("lightx2v_4steps", "lightx2v-4", 4), ("ink", None, 50)):
        path = tmp_path / f"{file}.safetensors"
        save_file(tensors, path)
        settings = {"device": "cpu", "loras": [sora.Lora(path)]}
        with sora.Engine.from_pretrained(models("t2v"), **settings) as engine:
            defaults = engine.model.defaults
            assert (defaults.ladder, defaults.num_inference_steps) == (ladder, steps)


def test_a_file_by_its_name_takes_four_steps_without_a_flag(models, tmp_path):
    folder = models("t2v")
    model = tiny_transformer(0, num_attention_heads=1, attention_head_dim=128)
    tensors = {original_name(k): t.contiguous() for k, t in model.state_dict().items()}
    for name, ladder, steps in (("wan_lightx2v_4step", "lightx2v-4", 4), ("wan", None, 50)):
        file = tmp_path / f"{name}.safetensors"
        save_file(tensors, file)
        found, _ = open_checkpoint(file, folder)
        assert (found.defaults.ladder, found.defaults.num_inference_steps) == (ladder, steps)


def test_a_folder_says_it_in_its_configuration(tmp_path):
    copy = tmp_path / "sprites"
    shutil.copytree(BUNDLED["sprites"], copy)
    settings = json.loads((copy / GENERATION_CONFIG).read_text())
    settings.pop("num_inference_steps", None)
    settings.pop("solver", None)
    settings.pop("guidance_scale", None)

    def opened(**own):
        (copy / GENERATION_CONFIG).write_text(json.dumps({**settings, **own}))
        return open_checkpoint(copy)[0].defaults

    made = opened(ladder="self-forcing-4")
    assert (made.ladder, made.num_inference_steps, made.guidance_scale) == ("self-forcing-4", 4, 1)
    assert opened(ladder="rcm-4", guidance_scale=1.5).guidance_scale == 1.5
    with pytest.raises(CheckpointError, match="ladder 'rcm' is not known; there are"):
        opened(ladder="rcm")
    with pytest.raises(CheckpointError, match="num_inference_steps is 8, ladder 'rcm-4' has 4"):
        opened(ladder="rcm-4", num_inference_steps=8)


@pytest.mark.parametrize(("kind", "boundary"), [("a14b-t2v", 0.875), ("a14b-i2v", 0.9)])
def test_experts_change_at_step_two_of_lightx2vs(kind, boundary, models):
    found, _ = open_checkpoint(models(kind))
    starts = [expert.from_fraction for expert in found.experts]
    assert starts == [boundary, 0.0]
    timesteps = [1000 * sigma for sigma in LADDERS["lightx2v-4"].sigmas]
    assert [timestep >= 1000 * starts[0] for timestep in timesteps] == [True, True, False, False]


@pytest.mark.parametrize(
    ("ladder", "code", "says"),
    [
        ("self-forcing-4", 0, "v.png: 16x16, 1 frames"),
        ("lightx2v", 2, "--ladder: ladder 'lightx2v' is not known; there are lightx2v-4, self-"),
    ],
)
def test_the_command_alone_in_its_process(ladder, code, says, tmp_path):
    """It looks at what was asked before it knows of any family."""
    command = [sys.executable, "-c", "from sora_engine.cli import main; raise SystemExit(main())"]
    command += ["generate", "a ball", "--size", "16x16", "--frames", "1", "-o", "v.png"]
    done = subprocess.run(
        [*command, "--ladder", ladder], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert says in done.stdout + done.stderr
    assert done.returncode == code


def test_made_again_from_its_file_and_by_its_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke
    size = ["--size", "32x32", "--frames", "5", "--seed", "3"]
    first = run(app, ["generate", "a ball", *size, "--ladder", "self-forcing-4", "-o", "a.gif"])
    assert first.exit_code == 0, first.output
    again = run(app, ["generate", "--like", "a.gif", "-o", "b.gif"])
    assert again.exit_code == 0, again.output
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()
    other = run(app, ["generate", "--like", "a.gif", "--ladder", "fastwan-3", "-o", "c.gif"])
    assert other.exit_code == 0, other.output
    listed = run(app, ["ladders"])
    assert "fastwan-3       3 steps by renoise: 1 0.757 0.522" in listed.output
    ladder = LADDERS["self-forcing-4"]
    parts = {"sigmas": ladder.sigmas, "shift": 1.0, "solver": "renoise", "guidance_scale": 1.0}
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        by_name = engine.generate(sora.VideoRequest("a ball", ladder="self-forcing-4", **SMALL))
        by_parts = engine.generate(sora.VideoRequest("a ball", **parts, **SMALL))
        np.testing.assert_array_equal(by_name.frames, by_parts.frames)
        job = engine.submit(
            sora.VideoRequest("a ball", ladder="rcm-4", **SMALL), save_to=tmp_path / "job"
        )
        whole = job.result()
        assert math.isfinite(float(whole.latents.sum()))
