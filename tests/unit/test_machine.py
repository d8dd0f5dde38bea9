"""What a CPU is measured to do, and what `"auto"` makes of it."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
import torch
from safetensors.torch import save_file

import sora_engine as sora
from sora_engine.models import machine, precision
from sora_engine.models.machine import Rates, machine_rates, measure_rates, prefer_attention
from sora_engine.models.precision import settle_precision, stored_as
from sora_kernels import cpu_attention, packed_attention
from sora_kernels.attention.api import OP
from sora_kernels.dispatch import Case

BF16, FP32 = torch.bfloat16, torch.float32
CPU = torch.device("cpu")


def rates(linear: float = 2.0, conv: float = 2.0, sdpa: float = 90.0) -> Rates:
    """Of a machine whose bfloat16 is so many times as fast."""
    attention = {name: {"native": 100.0, "sdpa": sdpa} for name in ("float32", "bfloat16")}
    return Rates(
        {"float32": 100.0, "bfloat16": 100 * linear},
        {"float32": 50.0, "bfloat16": 50 * conv},
        attention,
        10.0,
    )


@pytest.fixture(autouse=True)
def _no_preferences(monkeypatch):
    """Whatever a test prefers is forgotten, and nothing is measured unless the test says so."""
    monkeypatch.setattr(cpu_attention, "_preferred", {})
    monkeypatch.setattr(machine, "_of_process", {})
    yield
    OP.choose_again()


def known(monkeypatch, found: Rates | None) -> list[bool]:
    """Have the machine be known; gives a list of whether it was to be measured, call by call."""
    asked = []

    def rates_of(*, measure: bool = True) -> Rates | None:
        asked.append(measure)
        return found

    monkeypatch.setattr(precision, "machine_rates", rates_of)
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    return asked


def weights(path, dtype=BF16, **more):
    save_file({"a": torch.zeros(64, 64, dtype=dtype), "b": torch.zeros(64), **more}, path)
    return [path]


def test_rates_are_measured_in_time_and_add_up():
    started = time.perf_counter()
    found = measure_rates(0.5)
    # Two rounds of everything are made on any machine; what it loads beside them is its own.
    assert time.perf_counter() - started < 10
    x = torch.randn(256, 1536)
    layer = torch.nn.Linear(1536, 1536)
    took = []
    with torch.inference_mode():
        for _ in range(5):
            began = time.perf_counter()
            layer(x)
            took.append(time.perf_counter() - began)
    rate = 2 * 256 * 1536**2 / min(took) / 1e9  # of all threads
    assert rate / torch.get_num_threads() / 4 < found.linear["float32"] < 20 * rate
    assert str(found).startswith("GFLOP/s: products float32 ")


def test_they_are_kept_and_what_cannot_be_read_is_measured_again(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(machine, "measure_rates", lambda: made.append(1) or rates(len(made)))
    file = tmp_path / "deep" / "machine.json"
    assert machine_rates(measure=False, cache=file) is None
    first = machine_rates(cache=file)
    machine._of_process.clear()
    assert machine_rates(cache=file) == machine_rates(measure=False, cache=file) == first
    (key,) = json.loads(file.read_text())
    for broken in ("{", "[]", f'{{"{key}": {{"linear": 3}}}}', f'{{"{key}": 7}}'):
        file.write_text(broken)
        machine._of_process.clear()
        count = len(made)
        assert machine_rates(cache=file).gain("linear") == count + 1
    zero = dataclasses.asdict(dataclasses.replace(first, copy=0.0))
    file.write_text(json.dumps({key: zero}))
    machine._of_process.clear()
    assert machine_rates(measure=False, cache=file) is None


def test_where_no_file_can_be_a_process_measures_once(monkeypatch):
    made = []
    monkeypatch.setattr(machine, "cache_folder", lambda name: None)
    monkeypatch.setattr(machine, "measure_rates", lambda: made.append(1) or rates())
    assert machine_rates() == machine_rates() == rates()
    assert len(made) == 1


@pytest.mark.parametrize(
    ("stored", "gain", "settings", "taken", "why"),
    [
        (BF16, 2.0, {}, BF16, "bfloat16: products are 2.0 times as fast in it here, and the wei"),
        (BF16, 1.3, {}, FP32, "float32: products are 1.3 times as fast in bfloat16 here"),
        (torch.float16, 8.0, {}, FP32, "float32: the weights are float16"),
        (FP32, 8.0, {}, FP32, "float32: the weights are float32"),
        (BF16, 8.0, {"exact": True}, FP32, "float32: exact"),
        (torch.float8_e4m3fn, 8.0, {}, BF16, "and the weights are quantised"),
    ],
)
def test_what_auto_is_on_a_cpu(tmp_path, monkeypatch, stored, gain, settings, taken, why):
    asked = known(monkeypatch, rates(gain))
    files = weights(tmp_path / "w.safetensors", stored)
    found = settle_precision("auto", "auto", CPU, weights=files, **settings)
    assert found.dtype == taken
    assert why in found.chosen["dtype"]
    # Nothing is measured where the answer is clear.
    assert asked == [stored in (BF16, torch.float8_e4m3fn) and not settings]


@pytest.mark.parametrize(
    ("dtype", "conv", "vae_dtype", "taken"),
    [
        ("auto", 2.0, "auto", BF16),
        ("auto", 1.5, "auto", FP32),
        ("float32", 2.0, "auto", FP32),
        ("bfloat16", 2.0, "auto", BF16),
        ("auto", 2.0, "float32", FP32),
        ("float32", 1.0, "bfloat16", BF16),
    ],
)
def test_what_the_autoencoder_is_in(tmp_path, monkeypatch, dtype, conv, vae_dtype, taken):
    known(monkeypatch, rates(conv=conv))
    files = weights(tmp_path / "w.safetensors")
    found = settle_precision(dtype, vae_dtype, CPU, weights=files)
    assert found.vae_dtype == taken
    assert ("vae_dtype" in found.chosen) == (vae_dtype == "auto" and taken == BF16)
    onnx = settle_precision(dtype, "auto", CPU, weights=files, vae_backend="onnx")
    assert onnx.vae_dtype == FP32


def test_what_files_are_stored_as(tmp_path):
    assert stored_as(weights(tmp_path / "a.safetensors")) == "bfloat16"
    more = {f"more{i}": torch.zeros(64, 64) for i in range(2)}
    assert stored_as(weights(tmp_path / "b.safetensors", **more)) == "float32"
    small = weights(tmp_path / "c.safetensors", torch.float8_e4m3fn)
    assert stored_as(small) == "quantised"


def test_a_large_model_has_the_machine_measured(tmp_path, monkeypatch):
    asked = known(monkeypatch, rates())
    files = weights(tmp_path / "w.safetensors", FP32)
    settle_precision("float32", "auto", CPU, weights=files)
    monkeypatch.setattr(precision, "LARGE_BYTES", 1 << 10)
    settle_precision("float32", "auto", CPU, weights=files)
    assert asked == [False, True]


@pytest.mark.parametrize(("sdpa", "taken"), [(130.0, "sdpa"), (105.0, "native"), (70.0, "native")])
def test_attention_is_by_whom_is_the_faster(sdpa, taken):
    said = prefer_attention(rates(sdpa=sdpa))
    assert said["float32"] == f"{taken} (native 100 GFLOP/s, sdpa {sdpa:.0f})"
    case = Case("cpu", None, FP32, 128)
    if machine.csrc.problem() is None:
        assert OP.resolve("auto", case).__name__.endswith(taken)
    short = Case("cpu", None, FP32, 128, frozenset({"short"}))
    if machine.csrc.problem() is None:
        assert OP.resolve("auto", short).__name__.endswith("native")


def test_a_new_preference_counts_for_what_was_resolved_before():
    if machine.csrc.problem() is not None:
        pytest.skip("without the native library SDPA serves alone")
    q = torch.randn(100, 2, 32)
    cu = torch.tensor([0, 100], dtype=torch.int32)
    served = []
    for backend in ("sdpa", "native", "sdpa"):
        cpu_attention.prefer({FP32: backend})
        packed_attention(q, q, q, cu, cu, max_seqlen_q=100, max_seqlen_k=100)
        served.append(OP.served()[-1][2])
    assert served == ["sdpa", "native", "sdpa"]
    with pytest.raises(ValueError, match="'flash'; native and sdpa are known"):
        cpu_attention.prefer({FP32: "flash"})


def test_the_bundled_checkpoint_stays_as_it_is_and_measures_nothing(monkeypatch):
    asked = known(monkeypatch, None)
    with sora.Engine.from_pretrained("sprites", device="cpu") as engine:
        video = engine.generate(
            sora.VideoRequest("a", num_frames=1, height=16, width=16, num_inference_steps=1)
        )
    assert asked == [False]
    assert video.receipt.dtype == video.receipt.vae_dtype == "float32"
    assert video.receipt.chosen == {"dtype": "float32: the weights are float16"}
    assert video.receipt.to_dict()["chosen"] == video.receipt.chosen
