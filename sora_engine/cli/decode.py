"""`sora decode` and `sora export-vae`: the autoencoder by itself."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say
from sora_engine.cli.options import (
    Components,
    Device,
    Dtype,
    ModelPath,
    Sign,
    SignCert,
    SignKey,
    TinyVAE,
    VAEBackend,
    VAEDtype,
    WatermarkMode,
    decoder_of,
    in_options,
    model_path,
    named,
    parse_size,
)
from sora_engine.cli.signing import check_watermark, credentials_of, watermark_of
from sora_engine.errors import SoraError
from sora_engine.version import version


@app.command(cls=OnceCommand)
def decode(
    latents: Annotated[str, typer.Argument(help="A file of finished latents.")],
    output: Annotated[
        str, typer.Option("--output", "-o", help="As of `sora generate`.")
    ] = "out.mp4",
    model: Annotated[
        list[str] | None,
        typer.Option(help="Whose VAE; by default the model that made the latents."),
    ] = None,
    components: Components = None,
    vae: Annotated[str | None, typer.Option(help="Its VAE alone: a file or a folder.")] = None,
    tiny_vae: TinyVAE = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae_backend: VAEBackend = "auto",
    vae_dtype: VAEDtype = "auto",
    sign: Sign = False,
    sign_cert: SignCert = None,
    sign_key: SignKey = None,
    watermark: WatermarkMode = "auto",
) -> None:
    """Decode finished latents that an interrupted `sora generate` left."""
    from sora_engine.io.latents import SavedLatents
    from sora_engine.io.video_writer import VideoWriter, check_output

    credentials = credentials_of(sign, sign_cert, sign_key)
    check_watermark(watermark)
    try:
        check_output(output)
        saved = SavedLatents.read(latents)
    except SoraError as error:
        raise UsageError(str(error)) from error
    named_parts = {"vae": vae, "tiny_vae": tiny_vae}
    given = {name: part for name, part in named_parts.items() if part is not None}
    if given and components is not None:
        option = f"--{next(iter(given)).replace('_', '-')}"
        raise UsageError(
            f"{option}: --components names a folder of all parts; give one or the other"
        )
    vae_backend = decoder_of(vae_backend, tiny_vae)
    path: ModelPath = saved.model
    parts = given or components
    if model:
        path = model_path(model)
    elif isinstance(saved.components, dict) and components is None:
        parts = {**saved.components, **given}
    else:
        parts = parts or saved.components
    if vae_backend == "auto" and isinstance(parts, dict) and "tiny_vae" in parts:
        vae_backend = "tiny"  # as the video was to be
    made = {} if saved.provenance is None else saved.provenance.settings
    dtype = str(made.get("dtype", dtype)) if dtype == "auto" else dtype
    vae_dtype = str(made.get("vae_dtype", vae_dtype)) if vae_dtype == "auto" else vae_dtype
    say(f"sora_engine {version()}: loading the VAE of {named(path)}")
    started = time.monotonic()
    from sora_engine.models.loading import load_video_decoder

    try:
        decoder = load_video_decoder(
            path,
            device=device,
            dtype=dtype,
            vae_backend=vae_backend,
            vae_dtype=vae_dtype,
            components=parts,
        )
        normalised = decoder.vae.normalise(saved.latents[None])[0]
    except (SoraError, RuntimeError) as error:
        raise UsageError(f"{in_options(error)}") from error
    from sora_engine.request.frames import crop_middle
    from sora_engine.request.sources import sources_in

    total, done = saved.latents.shape[1], 0
    left = None if saved.size is None else saved.size[0]
    rows = int(made.get("height", 0)) if saved.size is None else saved.size[1]
    with VideoWriter(
        output,
        saved.fps,
        provenance=saved.provenance,
        credentials=credentials,
        sources=sources_in(saved.provenance),
        watermark=watermark_of(watermark, rows, credentials is not None),
    ) as writer:
        for chunk in decoder.decode(normalised, wraps=saved.loop):
            if saved.size is not None:
                chunk = crop_middle(chunk[:left], *saved.size[1:])
            for frame in chunk.numpy():
                writer.write(frame)
            left = None if left is None else left - len(chunk)
            done += 1
            say(f"decode {done}/{total} latent frames")
    say(f"{output}: {saved.fps:g} fps ({time.monotonic() - started:.1f} s)")


@app.command("export-vae", cls=OnceCommand)
def export_vae(
    model: Annotated[str, typer.Argument(help="A checkpoint, as of `sora generate --model`.")],
    components: Components = None,
    backend: Annotated[str, typer.Option(help="onnx or tensorrt.")] = "onnx",
    output: Annotated[
        str | None, typer.Option(help="Folder; by default the cache where the engine looks.")
    ] = None,
    sizes: Annotated[
        str, typer.Option(help="HEIGHTxWIDTH,... in pixels, for TensorRT: 480x832,720x1280.")
    ] = "",
    dtype: Annotated[
        str,
        typer.Option(help="auto, float32, float16 or bfloat16 (TensorRT); auto is the engine's."),
    ] = "auto",
    device: Device = "auto",
) -> None:
    """Export a VAE to ONNX graphs, or build TensorRT engines from them."""
    say(f"sora_engine {version()}: loading the VAE of {model}")
    from sora_engine.models.device import resolve_device, resolve_dtype
    from sora_engine.models.loading import load_video_decoder
    from sora_engine.vae.backend import export_vae as export
    from sora_engine.vae.fit import FittedCoder

    form = "HEIGHTxWIDTH, such as 480x832"
    pixels = [parse_size(size, "--sizes", form) for size in sizes.split(",") if size.strip()]
    try:
        target = resolve_device(device)
        fitted = load_video_decoder(model, device="cpu", components=components).vae
        assert isinstance(fitted, FittedCoder)
        vae = fitted.layers
        assert vae is not None
        if dtype == "auto" and backend != "tensorrt":
            dtype = "float32"
        folder = export(
            vae,
            backend,
            output,
            sizes=[(width, height) for height, width in pixels],
            dtype=resolve_dtype(dtype, target),
            device=target,
        )
    except SoraError as error:
        raise UsageError(in_options(error)) from error
    say(f"{folder}: {', '.join(sorted(path.name for path in folder.iterdir()))}")
