"""What the operator of a service says once: every default, and every check of it, is here."""

from __future__ import annotations

import importlib
import ipaddress
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from sora_engine.config import Limits
from sora_engine.io.watermark import MODES
from sora_engine.runtime.hooks import Hooks

MAX_CLIP_BYTES = 512 << 20
"""Of a clip that a job reads, decoded and in its own size."""

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SPANS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def default_data_dir() -> Path:
    """Where jobs are kept unless the operator says where."""
    return Path("~/.local/share/sora/serve").expanduser()


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How `sora serve` listens, what it takes, and what it keeps.

    Where it listens:

    host, port: the address; port 0 takes a free one. Any other host than this machine's own needs a
        key, or `insecure_no_key`.
    allow_hosts: further names that a request's Host may have, beside those of this machine.
    uds: a Unix socket to listen on, in place of host and port; for a proxy on this machine.
    cors: origins whose pages may ask; none by default.
    forwarded_allow_ips: proxies whose X-Forwarded headers are believed.

    Who may ask:

    api_key: one key for all. api_keys: a file of several. insecure_no_key: nobody needs one.
    max_jobs_per_key: the most jobs of one key that are not done.

    What a request may ask for (more is a 400):

    max_pixels, max_frames, max_steps: as `Limits` has them. max_work: tokens of a step
        times steps; None, no bound. max_upload: bytes of a body. max_upload_pixels,
        max_upload_frames: of a picture or a clip that a client sends. max_priority: the highest
        `priority` that a request may give itself. allow_urls: pictures and clips may be given by
        addresses of the public Internet, which the server then asks.
    loras: adapters by the names that requests give, and their files.
    aliases: further names under which the model answers, such as `sora-2`.

    How much is done at a time:

    max_queue: jobs that wait; one more is a 429. max_running: jobs that are at the engine.

    What is kept:

    data_dir: the folder of jobs and videos; one server has it.
    keep_s: seconds that a finished video is kept. keep_jobs_s: that its row is. disk_limit: bytes
        of all videos; the oldest go first. min_free: bytes of the disk below which no job is taken.
    save_every_s: seconds between two savepoints of a job. keep_latents: the finished latents lie
        beside each video.

    How it ends:

    drain_timeout_s: how long the jobs at work may take after the first signal; what takes longer is
        saved, and goes on at the next start. dead_timeout_s: seconds from the engine's death to the
        server's exit.

    What it tells:

    page: the page is served at `/`. metrics: `/metrics` is served. otel: spans go to
        OpenTelemetry. log_json: log lines are JSON.
    replica: this server's part of its jobs' ids, lower-case letters and digits.

    More than one (docs/replicas.md):

    replicas: how many servers `sora serve` runs, each in a folder of `data_dir`. shared: the
        folder that holds `data_dir` holds those of other replicas too, each under its replica's
        name: their results, uploads and cookies are known here.

    Bounds on connections, in seconds and bytes: header_timeout_s, body_timeout_s,
    keep_alive_timeout_s, max_header_bytes, max_connections.

    sign_cert, sign_key: PEM files; every result is signed with them. watermark: `auto` marks signed
        results of 256 rows and more, `on` all, `off` none. watermark_payload: 1 to 65535, what the
        mark says; 0 is the engine's own.

    hooks: what the service checks of requests and frames.

    Raises ValueError, which names the setting, for a value that cannot be.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    uds: Path | None = None
    allow_hosts: tuple[str, ...] = ()
    cors: tuple[str, ...] = ()
    forwarded_allow_ips: str = ""

    api_key: str | None = field(default=None, repr=False)
    api_keys: Path | None = None
    insecure_no_key: bool = False
    max_jobs_per_key: int = 64

    max_pixels: int = 2048 * 2048
    max_frames: int = 2000
    max_steps: int = 200
    max_work: int | None = None
    max_prompt_chars: int = 32_000
    max_upload: int = 64 << 20
    max_upload_pixels: int = 4096 * 4096
    max_upload_frames: int = 2000
    max_priority: int = 0
    allow_urls: bool = False
    loras: Mapping[str, Path] = field(default_factory=dict)
    aliases: tuple[str, ...] = ("sora-2", "sora-2-pro")

    max_queue: int = 64
    max_running: int = 16

    data_dir: Path = field(default_factory=default_data_dir)
    keep_s: float = 7 * 86400.0
    keep_jobs_s: float = 30 * 86400.0
    disk_limit: int = 20 << 30
    min_free: int = 1 << 30
    save_every_s: float = 20.0
    keep_latents: bool = False

    drain_timeout_s: float = 60.0
    dead_timeout_s: float = 5.0

    page: bool = True
    metrics: bool = True
    otel: bool = False
    log_json: bool = False
    replica: str = "0"
    replicas: int = 1
    shared: bool = False

    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_timeout_s: float = 30.0
    max_header_bytes: int = 16 << 10
    max_connections: int = 1000

    sign_cert: Path | None = None
    sign_key: Path | None = None
    watermark: str = "auto"
    watermark_payload: int = 0

    hooks: Hooks = field(default_factory=Hooks)

    def __post_init__(self) -> None:
        _whole(self, "port", 0, 65535)
        for name in ("max_pixels", "max_frames", "max_steps", "max_prompt_chars", "max_queue"):
            _whole(self, name, 1)
        for name in ("max_upload_pixels", "max_upload_frames"):
            _whole(self, name, 1)
        for name in ("max_jobs_per_key", "max_running", "max_upload", "max_connections"):
            _whole(self, name, 1)
        _whole(self, "max_header_bytes", 1 << 10)
        _whole(self, "replicas", 1, 512)
        _whole(self, "max_priority", -8, 8)
        _whole(self, "watermark_payload", 0, 65535)
        if (self.sign_cert is None) != (self.sign_key is None):
            raise ValueError("sign_cert and sign_key go together; give both, or neither")
        if self.watermark not in MODES:
            raise ValueError(f"watermark {self.watermark!r}: auto, on or off would work")
        for name in ("disk_limit", "min_free"):
            _whole(self, name, 0)
        if self.max_work is not None:
            _whole(self, "max_work", 1)
        for name in ("keep_s", "keep_jobs_s", "header_timeout_s", "body_timeout_s"):
            _seconds(self, name, zero=False)
        for name in ("save_every_s", "drain_timeout_s", "dead_timeout_s", "keep_alive_timeout_s"):
            _seconds(self, name, zero=True)
        if not re.fullmatch(r"[a-z0-9]{1,16}", self.replica):
            raise ValueError(
                f"replica must be 1 to 16 lower-case letters or digits, got {self.replica!r}"
            )
        if self.shared and self.data_dir.name != self.replica:
            raise ValueError(
                f"shared: data_dir {self.data_dir} must end in the replica's name, {self.replica}"
            )
        if self.api_key is not None and len(self.api_key) < 8:
            raise ValueError("api_key must have 8 characters or more")
        if not (self.loopback or self.has_keys or self.insecure_no_key):
            raise ValueError(
                f"host {self.host} can be reached by others, and there is no key: give api_key or "
                "api_keys, or insecure_no_key to let everybody in"
            )
        for name in self.loras:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
                raise ValueError(
                    f"loras: the name {name!r} must be 1 to 64 letters, digits, dots or dashes"
                )

    @property
    def loopback(self) -> bool:
        """Whether only this machine can ask."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def has_keys(self) -> bool:
        """Whether a request needs a key."""
        return self.api_key is not None or self.api_keys is not None

    def limits(self) -> Limits:
        """What the engine is told. The desk holds the queue, so that every start can fill it."""
        return Limits(
            max_queued_jobs=2 * self.max_running,
            max_running_jobs=self.max_running,
            max_pixels=self.max_pixels,
            max_frames=self.max_frames,
            max_inference_steps=self.max_steps,
            max_prompt_chars=self.max_prompt_chars,
            max_clip_pixels=self.max_upload_pixels,
            max_clip_bytes=MAX_CLIP_BYTES,
        )


def parse_bytes(name: str, value: object) -> int:
    """`64M` as bytes: a whole number, and K, M, G or T; ValueError names what is none."""
    match = re.fullmatch(r"\s*(\d{1,15})\s*([KMGT]?)i?B?\s*", str(value), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{name}: {value!r} is no number of bytes, such as 64M or 20G")
    return int(match[1]) * _UNITS[match[2].upper()]


def parse_span(name: str, value: object) -> float:
    """`7d` as seconds: a number, and s, m, h or d; ValueError names what is none."""
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([smhd]?)\s*", str(value))
    if match is None:
        raise ValueError(f"{name}: {value!r} is no length of time, such as 20s, 12h or 7d")
    return float(match[1]) * _SPANS[match[2] or "s"]


PARSERS: dict[str, Callable[[str, object], Any]] = {
    **dict.fromkeys(("max_upload", "disk_limit", "min_free", "max_header_bytes"), parse_bytes),
    **dict.fromkeys(
        (
            *("keep_s", "keep_jobs_s", "save_every_s", "drain_timeout_s", "dead_timeout_s"),
            *("header_timeout_s", "body_timeout_s", "keep_alive_timeout_s"),
        ),
        parse_span,
    ),
}
"""How the settings that have units are read from a flag, the environment or a file."""


def settings_from(
    flags: Mapping[str, Any], environment: Mapping[str, str], config: Mapping[str, Any]
) -> Settings:
    """Settings by a flag, else by SORA_ and the name in capitals, else by a file; ValueError names
    what cannot be.

    A name may leave out `_s` (seconds), and be written with dashes: `keep` and `drain-timeout`.
    """
    kinds = {field.name: field for field in dataclass_fields(Settings)}
    given: dict[str, Any] = {}
    for name, value in config.items():
        plain = name.replace("-", "_")
        own = plain if plain in kinds else f"{plain}_s"
        if own not in kinds:
            raise ValueError(f"{name}: there is no such setting")
        given[own] = value
    for own in kinds:
        short = own.removesuffix("_s")
        for name in (own, short):
            text = environment.get(f"SORA_{name.upper()}")
            if text is not None:
                given[own] = text
    given.update(flags)
    return Settings(**{name: _read(name, value) for name, value in given.items()})


def _read(name: str, value: Any) -> Any:
    """A setting as a flag, the environment or a file gives it."""
    if name in PARSERS:
        return PARSERS[name](name, value)
    if name in ("data_dir", "api_keys", "sign_cert", "sign_key", "uds"):
        return Path(str(value)).expanduser()
    if name == "loras":
        if isinstance(value, Mapping):
            return {str(key): Path(str(path)) for key, path in value.items()}
        pairs = [value] if isinstance(value, str) else value
        return dict(_lora(pair) for pair in pairs)
    if name == "hooks":
        return value if isinstance(value, Hooks) else _hooks(str(value))
    if name in ("allow_hosts", "cors", "aliases"):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(str(part).strip() for part in parts)
    if not isinstance(value, str):
        return value
    return _from_text(name, value)


def _from_text(name: str, text: str) -> Any:
    default = Settings.__dataclass_fields__[name].default
    if isinstance(default, bool):
        if text.lower() not in ("1", "0", "true", "false", "yes", "no"):
            raise ValueError(f"{name}: {text!r} is not true or false")
        return text.lower() in ("1", "true", "yes")
    if isinstance(default, int) or name == "max_work":
        if not re.fullmatch(r"-?\d{1,15}", text):
            raise ValueError(f"{name}: {text!r} is no whole number")
        return int(text)
    return text


def _lora(pair: str) -> tuple[str, Path]:
    name, equals, path = pair.partition("=")
    if not equals or not path:
        raise ValueError(f"loras: {pair!r} is not NAME=FILE")
    return name, Path(path).expanduser()


def _hooks(where: str) -> Hooks:
    module, colon, function = where.partition(":")
    if not colon:
        raise ValueError(f"hooks: {where!r} is not MODULE:FUNCTION")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"hooks: {where} cannot be imported: {error}") from error
    try:
        made = make()
    except Exception as error:  # it is the operator's own code
        raise ValueError(f"hooks: {where} failed: {type(error).__name__}: {error}") from error
    if not isinstance(made, Hooks):
        raise ValueError(f"hooks: {where} made no Hooks, but {type(made).__name__}")
    return made


def _whole(settings: Settings, name: str, least: int, most: int | None = None) -> None:
    value = getattr(settings, name)
    above = most is not None and isinstance(value, int) and value > most
    if isinstance(value, bool) or not isinstance(value, int) or value < least or above:
        span = f"{least} or more" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be a whole number, {span}, got {value!r}")


def _seconds(settings: Settings, name: str, *, zero: bool) -> None:
    value = getattr(settings, name)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ValueError(f"{name} must be seconds, {'0 or more' if zero else 'over 0'}: {value!r}")
