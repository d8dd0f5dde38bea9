"""The CLIP image encoder of Wan 2.1's image-to-video models, through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from sora_engine.errors import CheckpointError
from sora_engine.io.config_file import read_json_object
from sora_engine.io.loading import load_into
from sora_engine.io.safetensors import find_weights
from sora_engine.io.weights.opening import open_weights
from sora_engine.io.weights.source import WeightSource
from sora_engine.text.clip_file import open_clip, settings_of
from sora_engine.text.settings import read_settings

_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "hidden_act": "quick_gelu",
}
_ACTIVATIONS = ("quick_gelu", "gelu")
_SIZES = ({"shortest_edge"}, {"height", "width"})
_PROCESSOR_KEYS = frozenset(
    {
        "crop_size",
        "do_center_crop",
        "do_convert_rgb",
        "do_normalize",
        "do_rescale",
        "do_resize",
        "image_mean",
        "image_std",
        "resample",
        "rescale_factor",
        "size",
        "use_square_size",
    }
)
_PROCESSOR_KNOWN = frozenset(
    {"feature_extractor_type", "image_processor_type", "processor_class", "data_format", "device"}
    | {"_valid_processor_keys", "input_data_format", "return_tensors", "default_to_square"}
    | {"disable_grouping", "do_pad", "pad_size", "image_seq_length"}
)


class ImageEncoder:
    """Turns images into the embeddings that Wan 2.1 I2V attends to beside its text.

    `model` is transformers' `CLIPVisionModel`, `processor` its `CLIPImageProcessor`.
    """

    def __init__(self, model: nn.Module, processor: Any):
        self.model: Any = model
        self.processor = processor
        self._device: torch.device | None = None

    @classmethod
    def from_folders(
        cls,
        image_encoder: str | Path,
        image_processor: str | Path | None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> ImageEncoder:
        """Load `image_encoder/` and `image_processor/` of a diffusers folder from the disk alone.

        The encoder may be a single file, and the processor None: then pictures are prepared as
        CLIP's own are.

        Raises `CheckpointError` for whatever is missing, unknown or does not fit.
        """
        processor = None if image_processor is None else load_image_processor(Path(image_processor))
        model: Any = load_clip(Path(image_encoder), device=device, dtype=dtype)
        return cls(model, processor or usual_processor(model.config.image_size))

    @property
    def image_dim(self) -> int:
        """Channels of an embedding."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where it computes: where its weights lie, unless another device was set, to which they
        come when they are needed (see `models.offload`)."""
        return self._device or next(self.model.parameters()).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self._device = device

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights; returns self."""
        self.model.to(device)
        return self

    def activation_bytes(self, images: int) -> int:
        """The most that encoding so many pictures holds beside the weights: their float32 pixels,
        with the embeddings of all layers and what one layer makes of the last; or a copy of the
        pixels in the model's dtype, with the first embeddings."""
        config, size = self.model.config, self.model.dtype.itemsize
        tokens, width = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size
        values = config.num_channels * config.image_size**2
        pixels = 4 * values
        copied = pixels + tokens * width * size + (0 if size == 4 else values * size)
        layer = max(5 * width, width + 3 * config.intermediate_size)
        return images * max(
            pixels + tokens * size * ((config.num_hidden_layers + 1) * width + layer), copied
        )

    @torch.no_grad()
    def encode(self, images: Sequence[Image.Image | np.ndarray]) -> torch.Tensor:
        """Embeddings `[images, tokens, image_dim]` of RGB images (PIL, or uint8 `[height, width,
        3]`): the hidden states before CLIP's last layer, in the encoder's dtype, on its device."""
        pictures = [
            Image.fromarray(image) if isinstance(image, np.ndarray) else image for image in images
        ]
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values
        output = self.model(pixel_values=pixels.to(self.device), output_hidden_states=True)
        return output.hidden_states[-2]


def load_clip(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> nn.Module:
    """transformers' `CLIPVisionModel` with the weights of a folder or a file, for evaluation."""
    if path.is_file():
        with open_clip(path) as weights:
            return _filled(settings_of(weights), weights, device, dtype)
    config, allowed = path / "config.json", {"hidden_act": _ACTIVATIONS}
    values = read_settings(config, "CLIPVisionModel", _DEFAULTS, choices=allowed)
    if values["hidden_size"] % values["num_attention_heads"]:
        raise CheckpointError(
            f"hidden_size {values['hidden_size']} is no multiple of "
            f"num_attention_heads {values['num_attention_heads']}",
            path=config,
        )
    with open_weights(find_weights(path, "model")) as weights:
        return _filled(values, weights, device, dtype)


def _filled(
    values: dict[str, Any],
    weights: WeightSource,
    device: torch.device | str,
    dtype: torch.dtype | None,
) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel  # seconds to import

    with torch.device("meta"):
        model = CLIPVisionModel(CLIPVisionConfig(**values))
    # Releases of transformers differ in whether all names begin with this; files of either do.
    outer = "vision_model."
    prefix = outer if next(iter(model.state_dict())).startswith(outer) else ""
    positions = (values["image_size"] // values["patch_size"]) ** 2 + 1
    load_into(
        model,
        weights,
        device=device,
        dtype=dtype,
        rename=lambda name: prefix + name.removeprefix(outer),
        ignore=("position_ids",),
        buffers={f"{prefix}embeddings.position_ids": torch.arange(positions)[None]},
    )
    return model.eval()


def usual_processor(image_size: int) -> Any:
    """What CLIP's own models come with: the shorter side resized (bicubic), the middle cut out."""
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )


def load_image_processor(folder: Path) -> Any:
    """transformers' CLIP image processor, on Pillow: its results do not depend on what else is
    installed, where torchvision's resampling would give slightly other pixels."""
    path = folder / "preprocessor_config.json"
    config = read_json_object(path)
    unknown = sorted(set(config) - _PROCESSOR_KEYS - _PROCESSOR_KNOWN)
    if unknown:
        raise CheckpointError(f"unknown configuration keys {unknown}", path=path)
    values = {key: value for key, value in config.items() if key in _PROCESSOR_KEYS}
    for key in ("size", "crop_size"):
        _check_size(key, values.get(key), path)
    from transformers import CLIPImageProcessorPil

    try:
        return CLIPImageProcessorPil(**values)
    except Exception as error:  # the library raises what it likes for values that it cannot use
        raise CheckpointError(f"not a CLIP image processor: {error}", path=path) from error


def _check_size(key: str, value: object, path: Path) -> None:
    sides = list(value.values()) if isinstance(value, dict) else [value]
    right_keys = not isinstance(value, dict) or set(value) in _SIZES
    if value is not None and not (
        right_keys and all(isinstance(s, int) and 0 < s <= 4096 for s in sides)
    ):
        raise CheckpointError(f"{key} is {value!r}; it must be sizes up to 4096", path=path)
