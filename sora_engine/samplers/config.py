"""What `scheduler/scheduler_config.json` says, read by an allow-list of classes, keys and values.

A key that changes the result and that this package does not carry out is an error, never ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sora_engine.errors import CheckpointError, RequestError

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow_prediction"]
Space = Literal["flow", "vp"]
Spread = Literal["even", "linear-quadratic"]
"""How the pipelines of a family spread levels: see `samplers.length`."""

SOLVERS = ("euler", "unipc", "dpm++", "dpm++sde", "ddim", "ddpm", "renoise")
"""The names by which a request may ask for a solver other than the checkpoint's."""


@dataclass(frozen=True)
class SamplerConfig:
    """How a checkpoint's noise is laid out (`space`, betas, shift) and which solver takes it off.

    `space` "flow" is `x = (1 - s) x0 + s eps`; "vp" is `x = (x0 + s eps) / sqrt(1 + s^2)`.
    """

    solver: str
    space: Space
    prediction_type: PredictionType
    num_train_timesteps: int = 1000
    # flow
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    shift_terminal: float | None = None
    shift_of_length: tuple[float, float, int, int] | None = None
    """`mu` at a short and at a long video, and how many tokens these have (`mu_of_length`)."""
    spread: Spread | None = None
    """None: as the scheduler's class spreads them by itself."""
    # variance preserving
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    steps_offset: int = 0
    lambda_min_clipped: float = -math.inf
    set_alpha_to_one: bool = True
    fixed_stride: bool = False
    # where the levels lie between the first and the last
    sigma_spacing: Literal["karras", "exponential", "lu"] | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    final_sigmas_type: Literal["zero", "sigma_min"] = "zero"
    # solvers
    solver_order: int = 2
    solver_type: Literal["bh1", "bh2", "midpoint", "heun"] = "bh2"
    predict_x0: bool = True
    lower_order_final: bool = True
    euler_at_final: bool = False
    disable_corrector: tuple[int, ...] = ()
    clip_sample_range: float | None = None
    variance_type: Literal["fixed_small", "fixed_large"] = "fixed_small"


@dataclass(frozen=True)
class _Key:
    """One key of a scheduler's file: its default there, which values are carried out, in words."""

    default: object
    accepts: Callable[[Any], bool]
    expected: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def _flag(default: bool) -> _Key:
    return _Key(default, lambda v: isinstance(v, bool), "true or false")


def _number(
    default: float | None,
    above: float = -math.inf,
    *,
    below: float = math.inf,
    optional: bool = False,
) -> _Key:
    expected = "a number" if above == -math.inf else f"a number above {above:g}"
    return _Key(
        default,
        lambda v: (optional and v is None) or (_is_number(v) and above < v < below),
        expected
        + ("" if below == math.inf else f" and below {below:g}")
        + (" or null" if optional else ""),
    )


def _integer(default: int, low: int, high: int) -> _Key:
    return _Key(
        default,
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"a whole number from {low} to {high}",
    )


def _choice(default: str, *values: str) -> _Key:
    return _Key(default, lambda v: v in values, "one of " + ", ".join(values))


def _only(value: bool | None) -> _Key:
    """A key that is carried out at one value alone."""
    word = "null" if value is None else str(value).lower()
    return _Key(value, lambda v: v is value, f"{word} (nothing else is supported)")


_UNUSED = _Key(None, lambda v: True, "anything: it has no effect here")
_TRAIN = {"num_train_timesteps": _integer(1000, 1, 1_000_000)}
_BETAS = {
    "beta_schedule": _choice("linear", "linear", "scaled_linear", "squaredcos_cap_v2"),
    "beta_start": _number(0.0001, 0.0, below=1.0),
    "beta_end": _number(0.02, 0.0, below=1.0),
    "trained_betas": _Key(
        None,
        lambda v: (
            v is None
            or (isinstance(v, list | tuple) and all(_is_number(b) and 0 < b < 1 for b in v))
        ),
        "null or a list of numbers in (0, 1)",
    ),
    "rescale_betas_zero_snr": _flag(False),
    "steps_offset": _integer(0, 0, 1000),
    # Dynamic thresholding is per pixel; diffusers itself calls it unsuitable for latents.
    "thresholding": _only(False),
    "dynamic_thresholding_ratio": _UNUSED,
    "sample_max_value": _UNUSED,
}
_SIGMA_SPACING = {
    "use_karras_sigmas": _flag(False),
    "use_exponential_sigmas": _flag(False),
    # Needs the quantiles of a beta distribution, which would take SciPy.
    "use_beta_sigmas": _only(False),
}
_MULTISTEP = {
    **_TRAIN,
    **_BETAS,
    **_SIGMA_SPACING,
    "solver_order": _integer(2, 1, 3),
    "prediction_type": _choice("epsilon", "epsilon", "sample", "v_prediction", "flow_prediction"),
    "lower_order_final": _flag(True),
    "timestep_spacing": _choice("linspace", "linspace", "leading", "trailing"),
    "final_sigmas_type": _choice("zero", "zero", "sigma_min"),
    "use_flow_sigmas": _flag(False),
    "flow_shift": _number(1.0, 0.0),
    "use_dynamic_shifting": _flag(False),
    "time_shift_type": _choice("exponential", "exponential", "linear"),
}
_CLIP = {
    "clip_sample": _flag(True),
    "clip_sample_range": _number(1.0, 0.0),
    "prediction_type": _choice("epsilon", "epsilon", "sample", "v_prediction"),
    "timestep_spacing": _choice("leading", "linspace", "leading", "trailing"),
}
_KEYS: dict[str, dict[str, _Key]] = {
    "FlowMatchEulerDiscreteScheduler": {
        **_TRAIN,
        **_SIGMA_SPACING,
        "shift": _number(1.0, 0.0),
        "use_dynamic_shifting": _flag(False),
        # These four say how a pipeline turns a length into `mu`; they do not change a given `mu`.
        "base_shift": _number(0.5),
        "max_shift": _number(1.15),
        "base_image_seq_len": _integer(256, 1, 10**9),
        "max_image_seq_len": _integer(4096, 1, 10**9),
        "invert_sigmas": _only(False),
        "shift_terminal": _number(None, 0.0, optional=True),
        "time_shift_type": _choice("exponential", "exponential", "linear"),
        "stochastic_sampling": _flag(False),
    },
    "UniPCMultistepScheduler": {
        **_MULTISTEP,
        "predict_x0": _flag(True),
        # diffusers reads the solver types of its other classes as bh2.
        "solver_type": _choice("bh2", "bh1", "bh2", "midpoint", "heun", "logrho"),
        "disable_corrector": _Key(
            [],
            lambda v: isinstance(v, list | tuple) and all(isinstance(i, int) for i in v),
            "a list of step numbers",
        ),
        "solver_p": _only(None),
        "sigma_min": _number(None, 0.0, optional=True),
        "sigma_max": _number(None, 0.0, optional=True),
        "shift_terminal": _number(None, 0.0, optional=True),
    },
    "DPMSolverMultistepScheduler": {
        **_MULTISTEP,
        "algorithm_type": _choice("dpmsolver++", "dpmsolver++", "sde-dpmsolver++"),
        "solver_type": _choice("midpoint", "midpoint", "heun", "logrho", "bh1", "bh2"),
        "euler_at_final": _flag(False),
        "use_lu_lambdas": _flag(False),
        "lambda_min_clipped": _Key(
            -math.inf, lambda v: _is_number(v) and v != math.inf, "a number or -inf"
        ),
        "variance_type": _only(None),
    },
    "DDIMScheduler": {**_TRAIN, **_BETAS, **_CLIP, "set_alpha_to_one": _flag(True)},
    "DDPMScheduler": {
        **_TRAIN,
        **_BETAS,
        **_CLIP,
        "variance_type": _choice("fixed_small", "fixed_small", "fixed_large"),
    },
}


def read_config(config: Mapping[str, object], *, path: str | Path | None = None) -> SamplerConfig:
    """Read the fields of a diffusers `scheduler_config.json` (`path`, for the errors alone).

    Keys left out take diffusers' defaults. Keys that start with an underscore are remarks.
    Raises CheckpointError that names the key and the value of whatever is not carried out.
    """
    name = config.get("_class_name")
    keys = _KEYS.get(name) if isinstance(name, str) else None
    if not isinstance(name, str) or keys is None:
        raise CheckpointError(
            f"_class_name {name!r} is not a scheduler that can be read; those that can: "
            + ", ".join(_KEYS),
            path=path,
        )
    values = {key: spec.default for key, spec in keys.items()}
    for key, value in config.items():
        if key.startswith("_"):
            continue
        if key not in keys:
            raise CheckpointError(f"{name} has no key {key!r} (value {value!r})", path=path)
        if not keys[key].accepts(value):
            raise CheckpointError(
                f"{name}: {key} = {value!r} is not supported; it must be {keys[key].expected}",
                path=path,
            )
        values[key] = value
    _check_together(name, values, path)
    return _typed(name, values)


def _check_together(name: str, v: Mapping[str, Any], path: str | Path | None) -> None:
    """Raise for values that are each fine and wrong together."""

    def refuse(keys: str, why: str) -> None:
        shown = ", ".join(f"{k} = {v[k]!r}" for k in keys.split())
        raise CheckpointError(f"{name}: {shown}: {why}", path=path)

    flow = v.get("use_flow_sigmas", name == "FlowMatchEulerDiscreteScheduler")
    spacings = [
        key
        for key in ("use_karras_sigmas", "use_exponential_sigmas", "use_lu_lambdas")
        if v.get(key)
    ]
    if len(spacings) > 1:
        refuse(" ".join(spacings), "only one of them can be true")
    if "use_flow_sigmas" in v:
        if flow and v["prediction_type"] == "v_prediction":
            refuse(
                "use_flow_sigmas prediction_type",
                "a v-prediction is defined for variance-preserving levels; flow levels take "
                "flow_prediction, sample or epsilon",
            )
        if not flow and v["prediction_type"] == "flow_prediction":
            refuse("use_flow_sigmas prediction_type", "a flow_prediction needs flow levels")
        if not flow and v["use_dynamic_shifting"]:
            refuse("use_flow_sigmas use_dynamic_shifting", "only flow levels are shifted")
        # diffusers gives ratios of noise to signal here, which are above 1, as flow levels.
        broken = [s for s in spacings if name[0] == "D" or s != "use_karras_sigmas"]
        if flow and broken:
            refuse(f"use_flow_sigmas {broken[0]}", "this spacing gives no flow levels")
        # To level 0 the step is of infinite length in log signal-to-noise, and these "sigma_min"
        # schedules end with a step of none: neither has an order above 1.
        endless = v["final_sigmas_type"] == "zero" or flow or bool(spacings)
        if name[0] == "U" and endless and not v["lower_order_final"] and v["solver_order"] > 1:
            refuse(
                "lower_order_final final_sigmas_type",
                "the last step here is of first order; set lower_order_final to true",
            )
    if v.get("algorithm_type") == "sde-dpmsolver++" and v["solver_order"] > 2:
        # diffusers' weight of the second difference tends to -1, not to 0, as steps get short.
        refuse("algorithm_type solver_order", "the SDE is solved at order 1 or 2")
    if v.get("shift_terminal") is not None:
        if not flow:
            refuse("shift_terminal use_flow_sigmas", "only flow levels are stretched")
        if v["shift_terminal"] >= 1:
            refuse("shift_terminal", "the last level must be under 1")
    if not v.get("predict_x0", True) and v["prediction_type"] == "flow_prediction":
        refuse("predict_x0 prediction_type", "a flow_prediction is solved with predict_x0 = true")
    discrete = name in ("DDIMScheduler", "DDPMScheduler")
    if discrete and v["rescale_betas_zero_snr"] and v["prediction_type"] == "epsilon":
        refuse("rescale_betas_zero_snr prediction_type", "pure noise tells no x0 from epsilon")
    betas = v.get("trained_betas")
    if betas is not None and len(betas) != v["num_train_timesteps"]:
        raise CheckpointError(
            f"{name}: trained_betas holds {len(betas)} values; num_train_timesteps asks for "
            f"{v['num_train_timesteps']}",
            path=path,
        )


def _typed(name: str, v: Mapping[str, Any]) -> SamplerConfig:
    solver = {
        "FlowMatchEulerDiscreteScheduler": "renoise" if v.get("stochastic_sampling") else "euler",
        "UniPCMultistepScheduler": "unipc",
        "DPMSolverMultistepScheduler": (
            "dpm++sde" if v.get("algorithm_type") == "sde-dpmsolver++" else "dpm++"
        ),
        "DDIMScheduler": "ddim",
        "DDPMScheduler": "ddpm",
    }[name]
    flow = v.get("use_flow_sigmas", name == "FlowMatchEulerDiscreteScheduler")
    solver_type = v.get("solver_type", "bh2")
    if solver == "unipc" and solver_type not in ("bh1", "bh2"):
        solver_type = "bh2"
    if solver.startswith("dpm") and solver_type not in ("midpoint", "heun"):
        solver_type = "midpoint"
    spacing: Literal["karras", "exponential", "lu"] | None = None
    if v.get("use_karras_sigmas"):
        spacing = "karras"
    elif v.get("use_exponential_sigmas"):
        spacing = "exponential"
    elif v.get("use_lu_lambdas"):
        spacing = "lu"
    betas = v.get("trained_betas")
    same = SamplerConfig.__dataclass_fields__.keys() & v.keys()
    fields: dict[str, Any] = {key: v[key] for key in same}
    fields.update(
        solver=solver,
        space="flow" if flow else "vp",
        prediction_type=v.get("prediction_type", "flow_prediction"),
        shift=float(v.get("shift", v.get("flow_shift", 1.0))),
        solver_type=solver_type,
        sigma_spacing=spacing,
        trained_betas=None if betas is None else tuple(float(b) for b in betas),
        disable_corrector=tuple(v.get("disable_corrector", ())),
        # diffusers' DDIM goes down by T // n whatever the spacing of its timesteps is.
        fixed_stride=name == "DDIMScheduler",
        clip_sample_range=float(v["clip_sample_range"]) if v.get("clip_sample") else None,
        variance_type=v.get("variance_type") or "fixed_small",
    )
    lengths = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    if "base_shift" in v and v["base_image_seq_len"] != v["max_image_seq_len"]:
        fields["shift_of_length"] = tuple(v[key] for key in lengths)
    return SamplerConfig(**fields)


def with_solver(config: SamplerConfig, name: str) -> SamplerConfig:
    """The same checkpoint under another solver: levels and prediction stay, the solver's own
    settings go to diffusers' defaults.

    Raises RequestError for a name that is not in SOLVERS or that cannot serve the checkpoint.
    """
    if name not in SOLVERS:
        raise RequestError(f"solver {name!r} is not known; choose one of {', '.join(SOLVERS)}")
    if name == config.solver:
        return config
    if name == "euler" and config.space == "vp":
        raise RequestError(
            "solver 'euler' integrates flow levels and this checkpoint has variance-preserving "
            "ones; 'ddim' is its first-order solver"
        )
    keep_spacing = config.sigma_spacing == "karras" and config.space == "vp"
    dpm = name.startswith("dpm++")
    return replace(
        config,
        solver=name,
        solver_order=2,
        solver_type="midpoint" if dpm else "bh2",
        predict_x0=True,
        lower_order_final=True,
        euler_at_final=False,
        disable_corrector=(),
        final_sigmas_type="zero",
        sigma_spacing=config.sigma_spacing if keep_spacing else None,
        clip_sample_range=config.clip_sample_range if name in ("ddim", "ddpm") else None,
    )
