"""Operations of a preset under a layout."""

from __future__ import annotations

from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.time.layer_operations import stage_operations
from dsv3_megatron.planning.time.operations import Shape


def operations_of(run):
    shape = Shape.of(run)
    return shape, [operation for stage in stage_layouts(run.model, run.parallel)
                   for group in stage_operations(run, stage, shape) for operation in group]
