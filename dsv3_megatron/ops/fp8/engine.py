"""The report's recipe in Transformer Engine's words: block scaling, E4M3 everywhere, 1x128 and 128x128 groups.

What Transformer Engine (2.20 was looked at) cannot say: scales by kind of tensor (one switch for all, powers of two by
default there and arbitrary by default here), E5M6 for what attention's output is kept in, products of one module in
different precisions. The factory refuses what it cannot say, instead of running something else.

Source: DeepSeek-V3 report, section 3.3; Transformer Engine's `Float8BlockScaling`.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.precision import LinearPrecision

logger = logging.getLogger(__name__)

MIN_VERSION = (2, 3)
MIN_CAPABILITY = (9, 0)
MIN_CUDA = (12, 9)


def block_scaling_recipe(precisions: Iterable[LinearPrecision], *, engine: Any, recipes: Any,
                         capability: tuple[int, int], cuda: tuple[int, int]) -> Any:
    """A `Float8BlockScaling` for the modules that are in FP8.

    Args:
        precisions: Precisions of these modules.
        engine: The package `transformer_engine`, for its version.
        recipes: The engine's module `common.recipe`.
        capability: Compute capability of the device.
        cuda: Version of CUDA that torch was built with.

    Raises:
        ConfigError: Too old an engine, device or CUDA, or precisions that one recipe cannot say.
    """
    version = _version(engine)
    if version < MIN_VERSION or not hasattr(recipes, "Float8BlockScaling"):
        raise ConfigError(f"fp8=blockwise with fp8_backend=transformer_engine needs Transformer Engine "
                          f"{MIN_VERSION[0]}.{MIN_VERSION[1]} or newer for its Float8BlockScaling, this is "
                          f"{engine.__version__}; upgrade it, or set transformer_impl=local")
    if capability < MIN_CAPABILITY or cuda < MIN_CUDA:
        raise ConfigError(
            f"fp8=blockwise with fp8_backend=transformer_engine needs compute capability {_dotted(MIN_CAPABILITY)} "
            f"(Hopper) or higher and CUDA {_dotted(MIN_CUDA)}, this is {_dotted(capability)} with CUDA "
            f"{_dotted(cuda)}; set fp8=none, or transformer_impl=local with fp8_backend=reference")
    asked = {precision for precision in precisions if precision.is_fp8}
    partial = next((p for p in asked if (p.fprop, p.dgrad, p.wgrad) != ("fp8",) * 3), None)
    if partial is not None:
        raise ConfigError(f"fp8_backend=transformer_engine computes all three products of a module in FP8 or none, not "
                          f"fprop={partial.fprop}, dgrad={partial.dgrad}, wgrad={partial.wgrad}; set "
                          "transformer_impl=local, or =bf16 for the module")
    if any(p.grad_grouping == "block" for p in asked):
        raise ConfigError("fp8_grad_grouping=block cannot go with fp8_backend=transformer_engine, which multiplies no "
                          "two operands in blocks; set transformer_impl=local")
    if any(p.cached_input == "e5m6" for p in asked):
        logger.warning("fp8: Transformer Engine keeps the input of the projection after attention in E4M3, not in E5M6")
    power_of_2 = all(p.scales == "power_of_2" for p in asked)
    quantized = recipes.QParams(power_2_scale=power_of_2, amax_epsilon=0.0)
    recipe = recipes.Float8BlockScaling(fp8_format=recipes.Format.E4M3)
    # Annotated as class attributes there, so that its constructor does not take them.
    for tensor in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        setattr(recipe, tensor, quantized)
    wanted = {"x_block_scaling_dim": 1, "w_block_scaling_dim": 2, "grad_block_scaling_dim": 1}
    for name, value in wanted.items():
        if getattr(recipe, name) != value:
            raise ConfigError(f"Transformer Engine {engine.__version__}: Float8BlockScaling.{name} is "
                              f"{getattr(recipe, name)}, the report's recipe needs {value}; set transformer_impl=local")
    logger.info("fp8: Transformer Engine's block scaling, E4M3, %s scales",
                "power-of-two" if power_of_2 else "arbitrary")
    return recipe


def installed_recipe(precisions: Iterable[LinearPrecision]) -> Any:
    """`block_scaling_recipe` for the installed package and the current device. On a GPU: not run."""
    import torch
    import transformer_engine as engine
    from transformer_engine.common import recipe as recipes

    major, minor, *_ = (int(part) for part in (torch.version.cuda or "0.0").split("."))
    return block_scaling_recipe(precisions, engine=engine, recipes=recipes,
                                capability=torch.cuda.get_device_capability(), cuda=(major, minor))


def autocast(recipe: Any, *, enabled: bool) -> contextlib.AbstractContextManager[Any]:
    """Transformer Engine's context around a module: FP8 by this recipe, or not at all. On a GPU: not run."""
    import transformer_engine.pytorch as engine

    enter = getattr(engine, "autocast", None)
    if enter is not None:  # from 2.8 on
        return enter(enabled=enabled, recipe=recipe)
    return engine.fp8_autocast(enabled=enabled, fp8_recipe=recipe)


def _version(engine: Any) -> tuple[int, int]:
    major, minor, *_ = str(engine.__version__).split(".")
    return int(major), int(minor)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
