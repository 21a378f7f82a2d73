"""Which ranks of a run differ, and so are worth a rehearsal each: by position in the pipeline and among the experts.

Megatron-Core numbers ranks with the pipeline outermost; within a pipeline rank, expert-tensor ranks come first, then
expert-parallel ones, then replicas.
"""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig

# With no more kinds than this, every position among the experts is one.
_FEW = 16


def ranks_of_all_kinds(parallel: ParallelConfig, world_size: int) -> tuple[int, ...]:
    """One rank of each kind: pipeline position x expert position.

    Of many expert positions the first and the last are taken: those between do what the last one does, and the first
    one has most rows if routing is uneven.
    """
    pipeline, experts = parallel.pipeline_model_parallel_size, parallel.expert_model_parallel_size
    width = world_size // pipeline
    positions = range(experts) if pipeline * experts <= _FEW else (0, experts - 1)
    return tuple(stage * width + position * parallel.expert_tensor_parallel_size
                 for stage in range(pipeline) for position in positions)


def position_of(rank: int, parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Position of a rank in the pipeline, and among the expert-parallel ranks."""
    width = world_size // parallel.pipeline_model_parallel_size
    within = rank % width // parallel.expert_tensor_parallel_size
    return rank // width, within % parallel.expert_model_parallel_size


def require_ranks(ranks: list[int], world_size: int) -> tuple[int, ...]:
    """The ranks asked for, each once and in order.

    Raises:
        ConfigError: one is not of the run.
    """
    wrong = [rank for rank in ranks if not 0 <= rank < world_size]
    if wrong:
        raise ConfigError(f"--ranks {wrong[0]} must be from 0 to {world_size - 1}, below --world-size={world_size}")
    return tuple(sorted(set(ranks)))
