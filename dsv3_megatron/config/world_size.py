"""How many of the processes at hand a run can use: nodes come and go, its layout and its batches stay."""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.run import RunConfig


def largest_world_size(run: RunConfig, num_processes: int) -> int:
    """Find the most processes, of those at hand, under which every rule of the run holds.

    Tensor, pipeline, context and expert parallelism stay as they are, and so do the batches of all phases: the number
    of data-parallel replicas is what changes.

    Raises:
        ConfigError: the run cannot be on so few processes; the rule is the one that the smallest layout breaks.
    """
    unit, step = run.parallel.minimum_world_size, run.parallel.model_parallel_size
    for size in range(num_processes - num_processes % step, 0, -step):
        try:
            run.validate(size)
        except ConfigError:
            continue
        return size
    try:
        run.validate(unit)
    except ConfigError as error:
        raise ConfigError(f"the run cannot be on {num_processes} process(es) or fewer: {error}") from error
    raise ConfigError(f"the run cannot be on {num_processes} process(es) or fewer: its layout needs {unit}; set NNODES "
                      "so that the fewest nodes have as many, or use less parallelism")
