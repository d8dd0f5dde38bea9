"""What a transformer file lacks, from wherever people keep it: a diffusers folder, ComfyUI's
folders, single files named one by one, or the same all-in-one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from sora_engine.errors import CheckpointError
from sora_engine.io.weights.opening import open_weights
from sora_engine.models.folder import EVERYWHERE, Component, FolderLayout, config_file
from sora_engine.models.wan.vace import OVERLAYS
from sora_engine.text.clip_file import is_clip
from sora_engine.text.umt5_file import PREFIXES as TEXT_PREFIXES
from sora_engine.text.umt5_file import is_umt5, refuse_t5
from sora_engine.vae.registry import vae_in_file

COMFY = {
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "clip"),
    "image_encoder": ("clip_vision",),
}
"""Folders of ComfyUI's layout in which a part lies."""
COMFY_TRANSFORMERS = ("diffusion_models", "unet")
WEIGHTS = (".safetensors", ".gguf")


def find_parts(
    paths: Sequence[Path],
    components: Path | Mapping[str, Path] | None,
    needed: Sequence[str],
    layout: FolderLayout,
) -> tuple[Path, dict[str, Component]]:
    """The folder where they were looked for, and the parts.

    components: a folder, or by name a file or a folder of each; what it does not name, and None,
    is looked for in the transformer file itself, beside it, and in ComfyUI's folders around it.
    needed: must be there; of what goes with them (tokenizer, scheduler, image processor) whatever
    there is. Raises CheckpointError.
    """
    file = paths[0]
    near = file.parent.parent if file.parent.name in COMFY_TRANSFORMERS else file.parent
    folder = components if isinstance(components, Path) else near
    given = components if isinstance(components, Mapping) else {}
    known = {*layout.components, *OVERLAYS, *EVERYWHERE} - {"transformer"}
    unknown = sorted(set(given) - known)
    if unknown:
        raise CheckpointError(f"unknown components {unknown}; known are {sorted(known)}")
    whole = _inside(file, needed, layout) if components is None or given else {}
    parts: dict[str, Component] = {}
    for name in needed:
        if name in given:
            parts[name] = part_at(name, given[name], layout)
        elif name in whole:
            parts[name] = whole[name]
        else:
            parts[name] = _in_folder(name, folder, layout, file)
    extra = {"tokenizer", "scheduler", *(["image_processor"] if "image_encoder" in needed else [])}
    for name in sorted(extra):
        place = given.get(name, folder / name)
        lone = {"tokenizer": "text_encoder", "image_processor": "image_encoder"}.get(name)
        single = lone is None or parts[lone].folder.is_file()
        if name in given or place.is_dir() or not single:
            parts[name] = Component.open(name, place, layout.components[name])
    return folder, parts


def part_at(name: str, path: Path, layout: FolderLayout) -> Component:
    """A part in a folder of its own, or in a single file."""
    if path.is_dir():
        return Component.open(name, path, layout.components[name])
    if not path.exists():
        raise CheckpointError(f"no such file or folder for the {name}", path=path)
    found = _in_file(name, path, layout)
    if found is None:
        if name == "text_encoder":
            refuse_t5(path)
        with open_weights(path) as weights:
            seen = ", ".join(list(weights)[:4])
        raise CheckpointError(
            f"no {name} of Wan: it holds {seen}; people hold it as "
            f"{layout.usual.get(name, 'a folder')}",
            path=path,
        )
    return found


def _in_file(name: str, path: Path, layout: FolderLayout) -> Component | None:
    """A part in a single file; None where the file holds no such thing."""
    class_name = layout.components[name][0]
    if name == "text_encoder":
        return Component(name, class_name, path, {}) if is_umt5(path) else None
    if name == "image_encoder":
        return Component(name, class_name, path, {}) if is_clip(path) else None
    if name == "vae":
        with open_weights(path) as weights:
            config = vae_in_file({n: weights.info(n).shape for n in weights}, path=path)
        if config is not None and config.class_name in layout.components[name]:
            return Component(name, config.class_name, path, config.to_dict())
        beside = path.parent / config_file(name)
        if beside.is_file():
            return Component.open(name, path.parent, layout.components[name])
    return None


def _inside(path: Path, needed: Sequence[str], layout: FolderLayout) -> dict[str, Component]:
    """The parts in the transformer's own file, if it is an all-in-one."""
    found: dict[str, Component] = {}
    with open_weights(path) as weights:
        shapes = {name: weights.info(name).shape for name in weights}
    if "vae" in needed and any(n.startswith(("vae.", "first_stage_model.")) for n in shapes):
        config = vae_in_file(shapes, path=path)
        if config is not None and config.class_name in layout.components["vae"]:
            found["vae"] = Component("vae", config.class_name, path, config.to_dict())
    if any(name.startswith(TEXT_PREFIXES) for name in shapes) and is_umt5(path):
        found["text_encoder"] = Component("text_encoder", "UMT5EncoderModel", path, {})
    return found


def _in_folder(name: str, folder: Path, layout: FolderLayout, file: Path) -> Component:
    comfy = [folder / n for n in COMFY.get(name, ()) if (folder / n).is_dir()]
    files = [f for place in comfy for f in sorted(place.iterdir()) if f.suffix in WEIGHTS]
    if files:
        found = [part for f in files if (part := _in_file(name, f, layout)) is not None]
        if len(found) == 1:
            return found[0]
        named = ", ".join(str(part.folder) for part in found) or "none of its files is one"
        raise CheckpointError(
            f"{len(found)} files for the {name}: {named}; name one as components={{{name!r}: ...}}",
            path=comfy[0],
        )
    if (folder / name).is_dir() and (not comfy or (folder / name / config_file(name)).exists()):
        return Component.open(name, folder / name, layout.components[name])
    where = f"no folder for the {name}"
    if comfy:
        where = f"no file for the {name} in {comfy[0].name}/"
    raise CheckpointError(
        f"{where}, which {file.name} lacks: give `components`, a folder with vae/, text_encoder/ "
        "and tokenizer/ or with ComfyUI's vae/ and text_encoders/, or name it as "
        f"components={{{name!r}: ...}} (on the command line --{name.replace('_', '-')}); people "
        f"hold it as {layout.usual.get(name, 'a folder')}",
        path=comfy[0] if comfy else folder / name,
    )
