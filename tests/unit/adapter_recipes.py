"""Adapters in each layout that tools write, and what a model's weights become, by hand in float64.

A recipe gets the weights of a tiny Wan by diffusers' names, and gives an adapter's tensors and
header, and by name the weights after it. Wan's own names are those of `test_checkpoint`, which
has them from the published conversion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tests.unit.test_checkpoint import original_name

Tensors = dict[str, Tensor]

ATTENTION = [
    f"blocks.{i}.attn{j}.{part}"
    for i in range(2)
    for j in (1, 2)
    for part in ("to_q", "to_k", "to_v", "to_out.0")
]
LINEARS = [*ATTENTION, *(f"blocks.{i}.ffn.net.{n}" for i in range(2) for n in ("0.proj", "2"))]
OUTSIDE = [
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_proj",
    "proj_out",
]


def own(module):
    """Wan's name of a module."""
    return original_name(f"{module}.weight").removesuffix(".weight")


@dataclass
class Made:
    tensors: Tensors = field(default_factory=dict)
    after: Tensors = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def change(self, weights: Tensors, name: str, delta: Tensor) -> None:
        before = self.after.get(name, weights[name].double())
        self.after[name] = before + delta.reshape(before.shape)


class Noise:
    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape, scale=0.5):
        return torch.randn(*shape, generator=self.generator) * scale


def low_rank(weights, modules, key, *, rank=3, alpha=None, up="lora_up", down="lora_down"):
    """LoRA of some modules. key: the module's key in the file."""
    made, noise = Made(), Noise()
    for i, module in enumerate(modules):
        weight = weights[f"{module}.weight"]
        rows, width = weight.shape[0], weight[0].numel()
        b, a = noise(rows, rank), noise(rank, width)
        made.tensors[f"{key(module)}.{up}.weight"] = b
        made.tensors[f"{key(module)}.{down}.weight"] = a
        scale = 1.0
        if alpha is not None:
            made.tensors[f"{key(module)}.alpha"] = torch.tensor(float(alpha + i))
            scale = (alpha + i) / rank
        made.change(weights, f"{module}.weight", scale * b.double() @ a.double())
    return made


def underscored(prefix, naming=own):
    return lambda module: prefix + naming(module).replace(".", "_")


def peft_header(weights):
    """diffusers since 0.35: alphas in the header, one module with its own."""
    made = RECIPES["1 diffusers, no alpha"](weights)
    scales = dict.fromkeys(LINEARS, 2.0)
    scales["blocks.0.attn1.to_q"] = 3.0
    said = {"r": 3, "lora_alpha": 6, "alpha_pattern": {"blocks.0.attn1.to_q": 9}}
    said["target_modules"] = LINEARS
    told = {f"transformer.{name}": value for name, value in said.items()}
    made.metadata = {"lora_adapter_metadata": json.dumps(told)}
    for module, scale in scales.items():
        name = f"{module}.weight"
        made.after[name] = weights[name] + scale * (made.after[name] - weights[name])
    return made


def extract(weights):
    """lightx2v, CausVid, AccVid: a LoRA, and differences of all that is no matrix."""
    made = low_rank(weights, LINEARS, lambda m: f"diffusion_model.{own(m)}", alpha=2)
    noise = Noise(1)

    def differ(key, name, suffix):
        delta = noise(*weights[name].shape)
        made.tensors[f"diffusion_model.{key}.{suffix}"] = delta
        made.change(weights, name, delta.double())

    for i in range(2):
        differ(f"blocks.{i}.norm3", f"blocks.{i}.norm2.weight", "diff")
        differ(f"blocks.{i}.norm3", f"blocks.{i}.norm2.bias", "diff_b")
        differ(f"blocks.{i}", f"blocks.{i}.scale_shift_table", "diff_m")
        differ(f"blocks.{i}.self_attn.norm_q", f"blocks.{i}.attn1.norm_q.weight", "diff")
        differ(f"blocks.{i}.cross_attn.norm_k", f"blocks.{i}.attn2.norm_k.weight", "diff")
    for module in LINEARS:
        differ(own(module), f"{module}.bias", "diff_b")
    differ("head.head", "proj_out.weight", "diff")
    differ("head.head", "proj_out.bias", "diff_b")
    differ("head", "scale_shift_table", "diff_m")
    differ("patch_embedding", "patch_embedding.weight", "diff")
    differ("patch_embedding", "patch_embedding.bias", "diff_b")
    return made


def whole_tables(weights):
    """Modulation as a parameter of its own, and values that take the weight's place."""
    made, noise = Made(), Noise()
    table = noise(1, 6, 24)
    made.tensors["diffusion_model.blocks.0.modulation.diff"] = table
    made.change(weights, "blocks.0.scale_shift_table", table.double())
    value = noise(*weights["proj_out.weight"].shape)
    made.tensors["diffusion_model.head.head.set_weight"] = value
    made.after["proj_out.weight"] = value.double()
    norm = noise(24)
    made.tensors["lycoris_blocks_1_norm3.w_norm"] = norm
    made.tensors["lycoris_blocks_1_norm3.b_norm"] = 2 * norm
    made.change(weights, "blocks.1.norm2.weight", norm.double())
    made.change(weights, "blocks.1.norm2.bias", 2 * norm.double())
    return made


def loha(weights):
    made, noise = Made(), Noise()
    for module in LINEARS:
        key, (rows, width) = (
            f"lora_unet_{own(module).replace('.', '_')}",
            weights[f"{module}.weight"].shape,
        )
        factors = [noise(rows, 3), noise(3, width), noise(rows, 3), noise(3, width)]
        for part, value in zip(("w1_a", "w1_b", "w2_a", "w2_b"), factors, strict=True):
            made.tensors[f"{key}.hada_{part}"] = value
        made.tensors[f"{key}.alpha"] = torch.tensor(1.5)
        a, b, c, d = (value.double() for value in factors)
        made.change(weights, f"{module}.weight", 0.5 * (a @ b) * (c @ d))
    return made


def lokr(weights):
    """Each factor whole or a product, in turn; alpha counts where there is a product."""
    made, noise = Made(), Noise()
    for i, module in enumerate(LINEARS):
        rows, width = weights[f"{module}.weight"].shape
        key = f"diffusion_model.{own(module)}"
        factors = []
        for n, (r, w) in ((1, (2, 4)), (2, (rows // 2, width // 4))):
            if i >> (n - 1) & 1:
                a, b = noise(r, 3), noise(3, w)
                made.tensors |= {f"{key}.lokr_w{n}_a": a, f"{key}.lokr_w{n}_b": b}
                factors.append(a.double() @ b.double())
            else:
                factor = noise(r, w)
                made.tensors[f"{key}.lokr_w{n}"] = factor
                factors.append(factor.double())
        made.tensors[f"{key}.alpha"] = torch.tensor(1.2)
        scale = float(torch.tensor(1.2)) / 3 if i & 3 else 1.0
        made.change(weights, f"{module}.weight", scale * torch.kron(*factors))
    return made


def dora(weights, by="rows"):
    made = low_rank(weights, LINEARS, lambda m: f"diffusion_model.{own(m)}", alpha=2)
    noise = Noise(3)
    for module in LINEARS:
        changed = made.after[f"{module}.weight"]
        axis = 1 if by == "rows" else 0
        norm = changed.norm(dim=axis, keepdim=True)
        magnitude = noise(*norm.shape).abs() + 1
        made.tensors[f"diffusion_model.{own(module)}.dora_scale"] = magnitude
        made.after[f"{module}.weight"] = magnitude.double() * changed / norm
    return made


def convolution(weights):
    """LoRA of the patches' convolution, whole and in Tucker's form."""
    noise, made = Noise(), Made()
    weight = weights["patch_embedding.weight"]  # [24, 16, 1, 2, 2]
    up, down = noise(24, 3, 1, 1, 1), noise(3, *weight.shape[1:])
    made.tensors["lora_unet_patch_embedding.lora_up.weight"] = up
    made.tensors["lora_unet_patch_embedding.lora_down.weight"] = down
    delta = torch.einsum("or,rithw->oithw", up.flatten(1).double(), down.double())
    made.change(weights, "patch_embedding.weight", delta)
    return made


def tucker(weights, kind="lora"):
    noise, made = Noise(), Made()
    key = "lora_unet_patch_embedding"
    core, out, into = noise(3, 3, 1, 2, 2), noise(24, 3), noise(3, 16)
    delta = torch.einsum("oa,abthw,bi->oithw", out.double(), core.double(), into.double())
    if kind == "lora":
        made.tensors[f"{key}.lora_up.weight"] = out[:, :, None, None, None].contiguous()
        made.tensors[f"{key}.lora_mid.weight"] = core
        made.tensors[f"{key}.lora_down.weight"] = into[:, :, None, None, None].contiguous()
    else:
        made.tensors |= {
            f"{key}.hada_{name}": value
            for n in (1, 2)
            for name, value in (
                (f"t{n}", core),
                (f"w{n}_a", out.T.contiguous()),
                (f"w{n}_b", into.contiguous()),
            )
        }
        made.tensors = {name: value.clone() for name, value in made.tensors.items()}
        delta = delta * delta
    made.change(weights, "patch_embedding.weight", delta)
    return made


def processors(weights):
    """diffusers until 2023."""

    def key(module):
        module = module.replace(".attn1.", ".attn1.processor.").replace(".to_out.0", ".to_out")
        return f"transformer.{module}_lora"

    return low_rank(weights, ATTENTION, key, up="up", down="down")


def bare(weights):
    return low_rank(weights, LINEARS, own, up="lora_B.default", down="lora_A.default")


RECIPES: dict[str, Callable[[Tensors], Made]] = {
    "1 diffusers, alphas in the header": peft_header,
    "1 diffusers, no alpha": lambda w: low_rank(
        w, LINEARS, lambda m: f"transformer.{m}", up="lora_B", down="lora_A"
    ),
    "2 Wan's own names, down and up": lambda w: low_rank(
        w, LINEARS, lambda m: f"diffusion_model.{own(m)}", alpha=2
    ),
    "2 Wan's own names, A and B": lambda w: low_rank(
        w, LINEARS, lambda m: f"diffusion_model.{own(m)}", alpha=2, up="lora_B", down="lora_A"
    ),
    "3 kohya, musubi-tuner": lambda w: low_rank(w, LINEARS, underscored("lora_unet_"), alpha=2),
    "3 kohya, a few layers": lambda w: low_rank(w, LINEARS[:3], underscored("lora_unet_"), alpha=2),
    "3 kohya, diffusers' names": lambda w: low_rank(
        w, LINEARS, underscored("lora_transformer_", str), alpha=2
    ),
    "4 VideoX-Fun": lambda w: low_rank(
        w, [*LINEARS, *OUTSIDE], underscored("lora_unet__"), alpha=2
    ),
    "5 extracts with differences": extract,
    "5 tables, whole values, norms": whole_tables,
    "6 alphas outside of blocks": lambda w: low_rank(
        w, OUTSIDE, lambda m: f"diffusion_model.{own(m)}", alpha=2
    ),
    "7 LoHa": loha,
    "7 LoKr": lokr,
    "8 DoRA by rows": dora,
    "8 DoRA by columns": lambda w: dora(w, "columns"),
    "9 DiffSynth": bare,
    "9 diffusers' names alone": lambda w: low_rank(w, LINEARS, str, up="lora_B", down="lora_A"),
    "9 raw PEFT": lambda w: low_rank(
        w, LINEARS, lambda m: f"base_model.model.{m}", up="lora_B", down="lora_A"
    ),
    "10 diffusers' processors": processors,
    "10 lora.up": lambda w: low_rank(w, LINEARS, lambda m: m, up="lora.up", down="lora.down"),
    "10 lora_linear_layer": lambda w: low_rank(
        w, LINEARS, lambda m: f"unet.{m}", up="lora_linear_layer.up", down="lora_linear_layer.down"
    ),
    "11 LyCORIS": lambda w: low_rank(w, LINEARS, underscored("lycoris_"), alpha=2),
    "11 a convolution": convolution,
    "11 Tucker's form": tucker,
    "11 Tucker's form, LoHa": lambda w: tucker(w, "loha"),
}


def with_strength(weights: Tensors, after: Tensors, strength: float) -> Tensors:
    """What a strength makes of the change."""
    return {n: weights[n].double() + strength * (v - weights[n]) for n, v in after.items()}


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm().clamp_min(math.ulp(1.0)))
