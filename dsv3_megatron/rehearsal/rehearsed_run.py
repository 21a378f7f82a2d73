"""The run that a rehearsal runs of the one it is asked about: one phase, fewer micro-batches, no folders."""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.pipeline import microbatches_multiple, microbatches_to_fill
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import NO_LOGS
from dsv3_megatron.planning.run_cost import main_phase, only_phase


def fewest_microbatches(run: RunConfig, world_size: int) -> int:
    """Micro-batches of a step in which every rank has held as much, and posted each kind of message, as in a full one.

    A pipeline of P ranks is full after P of them, one that goes along the ranks and back after 2 P.
    """
    ranks, parallel = run.parallel.pipeline_model_parallel_size, run.parallel
    wanted = max(microbatches_to_fill(parallel.schedule, ranks), ranks + ranks // 2, 2)
    wanted += -wanted % microbatches_multiple(parallel.schedule, ranks)
    return min(wanted, run.training.num_microbatches(parallel.data_parallel_size(world_size)))


def rehearsed_run(run: RunConfig, world_size: int, num_microbatches: int | None = None, folder: str | None = None
                  ) -> RunConfig:
    """The run of its main phase, with a step of so many micro-batches, that writes and reads none of its folders.

    Args:
        run: A run.
        world_size: Processes of the run.
        num_microbatches: Micro-batches of a step; None: as few as fill the pipeline.
        folder: Folder that it saves to and loads from instead of its own; None: it does neither.

    Raises:
        ConfigError: the run itself cannot be, or cannot have so many micro-batches.
    """
    run.validate(world_size)
    run = only_phase(run, main_phase(run)).override(
        load=folder, save=folder, export_hf=None, **NO_LOGS)
    count = fewest_microbatches(run, world_size) if num_microbatches is None else num_microbatches
    replicas = run.parallel.data_parallel_size(world_size)
    run = run.override(global_batch_size=count * run.training.micro_batch_size * replicas)
    try:
        run.validate(world_size)
    except ConfigError as error:
        if num_microbatches is None:
            raise
        raise ConfigError(f"--num-microbatches={num_microbatches}: {error}") from error
    return run
