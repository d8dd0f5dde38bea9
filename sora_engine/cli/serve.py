"""`sora serve`: videos over HTTP."""

from __future__ import annotations

import os
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sora_engine.cli.app import OnceCommand, UsageError, app, say
from sora_engine.cli.options import (
    Common,
    Components,
    Device,
    Dtype,
    TinyVAE,
    VAEBackend,
    VAEDtype,
    absolute,
    absolute_parts,
    in_options,
    model_path,
    must_exist,
    named,
    parse_parallel,
)
from sora_engine.errors import CredentialsError
from sora_engine.version import version

if TYPE_CHECKING:
    from sora_engine.runtime.engine import Engine

EXTRA = 'pip install "sora_engine[serve]"'


@app.command(cls=OnceCommand)
def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="As --model of `sora generate`."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A TOML file with these options by their names."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address; 127.0.0.1.")] = None,
    port: Annotated[int | None, typer.Option(help="The port; 8000. 0 takes a free one.")] = None,
    api_key: Annotated[
        str | None, typer.Option(help="The key that requests need. Better: SORA_API_KEY.")
    ] = None,
    api_keys: Annotated[Path | None, typer.Option(help="A file of several keys.")] = None,
    insecure_no_key: Annotated[
        bool | None,
        typer.Option("--insecure-no-key", help="Let everybody in, from other machines too."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs and videos are; ~/.local/share/sora/serve.")
    ] = None,
    max_queue: Annotated[int | None, typer.Option(help="Jobs that wait, at most; 64.")] = None,
    max_running: Annotated[int | None, typer.Option(help="Jobs at work, at most; 16.")] = None,
    max_jobs_per_key: Annotated[
        int | None, typer.Option(help="Jobs of one key that are not done, at most; 64.")
    ] = None,
    max_pixels: Annotated[int | None, typer.Option(help="Pixels of a frame, at most.")] = None,
    max_frames: Annotated[int | None, typer.Option(help="Frames of a video, at most.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Denoising steps, at most.")] = None,
    max_work: Annotated[
        int | None, typer.Option(help="Tokens of a step times steps, at most.")
    ] = None,
    max_upload: Annotated[str | None, typer.Option(help="Bytes of a body; 64M.")] = None,
    max_priority: Annotated[
        int | None, typer.Option(help="The highest priority that a request may have; 0.")
    ] = None,
    allow_urls: Annotated[
        bool | None,
        typer.Option("--allow-urls", help="Fetch pictures and clips that requests name by URL."),
    ] = None,
    keep: Annotated[str | None, typer.Option(help="How long videos are kept; 7d.")] = None,
    keep_jobs: Annotated[str | None, typer.Option(help="How long rows are; 30d.")] = None,
    disk_limit: Annotated[str | None, typer.Option(help="Bytes of all videos; 20G.")] = None,
    min_free: Annotated[
        str | None, typer.Option(help="Bytes of the disk that stay free; 1G.")
    ] = None,
    drain_timeout: Annotated[
        str | None, typer.Option(help="How long jobs at work may take at the end; 60s.")
    ] = None,
    save_every: Annotated[str | None, typer.Option(help="Between two savepoints; 20s.")] = None,
    keep_latents: Annotated[
        bool | None, typer.Option("--keep-latents", help="Keep finished latents too.")
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FILE", help="An adapter that requests may name. Repeatable."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="A further name of the model; sora-2 and sora-2-pro. Repeatable."),
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name that Host may have. Repeatable.")
    ] = None,
    cors: Annotated[
        list[str] | None, typer.Option(help="An origin whose pages may ask. Repeatable.")
    ] = None,
    forwarded_allow_ips: Annotated[
        str | None, typer.Option(help="Proxies that are believed about addresses.")
    ] = None,
    page: Annotated[bool | None, typer.Option(help="Serve the page at /.")] = None,
    metrics: Annotated[bool | None, typer.Option(help="Serve /metrics.")] = None,
    otel: Annotated[bool | None, typer.Option("--otel", help="Spans to OpenTelemetry.")] = None,
    log_json: Annotated[bool | None, typer.Option("--log-json", help="Log lines as JSON.")] = None,
    replica: Annotated[str | None, typer.Option(help="This server's part of job ids; 0.")] = None,
    replicas: Annotated[
        int | None, typer.Option(help="How many servers, behind one address: docs/replicas.md.")
    ] = None,
    sign_cert: Annotated[
        Path | None,
        typer.Option(metavar="PEM", help="Sign every result with this certificate."),
    ] = None,
    sign_key: Annotated[Path | None, typer.Option(metavar="PEM", help="Its key.")] = None,
    watermark: Annotated[
        str | None, typer.Option(help="As of `sora generate`: auto, on or off.")
    ] = None,
    watermark_payload: Annotated[
        int | None, typer.Option(help="What the mark says, 1 to 65535; the engine's own.")
    ] = None,
    hooks: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="What makes the `Hooks` of the engine."),
    ] = None,
    new_key: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER", help="Print a new key, and its line for --api-keys, and end."
        ),
    ] = None,
    components: Components = None,
    vae: Annotated[str | None, typer.Option(help="Its VAE: a file or a folder.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="Its text encoder, likewise.")] = None,
    image_encoder: Annotated[str | None, typer.Option(help="Its image encoder, likewise.")] = None,
    tiny_vae: TinyVAE = None,
    vace: Annotated[list[str] | None, typer.Option(help="As of `sora generate`.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    vae_backend: VAEBackend = "auto",
    vae_dtype: VAEDtype = "auto",
    offload: Annotated[str, typer.Option(help="As of `sora generate`.")] = "auto",
    exact: Annotated[bool, typer.Option("--exact", help="As of `sora generate`.")] = False,
    parallel: Annotated[str | None, typer.Option(help="As of `sora generate`.")] = None,
) -> None:
    """Serve videos over HTTP: docs/serving.md has the routes.

    Each option may stand in SORA_ and its name in capitals, and in the --config file.
    """
    if new_key is not None:
        _make_key(new_key)
        return
    given: dict[str, Any] = {
        **{"host": host, "port": port, "api_key": api_key, "api_keys": api_keys},
        **{"insecure_no_key": insecure_no_key, "data_dir": data_dir, "max_queue": max_queue},
        **{"max_running": max_running, "max_jobs_per_key": max_jobs_per_key},
        **{"max_pixels": max_pixels, "max_frames": max_frames, "max_steps": max_steps},
        **{"max_work": max_work, "max_upload": max_upload, "max_priority": max_priority},
        **{"allow_urls": allow_urls},
        **{"keep_s": keep, "keep_jobs_s": keep_jobs, "disk_limit": disk_limit},
        **{"min_free": min_free, "drain_timeout_s": drain_timeout, "save_every_s": save_every},
        **{"keep_latents": keep_latents, "loras": lora, "aliases": alias, "hooks": hooks},
        **{"allow_hosts": allow_host, "cors": cors, "forwarded_allow_ips": forwarded_allow_ips},
        **{"sign_cert": sign_cert, "sign_key": sign_key, "watermark": watermark},
        **{"watermark_payload": watermark_payload},
        **{
            "page": page,
            "metrics": metrics,
            "otel": otel,
            "log_json": log_json,
            "replica": replica,
        },
        **{"replicas": replicas},
    }
    try:
        from sora_engine.serve.server import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "sora_engine":
            raise
        raise UsageError(f"sora serve needs {error.name}: {EXTRA} brings it") from error
    from sora_engine.serve.logs import set_up as set_up_logs
    from sora_engine.serve.marks import Marks
    from sora_engine.serve.replicas.server import PLACE, end_with_parent, settings_of_place
    from sora_engine.serve.replicas.server import run as run_replicas
    from sora_engine.serve.settings import settings_from

    path = model_path(model)
    parts = Common(
        components=components,
        vae=vae,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        tiny_vae=tiny_vae,
        vace=vace,
        vae_backend=vae_backend,
    )
    named_parts, decoder = absolute_parts(parts.parts()), parts.decoder()
    for part in model or ():
        must_exist(part)
    is_child = PLACE in os.environ  # started by the proxy of --replicas, with its own options
    if is_child:
        end_with_parent()
        given |= settings_of_place(os.environ[PLACE])
    try:
        layout = None if parallel is None else parse_parallel(parallel)
        settings = settings_from(
            {name: value for name, value in given.items() if value is not None},
            os.environ,
            {} if config is None else _read(config),
        )
    except ValueError as error:
        raise UsageError(in_options(error)) from error
    try:
        Marks(settings)
    except CredentialsError as error:
        raise UsageError(f"--sign-cert: {error}") from error
    set_up_logs(settings.log_json)

    def make_engine() -> Engine:
        from sora_engine.runtime.engine import Engine

        return Engine.from_pretrained(
            absolute(path),
            parallel=layout,
            components=named_parts,
            device=device,
            dtype=dtype,
            vae_backend=decoder,
            vae_dtype=vae_dtype,
            offload=offload,
            exact=exact,
            limits=settings.limits(),
            hooks=settings.hooks,
        )

    def listening(address: str) -> None:
        if not is_child:  # the proxy says it
            say(f"listening on {address}")

    def ready() -> None:
        if not is_child:
            say(f"ready; jobs are in {settings.data_dir}")

    if not is_child:
        many = f" in {settings.replicas} replicas" if settings.replicas > 1 else ""
        say(f"sora_engine {version()}: loading {named(path)}{many}")
    try:
        if settings.replicas > 1:
            command = [sys.executable, "-m", "sora_engine", *sys.argv[1:]]
            code = run_replicas(settings, command, on_listening=listening, on_ready=ready)
        else:
            code = run(make_engine, settings, on_listening=listening, on_ready=ready)
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        raise UsageError(f"--port: {where} cannot be had: {error.strerror or error}") from error
    raise SystemExit(code)


def _make_key(owner: str) -> None:
    from sora_engine.serve.keys import line_of
    from sora_engine.serve.keys import new_key as make

    key = make()
    line = line_of(owner, key)
    say(f"key, for the client: {key}")
    say(f"line, for --api-keys: {line}")


def _read(config: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--config: {config} cannot be read: {error}") from error
