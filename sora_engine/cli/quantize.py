"""`sora quantize`: a transformer's weights in a smaller file, which other programs read too."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sora_engine.cli.app import UsageError, app, say
from sora_engine.errors import SoraError


@app.command()
def quantize(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder of diffusers or ComfyUI, or a .safetensors or .gguf file.",
        ),
    ],
    to: Annotated[str, typer.Option(help="int8, fp8 or q8_0.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="A .safetensors file; .gguf for q8_0.")
    ],
    expert: Annotated[
        str, typer.Option(help="Of a folder with two transformers: high or low.")
    ] = "high",
) -> None:
    """Write a transformer with the weights of its blocks quantised.

    ComfyUI's loaders read the files: int8 with a scale for each row and fp8 with one for each
    tensor, or GGUF. `sora generate --model FILE --dtype as-stored` keeps them so in memory.
    """
    suffixes = {"int8": ".safetensors", "fp8": ".safetensors", "q8_0": ".gguf"}
    suffix = suffixes.get(to)
    if suffix is None:
        raise UsageError(f"--to: {to!r} is not known; {', '.join(suffixes)} are")
    path = Path(output)
    if path.suffix != suffix:
        raise UsageError(f"--output: {output} must end in {suffix} for --to {to}")
    if expert not in ("high", "low"):
        raise UsageError(f"--expert: {expert!r} is no expert; high or low would work")
    say(f"quantising {model} to {to}")
    from sora_engine.models.quantising import quantise_model

    try:
        report = quantise_model(model, path, to, 0 if expert == "high" else 1)
    except SoraError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"--output: {path}: {error.strerror or error}") from error
    say(
        f"wrote {path}: {report.num_quantised} weights as {to}, {report.num_dense} tensors as they "
        f"were, {report.size_bytes / 1e9:.3f} GB; the weights are {report.error:.2%} off"
    )
