"""Exported graphs run by ONNX Runtime, on torch's memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sora_engine.errors import BackendError
from sora_engine.vae.graphs import GraphCoder, GraphSet
from sora_engine.vae.onnx_export import INSTALL


class OnnxVAE(GraphCoder):
    """A `VideoCoder` on ONNX Runtime's CPU or CUDA provider, for graphs in fp32 or fp16.

    Inputs and outputs are bound to torch tensors by address: nothing is copied.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", *, threads: int = 0):
        device = torch.device(device)
        super().__init__(GraphSet.load(folder), device)
        if self.graphs.dtype == torch.bfloat16:
            raise BackendError(
                f"{folder}: bfloat16 graphs are for TensorRT; export float32 or float16"
            )
        onnxruntime = import_runtime()
        self._runtime: Any = onnxruntime
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device.type)
        found = onnxruntime.get_available_providers()
        if provider not in found:
            raise BackendError(
                f"this onnxruntime has no provider for {device.type!r}, only {', '.join(found)}; "
                "for NVIDIA GPUs: pip install onnxruntime-gpu"
            )
        options: dict[str, Any] = {}
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device).cuda_stream
            options = {"device_id": device.index or 0, "user_compute_stream": str(stream)}
        self._providers = [(provider, options)]
        self._threads = threads
        self._sessions: dict[str, Any] = {}

    def _session(self, name: str) -> Any:
        # Made when first needed: a session holds the weights of its graph.
        if name not in self._sessions:
            options = self._runtime.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            path = self.graphs.folder / self.graphs.graphs[name].file
            try:
                session = self._runtime.InferenceSession(
                    str(path), options, providers=self._providers
                )
            except Exception as error:
                raise BackendError(f"{path}: ONNX Runtime cannot load it: {error}") from error
            self._sessions[name] = session
        return self._sessions[name]

    def run_graph(self, name: str, inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> None:
        """See `GraphCoder.run_graph`."""
        session = self._session(name)
        binding = session.io_binding()
        index = self.device.index or 0
        for bind, tensors in ((binding.bind_input, inputs), (binding.bind_output, outputs)):
            for key, tensor in tensors.items():
                element = "float16" if tensor.dtype == torch.float16 else "float32"
                bind(
                    name=key,
                    device_type=self.device.type,
                    device_id=index,
                    element_type=element,
                    shape=list(tensor.shape),
                    buffer_ptr=tensor.data_ptr(),
                )
        session.run_with_iobinding(binding)


def import_runtime() -> Any:
    """The onnxruntime module; BackendError with the install line where there is none.

    Its wheels send events to their maker, and keep an identifier in the cache folder, from the
    import on. Here they do not: whoever wants that sets ORT_DISABLE_TELEMETRY to 0.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"vae_backend 'onnx' needs onnxruntime: {INSTALL}") from error
    return onnxruntime
