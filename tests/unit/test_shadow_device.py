"""The shadow device: it computes what a CPU does, refuses what a GPU would, and counts waits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import sora_engine as sora
from sora_engine.models.loading import load_video_model
from sora_engine.samplers import SOLVERS
from sora_engine.testing import shadow as shadow_module
from sora_engine.testing.crossings import KINDS as CROSSINGS
from sora_engine.testing.crossings import TO_DEVICE, TO_HOST, WAIT
from sora_engine.testing.device import shadow_device
from sora_engine.testing.shadow import KINDS, REQUESTS, Sizes, build, load, suits, walk
from sora_engine.testing.tensors import ShadowTensor, host
from sora_kernels.library import on_its_device
from sora_kernels.transfer import to_device
from tests import shadow_cases

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of each kind's tiny pipeline, built once."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = build(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return of


def figures(shadow, name="here"):
    """What a phase came to: waits, copies to the device, copies to the host."""
    return tuple(shadow.trace.phases[name].figures().values())


# The device.


def test_torch_is_as_it_was_when_the_device_has_gone():
    before = {name: getattr(torch.cuda, name) for name in dir(torch.cuda)}
    served = sora_backends()
    with shadow_device() as shadow:
        assert torch.cuda.is_available()
        assert torch.cuda.device_count() == 1
        assert sora_backends()["packed_attention"]["triton"] is None
        there = torch.ones(2, device="cuda")
        assert shadow.count == 1
    assert {name: getattr(torch.cuda, name) for name in before} == before
    assert sora_backends() == served
    with pytest.raises(RuntimeError, match="outside of its shadow_device"):
        there + 1


def sora_backends():
    import sora_kernels

    return sora_kernels.backends("cuda") if torch.cuda.is_available() else {}


def test_a_tensor_says_cuda_and_holds_its_values():
    with shadow_device():
        for made in (
            torch.ones(2, 3, device="cuda"),
            torch.arange(6, device=CUDA).view(2, 3),
            torch.randn(2, 3).cuda(),
            torch.randn(2, 3).to("cuda"),
            torch.tensor([[1.0, 2.0, 3.0]], device="cuda").expand(2, -1),
        ):
            assert isinstance(made, ShadowTensor)
            assert (made.device, made.is_cuda, made.is_cpu, made.is_meta) == (CUDA, 1, 0, 0)
            for derived in (
                made + 1,
                made.float().softmax(-1),
                made[:, 1:],
                made.new_zeros(3),
                torch.zeros_like(made),
                torch.cat([made, made]),
                made.unbind(0)[1],
                made.to(torch.float64),
                torch.nn.functional.pad(made, (0, 1)),
            ):
                assert derived.device == CUDA
        values = torch.randn(3, 4)
        there = values.to("cuda")
        assert torch.equal(host(there @ there.T), values @ values.T)
        assert (there.cpu(), there.tolist())[0].device.type == "cpu"
        view = there[1:]
        view.mul_(2)  # views share their memory
        assert torch.equal(host(there)[1:], values[1:] * 2)
        assert torch.equal(host(there)[0], values[0])


def test_what_mixes_devices_raises():
    with shadow_device(2):
        there, here = torch.ones(3, device="cuda"), torch.ones(3)
        other = torch.ones(3, device="cuda:1")
        index = torch.tensor([0, 2])
        for mix in (
            lambda: there + here,
            lambda: here + there,
            lambda: torch.cat([there, here]),
            lambda: there.index_select(0, index),
            lambda: torch.where(here > 0, there, 0),
            lambda: there.add_(here),
            lambda: torch.nn.functional.linear(there, torch.ones(3, 3)),
            lambda: there + other,
        ):
            with pytest.raises(RuntimeError, match="on the same device, but found"):
                mix()
        assert (there + torch.tensor(2.0)).tolist() == [3.0] * 3  # a number may come from anywhere
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            there.numpy()
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            np.asarray(there)
        with pytest.raises(RuntimeError, match="invalid device ordinal 2"):
            torch.ones(3, device="cuda:2")


READS = {
    "item": (lambda x: x.sum().item(), (1, 0, 1)),
    "bool": (lambda x: bool((x > 0).any()), (1, 0, 1)),
    "int": (lambda x: int(x[0]), (1, 0, 1)),
    "tolist": (lambda x: x.tolist(), (1, 0, 1)),
    "cpu": (lambda x: x.cpu(), (1, 0, 1)),
    "to(cpu)": (lambda x: x.to("cpu"), (1, 0, 1)),
    "to(cpu) later": (lambda x: x.to("cpu", non_blocking=True), (0, 0, 1)),
    "nonzero": (lambda x: x.nonzero(), (1, 0, 1)),
    "mask": (lambda x: x[x > 0], (1, 0, 1)),
    "masked_select": (lambda x: x.masked_select(x > 0), (1, 0, 1)),
    "unique": (lambda x: x.unique(), (1, 0, 1)),
    "equal": (lambda x: torch.equal(x, x.clone()), (1, 0, 1)),
    "repeat": (lambda x: x.repeat_interleave(x.long().abs()), (1, 0, 1)),
    "into the host": (lambda x: torch.empty(4).copy_(x), (1, 0, 1)),
    "into pinned": (lambda x: torch.empty(4).pin_memory().copy_(x, non_blocking=True), (0, 0, 1)),
    "from the host": (lambda x: x.copy_(torch.ones(4)), (1, 1, 0)),
    "from values": (lambda x: torch.tensor([1.0], device=x.device), (1, 1, 0)),
    "new_tensor": (lambda x: x.new_tensor([1.0]), (1, 1, 0)),
    "to(device)": (lambda x: torch.ones(4).to(x.device), (1, 1, 0)),
    "to(device) from pageable": (
        lambda x: torch.ones(4).to(x.device, non_blocking=True),
        (1, 1, 0),
    ),
    "to_device": (lambda x: to_device(torch.ones(4), x.device), (0, 1, 0)),
    "index from the host": (lambda x: x[torch.tensor([0, 2])], (1, 1, 0)),
    "synchronize": (lambda x: torch.cuda.synchronize(), (1, 0, 0)),
    "nothing": (
        lambda x: (x.to(x.device), x.to(x), x.float(), x.narrow(0, 1, 2), x + 1),
        (0, 0, 0),
    ),
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_each_wait_and_each_copy_is_counted(read, mode):
    act, expected = READS[read]
    with shadow_device() as shadow, mode():
        there = torch.tensor([1.0, -2.0, 0.0, 3.0], device="cuda")
        with shadow.trace.phase("here"):
            act(there)
        assert figures(shadow) == expected


def test_a_crossing_is_told_with_its_line_in_the_engine():
    from sora_engine.vae.finite import is_finite

    with shadow_device() as shadow:
        there = torch.ones(3, device="cuda")
        with shadow.trace.phase("here"):
            assert is_finite(there)
        ((crossing, count),) = shadow.trace.phases["here"].crossings.items()
        assert count == 1
        assert crossing.site.name == "sora_engine/vae/finite.py:is_finite"
        lines = list(shadow_module.table(shadow.trace.phases))
    source = is_finite.__code__
    assert source.co_firstlineno < crossing.site.line < source.co_firstlineno + 20
    assert any(f"finite.py:{crossing.site.line} is_finite" in line for line in lines)


def test_a_kernel_runs_on_the_device_of_its_tensors():
    """torch's operations see to it themselves; what is launched by hand takes the current one."""
    with shadow_device(2) as shadow:
        there = torch.randn(3, 4, device="cuda:1")
        ran = []
        run = on_its_device(lambda x, backend: ran.append((torch.cuda.current_device(), x)))
        run(there, "auto")
        run(there.to("cuda:0"), "auto")
        assert [index for index, _ in ran] == [1, 0]
        assert shadow.current == 0  # and is put back
        with pytest.raises(RuntimeError, match="on cuda:1, and cuda:0 is current"):
            sora_kernels_norm(there)
        with torch.cuda.device(1):
            assert sora_kernels_norm(there).device == torch.device("cuda", 1)


def sora_kernels_norm(x):
    from sora_kernels import norm_modulate

    return norm_modulate(x, None, None)


# Requests on it.


@pytest.mark.parametrize("task", ["plain", "windows", "extend"])
def test_it_computes_what_a_cpu_does(folder, task, monkeypatch):
    """In float32 the latents are those of the engine on a CPU, within the bound of parity."""
    model = load_video_model(folder("t2v"), device="cpu")
    request = REQUESTS[task](Sizes(model))
    with sora.Engine(model) as engine:
        expected = engine.generate(request)
    monkeypatch.setattr(shadow_module, "load_video_model", in_float32)
    with shadow_device() as shadow:
        made = walk(load(folder("t2v"), shadow), request, shadow)
    error = (made.latents - expected.latents).abs().max() / expected.latents.abs().max()
    assert error < 1e-4
    assert made.frames.shape == expected.frames.shape
    assert np.abs(made.frames.numpy().astype(int) - expected.frames).max() <= 1


def in_float32(path, **settings):
    return load_video_model(path, dtype="float32", **settings)


def run(folder, kind, tasks):
    """Walk through requests on a kind: each is finite, in bf16, and of its size."""
    with shadow_device() as shadow:
        model = load(folder(kind), shadow)
        assert (model.dtype, model.vae_dtype) == (torch.bfloat16, torch.bfloat16)
        walks = {}
        for name, make in tasks.items():
            request = make(Sizes(model))
            shadow.trace.dtypes.clear()
            made = walks[name] = walk(model, request, shadow)
            assert made.latents.isfinite().all(), name
            assert made.latents.dtype == torch.float32
            assert made.latents.std() > 0.1
            assert made.frames.dtype == torch.uint8
            grid_frames = -(-(request.num_frames - (not request.loop)) // model.grid.time)
            assert len(made.frames) >= grid_frames * model.grid.time
            ran = {dtype for (op, dtype), _ in shadow.trace.dtypes.items() if "attention" in op}
            assert ran == {"torch.bfloat16"}, name
        return walks


@pytest.mark.parametrize("kind", KINDS)
def test_no_phase_waits_or_copies_more_than_the_table_says(folder, kind):
    table = shadow_cases.committed()["now"]
    assert set(table) >= {f"{kind}: {task}" for task in shadow_cases.CASES[kind]}
    tasks = {task: REQUESTS[task] for task in shadow_cases.CASES[kind]}
    with shadow_device() as shadow:
        load(folder(kind), shadow)
        loaded = {"load": shadow.trace.phases["load"].figures()}
    found = {f"{kind}: load": loaded}
    for task, made in run(folder, kind, tasks).items():
        found[f"{kind}: {task}"] = {n: t.figures() for n, t in made.summary().items()}
    raised = [
        f"{case}, {phase}: {what} {now[what]}, and the table has {table[case][phase][what]}"
        for case, phases in found.items()
        for phase, now in phases.items()
        for what in CROSSINGS
        if now[what] > table[case][phase][what]
    ]
    assert not raised, "; ".join(raised)


def test_a_step_waits_for_its_end_and_for_its_check_alone(folder):
    """Whatever it is about: windows, chained ones, known frames, sparse attention, fresh noise."""
    table = shadow_cases.committed()["now"]
    steps = {
        (case, phase): figures[WAIT]
        for case, phases in table.items()
        for phase, figures in phases.items()
        if phase in ("first step", "step")
    }
    assert len(steps) >= 2 * sum(len(tasks) for tasks in shadow_cases.CASES.values())
    assert {k: n for k, n in steps.items() if n > 2} == {}


def test_the_page_has_the_table():
    page = shadow_cases.PAGE.read_text(encoding="utf-8")
    rows = list(shadow_cases.rows(shadow_cases.committed()))
    assert page == shadow_cases.page_with(rows)
    assert len(rows) == 2 + len(shadow_cases.ROWS)


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_on_it(folder, solver):
    run(folder, "t2v", {solver: lambda sizes: sizes.request(solver=solver)})


def test_requests_share_a_batch_on_it(folder):
    """Of other sizes, texts and tasks: the packer's own waits do not grow with them."""
    from sora_engine.config import NO_LIMIT, Limits
    from sora_engine.denoise.denoise import denoise_step, prepare
    from sora_engine.denoise.packing import Packer
    from sora_engine.request import resolve_request

    with shadow_device() as shadow:
        model = load(folder("ti2v-5b"), shadow)
        sizes = Sizes(model)
        requests = [
            sizes.request(),
            sizes.request(prompt="a blue square", clips=[sizes.clip(1)]),
            sizes.request(2, height=3 * sizes.side // 2),
        ]
        limits = Limits()
        canvases = [
            prepare(resolve_request(r, model, limits, solvers=SOLVERS), model) for r in requests
        ]
        packer = Packer(model.grid.patch, model.device)
        for step in range(2):
            with shadow.trace.phase(f"step {step}"):
                assert denoise_step(canvases, model, packer, NO_LIMIT) == {}
        for canvas in canvases:
            assert host(canvas.latents).isfinite().all()
        waits, to_device_, _ = figures(shadow, "step 1")
        assert waits == 1 + len(canvases)  # the step's end, and each one's check
        assert to_device_ == 2  # timesteps, and the rows of tokens


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_does_every_task_by_every_solver(folder, kind):
    with shadow_device() as shadow:
        model = load(folder(kind), shadow)
        able = [task for task in REQUESTS if suits(task, model)]
    tasks = {task: REQUESTS[task] for task in able}
    tasks |= {s: lambda sizes, s=s: sizes.request(solver=s) for s in SOLVERS}
    assert len(run(folder, kind, tasks)) >= 10


# The command.


def test_the_command_prints_waits_with_their_lines(capsys):
    assert shadow_module.main(["--model", "sprites", "--task", "plain", "chained"]) == 0
    out = capsys.readouterr().out
    assert "sprites: load: wait" in out
    assert "sprites: chained: step: wait 3," in out  # the preview is read beside
    assert "sora_engine/denoise/denoise.py:" in out
    assert f"{TO_DEVICE} " in out
    assert f"{TO_HOST} " in out
