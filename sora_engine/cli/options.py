"""Options that several commands take, and the names of options in error messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sora_engine.cli.app import UsageError
from sora_engine.config import ParallelConfig
from sora_engine.request.lora import EXPERTS, Lora

DEFAULT_MODEL = "sprites"
BUNDLED = (DEFAULT_MODEL, "meadow")
"""The names in `registry.BUNDLED`, whose module takes a second to import."""

# What the Python interface calls the values, and what the command line does.
_OPTION_OF = {
    "num_inference_steps": "--steps",
    "guidance_scale_2": "--guidance-2",
    "guidance_scale": "--guidance",
    "num_frames": "--frames",
    "negative_prompt": "--negative-prompt",
    "label": "--label",
    "camera": "--camera",
    "height": "--size",
    "width": "--size",
    "fps": "--fps",
    "shift": "--shift",
    "ladder": "--ladder",
    "seed": "--seed",
    "solver": "--solver",
    "device": "--device",
    "dtype": "--dtype",
    "vae_dtype": "--vae-dtype",
    "vae_backend": "--vae-backend",
    "before_s": "--before",
    "after_s": "--after",
    "gap_s": "--gap",
    "missing": "--missing",
    "strength": "--strength",
    "scale": "--scale",
    "the mask": "--mask",
}

Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16; as-stored keeps quantised weights so in memory; "
        "int8 multiplies int8 by int8, on a CPU."
    ),
]
Components = Annotated[
    str | None,
    typer.Option(help="Folder with what a --model of one file lacks, diffusers' or ComfyUI's."),
]
VAEDtype = Annotated[
    str,
    typer.Option(
        help="Of the autoencoder: auto (--dtype on a GPU, and on a CPU that is fast in it), "
        "float32, bfloat16 or float16."
    ),
]
VAEBackend = Annotated[str, typer.Option(help="auto, torch, onnx, tensorrt or tiny.")]
TinyVAE = Annotated[
    str | None,
    typer.Option(help="A tiny autoencoder (TAEHV) to decode with: faster, and not as good."),
]


Prompt = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        "-p",
        help="What the video shows; by default what the clip's file says of itself, or nothing.",
    ),
]
Frames = Annotated[int | None, typer.Option("--frames", help="Number of frames.")]
CameraMoves = Annotated[
    str | None,
    typer.Option(
        "--camera",
        metavar="MOVES|FILE",
        help="How the camera moves, for a model that takes that: such as 'pan left, zoom in x0.5', "
        "or a file of poses.",
    ),
]
Strength = Annotated[
    float, typer.Option(help="In (0, 1]: low keeps the clip, high keeps only its layout.")
]
Sign = Annotated[
    bool,
    typer.Option(
        "--sign", help="Sign the result, with the certificate that `sora certificate` made."
    ),
]
SignCert = Annotated[
    str | None,
    typer.Option(metavar="PEM", help="Sign with this certificate, its issuers' behind it."),
]
SignKey = Annotated[str | None, typer.Option(metavar="PEM", help="The key of --sign-cert.")]
WatermarkMode = Annotated[
    str,
    typer.Option(
        "--watermark",
        help="A faint mark in the pixels: on, off, or auto, which marks signed results of 256 rows "
        "and more.",
    ),
]


@dataclass(frozen=True, slots=True)
class Common:
    """The options of every command that makes a video, by the names that it takes."""

    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            help=".mp4, .gif, .webp, .png (one frame), or no suffix for a folder of PNGs.",
        ),
    ] = None
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder of diffusers or ComfyUI, a .safetensors or .gguf file, or 'sprites', "
            "the bundled checkpoint (the default). Of two experts in two files: twice, the one for "
            "high noise first.",
            show_default=False,
        ),
    ] = None
    model_2: Annotated[
        str | None,
        typer.Option(
            "--model-2",
            help="The expert for low noise, beside the one for high noise: a second --model.",
        ),
    ] = None
    components: Components = None
    vae: Annotated[str | None, typer.Option(help="Its VAE: a file or a folder.")] = None
    text_encoder: Annotated[str | None, typer.Option(help="Its text encoder, likewise.")] = None
    image_encoder: Annotated[str | None, typer.Option(help="Its image encoder, likewise.")] = None
    vace: Annotated[
        list[str] | None,
        typer.Option(
            help="A file of VACE's blocks alone, laid over the model. Of two experts: twice, as "
            "--model.",
            show_default=False,
        ),
    ] = None
    tiny_vae: TinyVAE = None
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH[:EXPERT]]",
            help="An adapter, merged into the model; of two experts, high or low is the one it is "
            "for. Repeat it for several.",
            show_default=False,
        ),
    ] = None
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT in pixels, such as 832x480.")] = (
        None
    )
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a size or length off the model's grid.")
    ] = False
    fps: Annotated[float | None, typer.Option(help="Frames a second.")] = None
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 is none.")] = None
    guidance_2: Annotated[
        float | None, typer.Option(help="Guidance scale of the low-noise expert.")
    ] = None
    shift: Annotated[float | None, typer.Option(help="Shift of the noise schedule.")] = None
    ladder: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Levels of a few-step model, as `sora ladders` lists them; the checkpoint's own "
            "by default, and '' for a schedule of any length.",
        ),
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Of the initial noise; drawn at random by default.")
    ] = None
    negative_prompt: Annotated[
        str | None,
        typer.Option(
            help="What to steer away from; the checkpoint's by default, and '' for nothing."
        ),
    ] = None
    solver: Annotated[
        str | None, typer.Option(help="Such as unipc or euler; the checkpoint's by default.")
    ] = None
    upsample: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|URL",
            help="A language model that rewrites the prompt in more detail: its folder, or an "
            "OpenAI-compatible address (SORA_UPSAMPLER_KEY is its key).",
        ),
    ] = None
    upsample_model: Annotated[
        str | None, typer.Option(metavar="NAME", help="The model's name at the address.")
    ] = None
    device: Device = "auto"
    dtype: Dtype = "auto"
    vae_backend: VAEBackend = "auto"
    vae_dtype: VAEDtype = "auto"
    exact: Annotated[
        bool,
        typer.Option("--exact", help="Bits that hang on nothing that runs beside it; slower."),
    ] = False
    offload: Annotated[
        str,
        typer.Option(
            help="Weights that wait in host memory: none, text (the encoders) or blocks (the "
            "transformers' too); auto takes what makes the checkpoint's default size fit."
        ),
    ] = "auto"
    parallel: Annotated[
        str | None,
        typer.Option(
            help="Ranks to start: auto, or ulysses=2,guidance=2 (also ring, window, data). "
            "Under torchrun, how to use its ranks.",
            show_default=False,
        ),
    ] = None
    sign: Sign = False
    sign_cert: SignCert = None
    sign_key: SignKey = None
    watermark: WatermarkMode = "auto"

    def parts(self) -> str | dict[str, str] | None:
        """What a transformer file lacks, as `Engine.from_pretrained` takes it."""
        named = {
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "image_encoder": self.image_encoder,
            "tiny_vae": self.tiny_vae,
        }
        if len(self.vace or ()) > 2:
            raise UsageError(f"--vace: given {len(self.vace or ())} times; once an expert at most")
        named |= dict(zip(("vace", "vace_2"), self.vace or (), strict=False))
        given = {name: path for name, path in named.items() if path is not None}
        if given and self.components is not None:
            option = f"--{next(iter(given))}"
            raise UsageError(
                f"{option.replace('_', '-')}: --components {self.components} names a folder of all "
                "parts; give one or the other"
            )
        return given or self.components

    def decoder(self) -> str:
        """The backend of the VAE, as `Engine.from_pretrained` takes it."""
        return decoder_of(self.vae_backend, self.tiny_vae)

    def signing(self) -> tuple[bool, str | None, str | None]:
        """What `signing.credentials_of` takes."""
        return self.sign, self.sign_cert, self.sign_key

    def models(self) -> list[str]:
        """What was given as the model: nothing, one path, or two experts."""
        given = list(self.model or ())
        if self.model_2 is None:
            return given
        if len(given) != 1:
            raise UsageError(
                "--model-2: it goes beside one --model, the expert for high noise; "
                f"{len(given) or 'none'} are given"
            )
        return [*given, self.model_2]

    def loras(self) -> tuple[Lora, ...]:
        """The adapters, as `Engine.from_pretrained` takes them."""
        folders = [folder for path in self.models() for folder in lora_folders(Path(path))]
        return tuple(parse_lora(text, folders) for text in self.lora or ())

    def settings(self) -> dict[str, Any]:
        """What was given of a `VideoRequest`'s values."""
        height, width = (None, None) if self.size is None else parse_size(self.size)
        values = {
            "negative_prompt": self.negative_prompt,
            "height": height,
            "width": width,
            "fps": self.fps,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance,
            "guidance_scale_2": self.guidance_2,
            "shift": self.shift,
            "ladder": self.ladder,
            "seed": self.seed,
            "solver": self.solver,
            "strict_grid": self.strict or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def decoder_of(vae_backend: str, tiny_vae: str | None) -> str:
    """The backend that decodes: the tiny autoencoder where one is given."""
    if tiny_vae is not None and vae_backend not in ("auto", "tiny"):
        raise UsageError(
            f"--tiny-vae: --vae-backend {vae_backend} decodes with the model's own VAE; give one "
            "or the other"
        )
    return vae_backend if tiny_vae is None else "tiny"


ModelPath = str | tuple[str, ...]


def model_path(given: Sequence[str] | None) -> ModelPath:
    """What `Engine.from_pretrained` takes of the `--model`s that were given."""
    if not given:
        return DEFAULT_MODEL
    return given[0] if len(given) == 1 else tuple(given)


def must_exist(path: str) -> None:
    """UsageError for what is no file, no folder and no bundled checkpoint."""
    if path not in BUNDLED and not Path(path).exists():
        raise UsageError(
            f"{path} does not exist; {' and '.join(BUNDLED)} are the bundled checkpoints"
        )


def absolute(path: ModelPath) -> ModelPath:
    """The same from any folder. Links stay: what a hub's cache has behind them has no names."""
    if isinstance(path, tuple):
        return tuple(str(Path(part).absolute()) for part in path)
    return path if path in BUNDLED else str(Path(path).absolute())


def absolute_parts(parts: str | dict[str, str] | None) -> str | dict[str, str] | None:
    """`Common.parts`, the same from any folder."""
    if isinstance(parts, dict):
        return {name: str(Path(part).absolute()) for name, part in parts.items()}
    return None if parts is None else str(Path(parts).absolute())


def named(path: ModelPath) -> str:
    """A model for its user to read."""
    return path if isinstance(path, str) else " and ".join(path)


def parse_size(
    size: str, option: str = "--size", form: str = "WIDTHxHEIGHT, such as 832x480"
) -> tuple[int, int]:
    """'832x480' -> (480, 832)."""
    match = re.fullmatch(r"\s*(\d{1,6})\s*[xX×]\s*(\d{1,6})\s*", size)
    if match is None:
        raise UsageError(f"{option}: {size!r} is not {form}")
    return int(match[2]), int(match[1])


def lora_folders(model: Path) -> list[Path]:
    """Where ComfyUI keeps the adapters that go with a model: a folder of its layout, or a file in
    one."""
    near = [model / "loras", *(parent / "loras" for parent in list(model.parents)[1:2])]
    return [folder for folder in near if folder.is_dir()]


def parse_lora(text: str, folders: Sequence[Path] = ()) -> Lora:
    """'detail.safetensors:0.8:high' as an adapter, a file of its own or in one of the folders. A
    file of just that name is taken as it is."""

    def found(name: str) -> str | None:
        places = [Path(name), *(folder / name for folder in folders)]
        return next((str(place) for place in places if place.exists()), None)

    name, strength, expert = text, 1.0, None
    if found(text) is None:
        match = re.fullmatch(r"(.+?):([^:/\\]*)(?::([^:/\\]*))?", text)
        if match is not None:
            name, number, expert = match.groups()
            try:
                strength = float(number)
            except ValueError:
                raise UsageError(
                    f"--lora: {number!r} in {text!r} is no strength; FILE:0.8 or FILE:0.8:high "
                    "would work"
                ) from None
    if expert is not None and expert not in EXPERTS:
        raise UsageError(f"--lora: {expert!r} in {text!r} is no expert; high or low would work")
    path = found(name)
    if path is None:
        held = [f.name for folder in folders for f in sorted(folder.iterdir())][:6]
        there = f"; {', '.join(str(f) for f in folders)} has {', '.join(held)}" if held else ""
        raise UsageError(f"--lora: {name} does not exist{there}")
    return Lora(path, strength, expert)


def as_option(lora: Lora) -> str:
    """An adapter as `parse_lora` reads it."""
    parts = [str(lora.path_or_name), repr(lora.strength)]
    return ":".join(parts if lora.expert is None else [*parts, lora.expert])


def parse_parallel(text: str) -> ParallelConfig | Literal["auto"]:
    """'ulysses=2,guidance=2,shard_weights' as a layout; 'auto' as it is."""
    if text == "auto":
        return "auto"
    axes: dict[str, int] = {}
    parts = [part.strip() for part in text.split(",")]
    sharded = "shard_weights" in parts
    for part in parts:
        if part == "shard_weights":
            continue
        match = re.fullmatch(r"\s*(ulysses|ring|guidance|window|data)\s*=\s*(\d{1,4})\s*", part)
        if match is None:
            raise UsageError(
                f"--parallel: {part.strip()!r} is not an axis and a number of ranks, such as "
                "ulysses=2, and not shard_weights; axes are ulysses, ring, guidance, window and "
                "data"
            )
        if match[1] in axes:
            raise UsageError(f"--parallel: {match[1]} is given twice in {text!r}; once would work")
        axes[match[1]] = int(match[2])
    try:
        return ParallelConfig(**axes, shard_weights=sharded)
    except ValueError as error:
        raise UsageError(f"--parallel: {error}") from error


def in_options(error: Exception) -> str:
    """The error's text, with the option that it is about in front."""
    text = str(error)
    for name, option in _OPTION_OF.items():
        if re.match(rf"{name}\b", text):
            return f"{option}: {text}"
    return text
