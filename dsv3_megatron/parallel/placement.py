"""Which pipeline rank holds which stages, of which copy of the model. Pure Python.

Megatron-Core knows one way to number stages: stage s is virtual stage s // P of pipeline rank s % P. The schedules that
fold the pipeline (see `schedule/plan.py`) put the stages of the way back on other ranks. Such a stage is built as if on
the rank that Megatron-Core's numbering has for it.
"""

from __future__ import annotations

from typing import NamedTuple

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import V_SHAPED


class PlacedStage(NamedTuple):
    """A stage of one of the model's copies."""

    direction: int
    stage: int


Placement = tuple[tuple[PlacedStage, ...], ...]  # by rank, by chunk


def place_stages(schedule: str, num_ranks: int, stages_per_rank: int) -> Placement:
    """Put the stages of a model on pipeline ranks.

    Args:
        schedule: Name of a schedule, one of SCHEDULES.
        num_ranks: P; even for dualpipe.
        stages_per_rank: Stages that a rank holds of one copy of the model.
    """
    ranks = range(num_ranks)
    if schedule == "dualpipe":
        # Chunk 0 is of the direction that enters at the rank's nearer end.
        near = [(min(rank, num_ranks - 1 - rank), int(rank >= num_ranks // 2)) for rank in ranks]
        return tuple((PlacedStage(direction, stage), PlacedStage(1 - direction, num_ranks - 1 - stage))
                     for stage, direction in near)
    if schedule in V_SHAPED:
        return tuple((PlacedStage(0, rank), PlacedStage(0, 2 * num_ranks - 1 - rank)) for rank in ranks)
    return tuple(tuple(PlacedStage(0, chunk * num_ranks + rank) for chunk in range(stages_per_rank)) for rank in ranks)


def placement(parallel: ParallelConfig) -> Placement:
    """Put the stages of a run's model on its pipeline ranks."""
    return place_stages(parallel.schedule, parallel.pipeline_model_parallel_size, parallel.stages_per_rank)
