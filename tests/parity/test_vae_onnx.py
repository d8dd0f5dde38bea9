"""Exported graphs: valid, of operators that TensorRT takes, and equal to the PyTorch decoder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from sora_engine.errors import BackendError, CheckpointError, RequestError
from sora_engine.vae import WanVAE, stream_decode
from sora_engine.vae.graphs import GraphSet
from tests.parity.vae_models import LAYOUTS, make_pair, relative

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from sora_engine.vae.onnx_export import export_onnx  # noqa: E402
from sora_engine.vae.onnx_run import OnnxVAE  # noqa: E402

# What these graphs use, each marked as supported for fp32 and fp16 in docs/operators.md of
# github.com/onnx/onnx-tensorrt (Shape for any type). GatherND of a "nearest-exact" upsampling, say,
# would not belong here: TensorRT has it, but it is slow.
TENSORRT_OPERATORS = {
    *("Add", "Cast", "Clip", "Concat", "Constant", "Conv", "ConvTranspose", "Div", "Expand"),
    *("Gather", "Gemm", "Identity", "MatMul", "Max", "Min", "Mul", "Pad", "Pow", "ReduceL2"),
    *("ReduceMean", "Reshape", "Resize", "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt"),
    *("Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze"),
}
# Of these TensorRT's parser wants the weights as initializers.
CONVOLUTIONS = {"Conv", "ConvTranspose"}

# Two stages keep exporting short; every kind of layer and of graph is there.
SHORT = {
    "wan21": {
        "base_dim": 4,
        "dim_mult": [1, 2],
        "temperal_downsample": [True],
        "num_res_blocks": 1,
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 2,
    },
    "wan22": LAYOUTS["wan22"]
    | {
        "dim_mult": [2, 2],
        "temperal_downsample": [True],
        "scale_factor_temporal": 2,
        "scale_factor_spatial": 4,
    },
}


@pytest.fixture(scope="module", params=["wan21", pytest.param("wan22", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory) -> tuple[WanVAE, GraphSet]:
    _, vae = make_pair(SHORT[request.param])
    return vae, export_onnx(vae, tmp_path_factory.mktemp("graphs"))


def _check_graphs(graphs: GraphSet) -> None:
    for spec in graphs.graphs.values():
        path = graphs.folder / spec.file
        onnx.checker.check_model(str(path), full_check=True)  # shape inference too
        graph = onnx.load(path).graph
        assert {node.op_type for node in graph.node} <= TENSORRT_OPERATORS
        assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
        constants = {tensor.name for tensor in graph.initializer}
        for node in graph.node:
            if node.op_type in CONVOLUTIONS:
                assert node.input[1] in constants, node.name
        for side, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            assert [value.name for value in side] == [tensor.name for tensor in tensors]
            for value, tensor in zip(side, tensors, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert [d.dim_value for d in dims[:3]] == [1, tensor.channels, tensor.frames]
                assert all(d.dim_param for d in dims[3:]), "height and width stay dynamic"


def _check_equal(vae: WanVAE, coder: OnnxVAE, latents: int, sizes, tolerance: float) -> None:
    for height, width in sizes:
        generator = torch.Generator().manual_seed(height)
        z = torch.randn(1, vae.z_dim, latents, height, width, generator=generator)
        want = vae.decode(z)
        got = torch.cat(list(stream_decode(coder, z)), dim=2)
        assert relative(got, want) < tolerance
        assert relative(got[:, :, -1], want[:, :, -1]) < tolerance
        assert relative(coder.encode(want), vae.encode(want)) < tolerance


def test_graphs_are_valid_and_made_of_supported_operators(exported):
    _, graphs = exported
    assert sorted(graphs.graphs) == [
        *("decoder_first", "decoder_second", "decoder_steady", "encoder_first", "encoder_steady")
    ]
    first, second, steady = (graphs.graphs[f"decoder_{n}"] for n in ("first", "second", "steady"))
    # The temporal upsampler has no cache after the first latent.
    assert len(first.outputs) == len(second.inputs) == len(steady.inputs) - 1
    _check_graphs(graphs)


def test_onnx_runtime_equals_pytorch(exported):
    vae, graphs = exported
    coder = OnnxVAE(graphs.folder, threads=1)
    _check_equal(vae, coder, 21, [(2, 3)], 1e-4)
    _check_equal(vae, coder, 4, [(5, 4), (8, 8), (3, 11)], 1e-4)


def test_chunks_and_states_are_those_of_the_protocol(exported):
    vae, graphs = exported
    coder = OnnxVAE(graphs.folder, threads=1)
    z = torch.randn(1, vae.z_dim, 4, 3, 3)
    whole = coder.decode(z)
    frames, state = coder.decode_chunk(z[:, :, :3])
    more, state = coder.decode_chunk(z[:, :, 3:], state)
    assert state.latent_frames == 4
    assert torch.equal(torch.cat([frames, more], dim=2), whole)
    with pytest.raises(RequestError, match="one video at a time"):
        coder.decode(z.expand(2, -1, -1, -1, -1))
    with pytest.raises(RequestError, match="7 pixels"):
        coder.encode(torch.zeros(1, 3, 1, 7, 8))
    with pytest.raises(RequestError, match="4 frames"):
        coder.encode(torch.zeros(1, 3, 4, 8, 8))


def test_a_damaged_folder_is_named(exported, tmp_path):
    _, graphs = exported
    with pytest.raises(CheckpointError, match=r"graphs\.json"):
        GraphSet.load(tmp_path)
    folder = tmp_path / "copy"
    shutil.copytree(graphs.folder, folder)
    (folder / "decoder_first.onnx").write_bytes(b"not a graph")
    with pytest.raises(BackendError, match=r"decoder_first\.onnx"):
        OnnxVAE(folder).decode(torch.zeros(1, graphs.config.z_dim, 1, 2, 2))
    record = json.loads((folder / "graphs.json").read_text())
    record["graphs"]["decoder_first"]["file"] = "../graph.onnx"
    (folder / "graphs.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match=r"\.\./graph\.onnx"):
        GraphSet.load(folder)
    with pytest.raises(BackendError, match="bfloat16"):
        export_onnx(make_pair(SHORT["wan21"])[1], tmp_path, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wan21", "wan22"])
def test_published_layouts_at_full_depth(layout, tmp_path):
    _, vae = make_pair(LAYOUTS[layout] | {"num_res_blocks": 2})
    graphs = export_onnx(vae, tmp_path)
    assert len(graphs.graphs["decoder_first"].outputs) == 31
    assert len(graphs.graphs["decoder_steady"].inputs) == 33
    _check_graphs(graphs)
    coder = OnnxVAE(graphs.folder, threads=1)
    _check_equal(vae, coder, 21, [(2, 3)], 1e-4)
    _check_equal(vae, coder, 3, [(5, 4), (4, 4), (2, 7)], 1e-4)


@pytest.mark.slow
def test_half_precision(tmp_path):
    _, vae = make_pair(SHORT["wan21"])
    graphs = export_onnx(vae, tmp_path, dtype=torch.float16)
    _check_graphs(graphs)
    z = torch.randn(1, 16, 4, 3, 4)
    got = OnnxVAE(tmp_path, threads=1).decode(z)
    assert got.dtype == torch.float32
    assert 1e-6 < relative(got, vae.decode(z)) < 1e-2
