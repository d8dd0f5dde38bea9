"""What a fresh process imports on its way to a video."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# Each takes a tenth of a second to two of a start, and nothing in the bundled checkpoint needs one.
LEFT_OUT = (
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.tensor",
    "transformers",
    "huggingface_hub",
    "httpx",
    "triton",
    "diffusers",
    "onnxruntime",
    "rich",
    "fastapi",
    "sora_engine.bench",
    "sora_engine.serve",
    "sora_engine.testing",
)
SCRIPT = """
import json, runpy, sys
sys.argv = ["sora", "generate", "a red circle", "--steps", "2", "-o", {path!r}, *{options!r}]
try:
    runpy.run_module("sora_engine", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
print(json.dumps(sorted(sys.modules)))
"""


@pytest.mark.parametrize(
    "options",
    [
        ["--frames", "5"],
        ["--frames", "33"],  # in windows
        ["--frames", "5", "--dtype", "bfloat16", "--vae-dtype", "bfloat16"],
    ],
    ids=" ".join,
)
def test_a_cold_start_imports_what_it_uses(tmp_path, options):
    path = tmp_path / "out.mp4"
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(path=str(path), options=options)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert path.stat().st_size > 0
    imported = set(json.loads(run.stdout.splitlines()[-1]))
    assert "torch" in imported
    assert sorted(imported & set(LEFT_OUT)) == []
