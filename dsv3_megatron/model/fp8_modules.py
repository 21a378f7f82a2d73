"""The precision map, put into a stage's modules.

A local linear or the experts of a layer get their line of the map (`config/precision.py`) by their global name; what is
in no line keeps computing in the run's precision. Transformer Engine's modules are run inside its own context instead,
each by itself, so that its recipe holds for what the map says and for nothing else (on a GPU: not run).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.precision import LinearPrecision, precision_map
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.experts import GroupedExperts
from dsv3_megatron.model.global_names import global_name
from dsv3_megatron.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear, ReplicatedLinear
from dsv3_megatron.model.token_dispatcher import FrugalMoELayer
from dsv3_megatron.ops.fp8.choice import local_backend, resolve_fp8_backend
from dsv3_megatron.ops.fp8.engine import autocast, installed_recipe
from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend

logger = logging.getLogger(__name__)

_LINEARS = (LocalColumnParallelLinear, LocalRowParallelLinear, ReplicatedLinear)


@dataclass(frozen=True)
class PlacedModule:
    """A module that FP8 may compute, with its global name; of experts, that of the first of their two weights."""

    name: str
    module: torch.nn.Module


def fp8_modules(stage: torch.nn.Module) -> Iterator[PlacedModule]:
    """Linears and experts of a stage that is built from local modules, the output head among them."""
    for path, module in stage.named_modules():
        if isinstance(module, _LINEARS):
            yield PlacedModule(global_name(path + ".", stage).removesuffix("."), module)
        elif isinstance(module, GroupedExperts):
            yield PlacedModule(global_name(path + ".", stage) + "linear_fc1", module)


def apply_precision(stages: list[torch.nn.Module], run: RunConfig, groups: ProcessGroupCollection, *,
                    transformer_impl: str) -> None:
    """Make the stages compute as the run's precision map says.

    Args:
        stages: This rank's stages, not wrapped.
        run: A run with FP8 in force.
        groups: Process groups of the run.
        transformer_impl: What the stages are built from, resolved.

    Raises:
        ConfigError: The backend that the run asks for cannot run here.
    """
    name = resolve_fp8_backend(run.fp8.fp8_backend, transformer_impl=transformer_impl,
                               accumulation=run.fp8.fp8_accumulation)
    precisions = precision_map(run.fp8, run.model)
    if name == "transformer_engine":
        recipe = installed_recipe(precisions.values())
        for stage in stages:
            run_in_engine_context(stage, precisions, recipe)
        return
    backend = local_backend(name)
    for stage in stages:
        for placed in fp8_modules(stage):
            if placed.name not in precisions:
                continue
            lines = [precisions[placed.name]]
            if isinstance(placed.module, GroupedExperts):
                # The module holds both weights of its experts and is found by the name of the first.
                lines.append(precisions[placed.name.replace("linear_fc1", "linear_fc2")])
            if any(line.is_fp8 for line in lines):
                setattr(placed.module, "fp8", (tuple(lines), backend))
        if run.fp8.dispatches_fp8:
            _narrow_dispatch(stage, precisions, backend)


def use_engine_fp8(config: MLATransformerConfig) -> None:
    """Let Megatron-Core's Transformer Engine modules expect FP8: its grouped experts pad their rows for it.

    Set after the configuration has been checked. On a GPU: not run.
    """
    config.fp8, config.fp8_recipe = "e4m3", "blockwise"


def run_in_engine_context(stage: torch.nn.Module, precisions: dict[str, LinearPrecision], recipe: Any) -> None:
    """Run every module that the map names in FP8 by this recipe, or out of FP8, whatever is around it.

    On a GPU: not run.
    """
    found = 0
    for path, module in stage.named_modules():
        precision = precisions.get(global_name(path + ".", stage).removesuffix("."))
        if precision is None:
            continue
        found += 1

        def forward(*args: Any, inner: Any = module.forward, is_fp8: bool = precision.is_fp8, **kwargs: Any) -> Any:
            with autocast(recipe, enabled=is_fp8):
                return inner(*args, **kwargs)

        module.forward = forward
    assert found, "every stage with a layer has linears"


def _narrow_dispatch(stage: torch.nn.Module, precisions: dict[str, LinearPrecision], backend: ReferenceBackend
                     ) -> None:
    """FP8 on the wire of every MoE layer whose experts take FP8."""
    for path, module in stage.named_modules():
        if isinstance(module, FrugalMoELayer) and isinstance(module.experts, GroupedExperts):
            name = global_name(path + ".", stage) + "experts.linear_fc1"
            if precisions[name].fprop == "fp8":
                module.token_dispatcher.backend = backend
