"""The launch table: what is read, what is written, and how tuning changes it."""

from __future__ import annotations

import pytest
import torch

from sora_kernels import launch, tune


def test_the_table_is_written_as_it_was_read(tmp_path):
    file = tmp_path / "launch.json"
    launch.write(launch.read(), file)
    assert file.read_text() == launch.FILE.read_text()


def test_an_architecture_without_a_table_uses_the_nearest_older_one():
    entries = launch.entries("packed_attention", 90)
    assert launch.entries("packed_attention", 89) == launch.entries("packed_attention", 80)
    assert launch.entries("packed_attention", 90) is entries
    assert launch.entries("norm_modulate", 120) == launch.entries("norm_modulate", 80)
    assert launch.row_warps("norm_modulate", 90, 64) == launch.row_warps("norm_modulate", 90, 512)


def test_a_width_without_an_entry_is_named():
    with pytest.raises(ValueError, match=r"float32 head_dim 256 on sm_90"):
        launch.find_or_raise("windowed_attention", 90, torch.float32, 256)


def test_tuning_takes_the_fastest_that_does_not_spill():
    start = launch.TileLaunch(64, 4, 2)
    table = {"temporal_attention": {90: {"2x64": start, "2x128": start}}}
    entries = table["temporal_attention"][90]
    costs = {(64, 4, 2): 3.0, (32, 4, 2): 2.0, (32, 8, 1): 1.0, (16, 4, 1): 2.99}
    tried = []

    def time():
        tried.append(entries["2x64"])
        if entries["2x64"].num_stages == 3:
            raise RuntimeError("out of resource: shared memory")
        return costs.get(tuple(entries["2x64"]), 9.0)

    tune.tune_entry(
        table, "temporal_attention", 90, "2x64", time,
        lambda: tuple(entries["2x64"]) == (32, 8, 1), lambda line: None,
    )  # fmt: skip
    assert entries == {"2x64": launch.TileLaunch(32, 4, 2), "2x128": start}
    assert set(tried) == set(tune.candidates("temporal_attention", "2x64"))


@pytest.mark.parametrize("op", tune.OPS)
def test_candidates_hold_what_the_table_holds(op):
    """What ships could have been found by tuning."""
    for entries in launch.read()[op].values():
        for key, entry in entries.items():
            assert entry in list(tune.candidates(op, key)), key


def test_tuning_without_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = launch.FILE.read_text()
    assert tune.main([]) == 1
    assert "needs an NVIDIA GPU" in capsys.readouterr().err
    assert tune.main(["--dry-run", "--op", "norm_modulate"]) == 0
    assert "norm_modulate sm_90 2048: 5 candidates" in capsys.readouterr().out
    assert launch.FILE.read_text() == before


@pytest.mark.parametrize("op", tune.OPS)
@pytest.mark.usefixtures("interpreter")
def test_every_workload_is_a_call_that_the_op_takes(op, monkeypatch):
    """On meta tensors: shapes and dtypes are checked, nothing is launched."""
    entries = launch.entries(op, 90)
    seen = []
    import sora_kernels as sk

    monkeypatch.setattr(sk, op, lambda *args, **kwargs: seen.append((args, kwargs)))
    for key in entries:
        tune.workload(op, key, torch.device("meta"))()
    assert len(seen) == len(entries)
    assert all(kwargs["backend"] == "triton" for _, kwargs in seen)
