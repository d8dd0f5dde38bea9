"""Exported graphs: valid, of operators that TensorRT takes, and equal to the PyTorch decoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from sora_engine.errors import BackendError, CheckpointError, RequestError
from sora_engine.vae import stream_decode
from sora_engine.vae.graphs import GraphSet
from sora_engine.vae.wan import WanVAE
from tests.parity.vae_models import LAYOUTS, make_pair, relative

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")

from sora_engine.vae import onnx_export  # noqa: E402
from sora_engine.vae.onnx_export import export_onnx  # noqa: E402
from sora_engine.vae.onnx_run import OnnxVAE  # noqa: E402

# What the ONNX parser of TensorRT 10.1 documents as supported: operators and their types, and what
# TensorRT 11 documents of opsets. The file names its sources; a later TensorRT takes more.
TENSORRT = json.loads(Path(__file__).with_name("tensorrt_operators.json").read_text())
# It has this one, but slowly: nearest upsampling must not become it.
SLOW = {"GatherND"}
# Where an operator takes its axes as an input, the input's place.
AXES = {"Pad": 3, "Slice": 3}
TYPES = {
    onnx.TensorProto.FLOAT: "FP32",
    onnx.TensorProto.FLOAT16: "FP16",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.BOOL: "BOOL",
}

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


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in SHORT]
)
def exported(request, tmp_path_factory) -> tuple[WanVAE, GraphSet]:
    _, vae = make_pair(SHORT[request.param])
    return vae, export_onnx(vae, tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="module")
def first_graph(tmp_path_factory) -> tuple[WanVAE, GraphSet]:
    """Of the five graphs the first; the files of the others are empty. All take half a minute."""
    _, vae = make_pair(SHORT["wan21"])
    export_graph = onnx_export._export_graph

    def first_alone(step, x, caches, spec, folder):
        if spec.file == "decoder_first.onnx":
            export_graph(step, x, caches, spec, folder)
        else:
            (folder / spec.file).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_export, "_export_graph", first_alone)
        return vae, export_onnx(vae, tmp_path_factory.mktemp("first"))


def _check_graphs(graphs: GraphSet, opsets: Sequence[int] = TENSORRT["opsets"]) -> None:
    for spec in graphs.graphs.values():
        path = graphs.folder / spec.file
        onnx.checker.check_model(str(path), full_check=True)  # shape inference too
        graph = onnx.load(path).graph
        _check_operators(onnx.load(path), opsets)
        for side, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            assert [value.name for value in side] == [tensor.name for tensor in tensors]
            for value, tensor in zip(side, tensors, strict=True):
                dims = value.type.tensor_type.shape.dim
                assert [d.dim_value for d in dims[:3]] == [1, tensor.channels, tensor.frames]
                assert all(d.dim_param for d in dims[3:]), "height and width stay dynamic"


def _check_operators(model: onnx.ModelProto, opsets: Sequence[int] = TENSORRT["opsets"]) -> None:
    """Every node is one that TensorRT's list has, with the types and constants it asks for."""
    low, high = opsets
    assert [(entry.domain, low <= entry.version <= high) for entry in model.opset_import] == [
        ("", True)
    ]
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    graph = onnx.shape_inference.infer_shapes(model).graph
    constants = {tensor.name for tensor in graph.initializer}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        assert node.op_type in TENSORRT["operators"], node.op_type
        assert node.op_type not in SLOW, node.op_type
        taken = TENSORRT["operators"][node.op_type].split()
        for name in filter(None, node.input):
            assert TYPES[types[name]] in taken, (node.op_type, name, TYPES[types[name]])
        if node.op_type == "Constant":
            constants.update(node.output)
        if node.op_type in ("Conv", "ConvTranspose"):
            assert node.input[1] in constants, f"{node.name}: its weights are computed"
        axes = AXES.get(node.op_type, 1)
        if node.op_type in TENSORRT["constant_axes"] and len(node.input) > axes:
            assert node.input[axes] in {"", *constants}, f"{node.name}: its axes are computed"


def _check_equal(vae: WanVAE, coder: OnnxVAE, latents: int, sizes, tolerance: float) -> None:
    for height, width in sizes:
        generator = torch.Generator().manual_seed(height)
        z = torch.randn(1, vae.z_dim, latents, height, width, generator=generator)
        want = vae.decode(z)
        got = torch.cat(list(stream_decode(coder, z)), dim=2)
        assert relative(got, want) < tolerance
        assert relative(got[:, :, -1], want[:, :, -1]) < tolerance
        assert relative(coder.encode(want), vae.encode(want)) < tolerance


def test_the_check_of_operators_is_sharp():
    def model(*nodes, opset=18):
        value = onnx.helper.make_tensor_value_info
        kind = onnx.TensorProto.FLOAT
        ends = [value("x", kind, [1, 4]), value("w", kind, [1, 4])], [value("y", kind, None)]
        graph = onnx.helper.make_graph(list(nodes), "g", *ends)
        return onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=10
        )

    node = onnx.helper.make_node
    _check_operators(model(node("Add", ["x", "w"], ["y"])))
    for bad in (
        model(node("Add", ["x", "w"], ["y"]), opset=21),
        model(node("HannWindow", ["x"], ["y"])),
        model(node("GatherND", ["x", "w"], ["y"])),
        model(node("And", ["x", "w"], ["y"])),
        model(node("Conv", ["x", "w"], ["y"])),
        model(node("ReduceMean", ["x", "w"], ["y"])),
        model(node("Add", ["x", "w"], ["y"], domain="com.microsoft")),
    ):
        with pytest.raises(AssertionError):
            _check_operators(bad)


def test_the_first_graph_is_valid_and_equals_pytorch(first_graph):
    vae, graphs = first_graph
    first = {"decoder_first": graphs.graphs["decoder_first"]}
    _check_graphs(GraphSet(graphs.folder, graphs.config, graphs.dtype, first))
    coder = OnnxVAE(graphs.folder, threads=1)
    for size in ((2, 3), (5, 4), (4, 4)):
        z = torch.randn(1, vae.z_dim, 1, *size)
        assert relative(coder.decode(z), vae.decode(z)) < 1e-4


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
    _check_equal(vae, coder, 21, [(2, 3), (5, 4), (4, 4), (3, 7)], 1e-4)


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


def test_a_damaged_folder_is_named(first_graph, tmp_path):
    _, graphs = first_graph
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
    with pytest.raises(BackendError, match="float64"):
        export_onnx(make_pair(SHORT["wan21"])[1], tmp_path, dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["wan21", "wan22"])
def test_published_layouts_at_full_depth(layout, tmp_path):
    _, vae = make_pair(LAYOUTS[layout] | {"num_res_blocks": 2})
    graphs = export_onnx(vae, tmp_path)
    assert len(graphs.graphs["decoder_first"].outputs) == 31
    assert len(graphs.graphs["decoder_steady"].inputs) == 33
    _check_graphs(graphs)
    coder = OnnxVAE(graphs.folder, threads=1)
    _check_equal(vae, coder, 21, [(2, 3), (5, 4), (4, 4), (2, 7)], 1e-4)


@pytest.mark.slow
def test_half_precision(tmp_path):
    _, vae = make_pair(SHORT["wan21"])
    z = torch.randn(1, 16, 4, 3, 4)
    expected = vae.decode(z)  # from here on oneDNN alone has the weights
    graphs = export_onnx(vae, tmp_path, dtype=torch.float16)
    _check_graphs(graphs)
    got = OnnxVAE(tmp_path, threads=1).decode(z)
    assert got.dtype == torch.float32
    assert 1e-6 < relative(got, expected) < 1e-2


def _widened(graphs: GraphSet) -> GraphSet:
    """The same graphs with float32 wherever they say bfloat16, their weights' values unchanged: on
    a CPU, ONNX Runtime has no bf16 convolutions."""
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT

    def widen(tensor: onnx.TensorProto) -> onnx.TensorProto:
        values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
        return onnx.numpy_helper.from_array(values, tensor.name)

    folder = graphs.folder / "widened"
    folder.mkdir()
    for spec in graphs.graphs.values():
        model = onnx.load(graphs.folder / spec.file)
        graph = model.graph
        for tensor in graph.initializer:
            if tensor.data_type == narrow:
                tensor.CopyFrom(widen(tensor))
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == narrow:
                value.type.tensor_type.elem_type = wide
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.i == narrow:
                    attribute.i = wide
                if attribute.HasField("t") and attribute.t.data_type == narrow:
                    attribute.t.CopyFrom(widen(attribute.t))
        assert str(narrow) not in {str(t.data_type) for t in graph.initializer}
        onnx.save(model, folder / spec.file)
    result = GraphSet(folder, graphs.config, torch.float32, graphs.graphs)
    result.save()
    return result


@pytest.mark.slow
def test_bfloat16_graphs(tmp_path):
    _, vae = make_pair(SHORT["wan21"])
    graphs = export_onnx(vae, tmp_path, dtype=torch.bfloat16)
    _check_graphs(graphs, TENSORRT["newer"]["opsets"])
    assert GraphSet.load(tmp_path).dtype == torch.bfloat16
    for spec in graphs.graphs.values():
        graph = onnx.load(tmp_path / spec.file).graph
        kinds = {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
        assert kinds == {onnx.TensorProto.BFLOAT16}
        weights = {tensor.name: tensor.data_type for tensor in graph.initializer}
        convolved = [node.input[1] for node in graph.node if node.op_type.startswith("Conv")]
        assert {weights[name] for name in convolved} == {onnx.TensorProto.BFLOAT16}
    with pytest.raises(BackendError, match="bfloat16 graphs are for TensorRT"):
        OnnxVAE(tmp_path)
    # In float32 they compute what the autoencoder does with its weights rounded. What was made of
    # weights is rounded once more, summed taps and gains: that alone is 1.5e-3 here.
    vae = vae.to(torch.bfloat16).float().prepare()
    _check_equal(vae, OnnxVAE(_widened(graphs).folder, threads=1), 5, [(3, 4)], 4e-3)
