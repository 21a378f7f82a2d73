"""FP8: which product of which module runs in which precision, as one table, and the flags around it.

Module names are global: layer numbers are the model's, whatever stage holds them. Which weights FP8 may compute is a
column of `weights.py`. The others (embedding, output head, router, norms), and core attention, are never in FP8.

Source: DeepSeek-V3 report, section 3.3.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dsv3_megatron.config.fields import ConfigError, option
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.values import hold_tuples
from dsv3_megatron.config.weights import Fp8, Weight, sections

FP8_MODES = ("none", "blockwise")
FP8_BACKENDS = ("auto", "transformer_engine", "triton", "reference")
FP8_ACCUMULATIONS = ("fp32", "fp22", "fp22_aligned")
GRAD_GROUPINGS = ("tile", "block")
DISPATCH_FORMATS = ("fp8", "bf16")
SWIGLU_INPUTS = ("e4m3", "bf16")
# Matrix units take rows of 16 bytes.
GPU_MULTIPLE = 16


@dataclass(frozen=True)
class LinearPrecision:
    """How one linear layer, or one weight of the experts, computes. "bf16" stands for the run's own precision.

    Attributes:
        fprop: "fp8" or "bf16": y = x W^T.
        dgrad: dx = dy W.
        wgrad: dW = dy^T x.
        cached_input: x as it is kept for Wgrad: "e4m3", "e5m6" or "bf16". Of the second weight of an FFN or of experts
            what is kept is the input of SwiGLU; its output is computed again.
        input_scales: Scales of x: "arbitrary" or "power_of_2".
        scales: Scales of W and dy: "arbitrary" or "power_of_2".
        grad_grouping: dy in Dgrad: "tile" is 1x128; "block", 128x128, is the report's negative control.
        accumulation: Model of the products' accumulation; only the reference has others than "fp32".
    """

    fprop: str = "fp8"
    dgrad: str = "fp8"
    wgrad: str = "fp8"
    cached_input: str = "e4m3"
    input_scales: str = "arbitrary"
    scales: str = "arbitrary"
    grad_grouping: str = "tile"
    accumulation: str = "fp32"

    @property
    def is_fp8(self) -> bool:
        """Whether any of the layer's products, or its kept input, is in FP8."""
        return "fp8" in (self.fprop, self.dgrad, self.wgrad) or self.cached_input != "bf16"


_CHOICES = {
    "fprop": ("fp8", "bf16"), "dgrad": ("fp8", "bf16"), "wgrad": ("fp8", "bf16"),
    "cached_input": ("e4m3", "e5m6", "bf16"), "input_scales": ("arbitrary", "power_of_2"),
    "scales": ("arbitrary", "power_of_2"), "grad_grouping": GRAD_GROUPINGS, "accumulation": FP8_ACCUMULATIONS,
}
BF16 = LinearPrecision("bf16", "bf16", "bf16", "bf16")

# The report's map of the linears that the published checkpoint stores in FP8. The last line that matches a module's
# name holds. Others that FP8 may compute are in the run's precision.
TABLE: tuple[tuple[str, LinearPrecision], ...] = (
    # modules                        fprop  dgrad  wgrad  cached  scales of the input
    ("*", LinearPrecision("fp8", "fp8", "fp8", "e4m3", "arbitrary")),
    # What follows attention: attention's own backward needs this tensor too.
    ("*.self_attention.linear_proj", LinearPrecision("fp8", "fp8", "fp8", "e5m6", "power_of_2")),
    # What the dispatch carries.
    ("*.mlp.experts.linear_fc1", LinearPrecision("fp8", "fp8", "fp8", "e4m3", "power_of_2")),
)


@dataclass(frozen=True)
class Fp8Config:
    """FP8 training. Source: DeepSeek-V3 report, section 3.3."""

    fp8: str = option("none", choices=FP8_MODES,
                      help="blockwise: linears in FP8 with a scale for each 1x128 tile or 128x128 block")
    fp8_backend: str = option(
        "auto", choices=FP8_BACKENDS, help="what computes FP8; auto: transformer_engine where the model is built from "
        "it, triton on Hopper, the exact reference without a GPU")
    fp8_override: tuple[str, ...] = option(
        (), nargs="*", help="PATTERN=PRECISION ... on module names, e.g. 'decoder.layers.0.*=bf16' or "
        "'*.linear_proj=cached_input:e4m3,input_scales:arbitrary'; the last that matches holds")
    fp8_power_of_2_scales: bool = option(False, help="all scales are powers of two, not only those the report says")
    fp8_accumulation: str = option("fp32", choices=FP8_ACCUMULATIONS,
                                   help="reference only: model of the tensor core's sums between promotions")
    fp8_grad_grouping: str = option("tile", choices=GRAD_GROUPINGS, help="groups of output gradients in Dgrad; block: "
                                    "128x128, which the report saw diverge")
    fp8_swiglu_input: str = option("e4m3", choices=SWIGLU_INPUTS, help="how SwiGLU's input is kept for backward, which "
                                   "makes its output again; e4m3 is the report's, bf16 takes twice the memory")
    fp8_dispatch: str = option("fp8", choices=DISPATCH_FORMATS, help="what tokens travel in to their experts, and "
                               "gradients of the experts' outputs likewise")

    def __post_init__(self) -> None:
        hold_tuples(self)

    @property
    def is_enabled(self) -> bool:
        """Whether anything runs in FP8."""
        return self.fp8 != "none"

    @property
    def dispatches_fp8(self) -> bool:
        """Whether tokens travel to their experts in FP8."""
        return self.is_enabled and self.fp8_dispatch == "fp8"

    def validate(self, model: ModelConfig, parallel: ParallelConfig, transformer_impl: str) -> None:
        """Check the flags with one another, the overrides' names, and the widths for the backend that is named.

        Raises:
            ConfigError: one message with the rule, the values, the field and the way out.
        """
        for name, allowed in (("fp8", FP8_MODES), ("fp8_backend", FP8_BACKENDS),
                              ("fp8_accumulation", FP8_ACCUMULATIONS), ("fp8_grad_grouping", GRAD_GROUPINGS),
                              ("fp8_swiglu_input", SWIGLU_INPUTS), ("fp8_dispatch", DISPATCH_FORMATS)):
            if getattr(self, name) not in allowed:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if not self.is_enabled:
            defaults = Fp8Config()
            for field in dataclasses.fields(self):
                if field.name != "fp8" and getattr(self, field.name) != getattr(defaults, field.name):
                    raise ConfigError(f"{field.name}={getattr(self, field.name)} says how FP8 computes, and fp8=none; "
                                      "set fp8=blockwise or leave it out")
            return
        precision_map(self, model)
        if self.dispatches_fp8 and parallel.moe_token_dispatcher_type == "flex":
            raise ConfigError("fp8_dispatch=fp8 sends this library's own records, and moe_token_dispatcher_type=flex "
                              "sends none; set fp8_dispatch=bf16, or moe_token_dispatcher_type=node")
        self._validate_backend(model, parallel, transformer_impl)

    def _validate_backend(self, model: ModelConfig, parallel: ParallelConfig, transformer_impl: str) -> None:
        backend = self.fp8_backend
        if (backend == "transformer_engine") and transformer_impl == "local":
            raise ConfigError("fp8_backend=transformer_engine needs transformer_impl=transformer_engine or auto, not "
                              "local; set one of the two")
        if backend in ("triton", "reference") and transformer_impl == "transformer_engine":
            raise ConfigError(f"fp8_backend={backend} computes in local modules; set transformer_impl=local, or "
                              "fp8_backend=transformer_engine")
        if backend not in ("reference", "auto") and self.fp8_accumulation != "fp32":
            raise ConfigError(f"fp8_accumulation={self.fp8_accumulation} is a model that fp8_backend=reference alone "
                              f"has, not {backend}; set fp8_backend=reference")
        if backend in ("transformer_engine", "triton"):
            require_tileable(self, model, parallel, backend)


def require_tileable(fp8: Fp8Config, model: ModelConfig, parallel: ParallelConfig, backend: str) -> None:
    """Check that a GPU's matrix units can take every FP8 weight's part on a rank.

    Raises:
        ConfigError: a width is not a multiple of 16.
    """
    precisions = precision_map(fp8, model)
    for name, (rows, columns) in linear_shapes(model, parallel).items():
        for width in (rows, columns):
            if width % GPU_MULTIPLE and precisions[name].is_fp8:
                raise ConfigError(
                    f"{name} is [{rows}, {columns}] on a rank (tensor_model_parallel_size="
                    f"{parallel.tensor_model_parallel_size}): fp8_backend={backend} takes multiples of "
                    f"{GPU_MULTIPLE}; change the width or the split, leave the module out (fp8_override "
                    f"{name}=bf16), or use fp8_backend=reference")


def fp8_weights(model: ModelConfig) -> dict[str, Weight]:
    """Every linear that FP8 may compute, by its global name. The experts of a layer are two names for all of them."""
    return {section.ours + weight.module: weight for section in sections(model) for weight in section.weights
            if weight.fp8 is not Fp8.NEVER}


def linear_shapes(model: ModelConfig, parallel: ParallelConfig | None = None) -> dict[str, tuple[int, int]]:
    """Rows (out) and columns (in) of every linear that FP8 may compute, on one rank if split, by its global name.

    The experts of a layer are two names; each stands for all of them.
    """
    split = parallel or ParallelConfig()
    return {name: weight.local_matrix(model, split) for name, weight in fp8_weights(model).items()}


def precision_map(fp8: Fp8Config, model: ModelConfig) -> dict[str, LinearPrecision]:
    """The precision of every linear, by its global name: the table, the run's flags, then the overrides.

    Raises:
        ConfigError: an override that cannot be read, or whose pattern matches no module.
    """
    weights = fp8_weights(model)
    names = list(weights)
    precisions = {}
    for name, weight in weights.items():
        chosen = next(precision for pattern, precision in reversed(TABLE) if fnmatchcase(name, pattern))
        if weight.fp8 is Fp8.ON_REQUEST:
            chosen = BF16
        if chosen.is_fp8:
            chosen = dataclasses.replace(chosen, accumulation=fp8.fp8_accumulation, grad_grouping=fp8.fp8_grad_grouping)
            if fp8.fp8_power_of_2_scales:
                chosen = dataclasses.replace(chosen, input_scales="power_of_2", scales="power_of_2")
            if name.endswith(".linear_fc2"):
                chosen = dataclasses.replace(chosen, cached_input=fp8.fp8_swiglu_input)
        precisions[name] = chosen
    for override in fp8.fp8_override:
        pattern, changes = _read_override(override)
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            close = difflib.get_close_matches(pattern, names, n=2, cutoff=0.4)
            hint = " or ".join(close) if close else "*.self_attention.linear_proj"
            raise ConfigError(f"fp8_override={override}: no module's name matches {pattern}; names are such as {hint}")
        for name in matched:
            precisions[name] = dataclasses.replace(precisions[name], **changes)
    return precisions


def _read_override(text: str) -> tuple[str, dict[str, str]]:
    """Pattern and changed fields of PATTERN=bf16, PATTERN=fp8 or PATTERN=field:value,field:value."""
    pattern, equals, value = text.partition("=")
    if not (pattern and equals and value):
        raise ConfigError(f"fp8_override={text} must be PATTERN=bf16, PATTERN=fp8 or PATTERN=field:value,...")
    if value == "bf16":
        return pattern, {name: getattr(BF16, name) for name in ("fprop", "dgrad", "wgrad", "cached_input")}
    if value == "fp8":
        return pattern, {"fprop": "fp8", "dgrad": "fp8", "wgrad": "fp8", "cached_input": "e4m3"}
    changes = {}
    for part in value.split(","):
        field, _, chosen = part.partition(":")
        if field not in _CHOICES:
            raise ConfigError(f"fp8_override={text}: {field} is no field of a precision; use bf16, fp8, or of "
                              f"{', '.join(_CHOICES)}")
        if chosen not in _CHOICES[field]:
            raise ConfigError(f"fp8_override={text}: {field}={chosen!r} must be one of {', '.join(_CHOICES[field])}")
        changes[field] = chosen
    return pattern, changes
