"""The TensorRT backend: what can be checked without TensorRT, and the rest where it is there."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from sora_engine.errors import BackendError
from sora_engine.vae.tensorrt_run import (
    SizeRange,
    TensorRTVAE,
    build_engines,
    engine_key,
    pick_profile,
    private_folder,
    profiles,
    read_ranges,
    write_private,
    write_ranges,
)

HERE = importlib.util.find_spec("tensorrt") is not None


def test_each_size_has_its_profile_and_the_sizes_between_share_one():
    ranges = profiles([(60, 104), (90, 160), (60, 104)])
    assert ranges[:2] == (SizeRange(*[(60, 104)] * 3), SizeRange(*[(90, 160)] * 3))
    assert [pick_profile(ranges, *size) for size in ((60, 104), (90, 160), (64, 128))] == [0, 1, 2]
    assert pick_profile(ranges, 91, 160) is None
    assert pick_profile(ranges, 59, 104) is None
    assert len(profiles([(60, 104)])) == 1


def test_an_engine_is_known_by_all_it_depends_on(tmp_path):
    graph, data = tmp_path / "g.onnx", tmp_path / "g.onnx.data"
    graph.write_bytes(b"graph")
    keys = {engine_key(graph, "gpu", "10.1")}
    keys.add(engine_key(graph, "other", "10.1"))
    keys.add(engine_key(graph, "gpu", "10.2"))
    data.write_bytes(b"weights")
    keys.add(engine_key(graph, "gpu", "10.1"))
    data.write_bytes(b"Weights")
    keys.add(engine_key(graph, "gpu", "10.1"))
    assert len(keys) == 5
    assert engine_key(graph, "gpu", "10.1") in keys


def test_the_sizes_lie_beside_the_engine(tmp_path):
    engine = tmp_path / "x.engine"
    assert read_ranges(engine) == ()
    ranges = profiles([(60, 104), (90, 160)])
    write_ranges(engine, ranges)
    assert read_ranges(engine) == ranges
    (tmp_path / "x.json").write_text('[{"least": 3}]')
    assert read_ranges(engine) == ()


def test_the_cache_is_for_its_owner_alone(tmp_path):
    folder = private_folder(tmp_path / "a" / "b")
    assert folder.stat().st_mode & 0o077 == 0
    write_private(folder / "x.engine", b"plan")
    assert (folder / "x.engine").read_bytes() == b"plan"
    assert (folder / "x.engine").stat().st_mode & 0o077 == 0
    assert [file.name for file in folder.iterdir()] == ["x.engine"]
    folder.chmod(0o777)
    with pytest.raises(BackendError, match="chmod 700"):
        private_folder(folder)


@pytest.mark.skipif(HERE, reason="TensorRT is installed")
def test_without_tensorrt_the_error_says_what_to_install(tmp_path):
    with pytest.raises(BackendError, match=r'pip install "sora_engine\[tensorrt\]"'):
        TensorRTVAE(tmp_path, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not HERE, reason="needs TensorRT")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_engines_equal_pytorch(tmp_path, dtype):
    from sora_engine.vae.onnx_export import export_onnx
    from tests.parity.vae_models import make_pair, relative

    _, vae = make_pair("wan21")
    graphs = export_onnx(vae, tmp_path / "graphs", dtype=dtype)
    sizes = [(4, 4), (8, 6)]
    empty = TensorRTVAE(graphs.folder, tmp_path / "engines")
    with pytest.raises(BackendError, match="build it first"):
        empty.decode(torch.zeros(1, 16, 1, 4, 4))
    built = build_engines(graphs, tmp_path / "engines", sizes)
    assert build_engines(graphs, tmp_path / "engines", sizes) == built
    coder = TensorRTVAE(graphs.folder, tmp_path / "engines")
    # TF32 is TensorRT's default for fp32.
    tolerance = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}[dtype]
    for height, width in [(4, 4), (8, 6), (5, 5)]:
        latents = torch.randn(1, 16, 5, height, width)
        want = vae.decode(latents)
        assert relative(coder.decode(latents).cpu(), want) < tolerance
        assert relative(coder.encode(want).cpu(), vae.encode(want)) < tolerance
    with pytest.raises(BackendError, match="9x9 latents"):
        coder.decode(torch.zeros(1, 16, 1, 9, 9))
