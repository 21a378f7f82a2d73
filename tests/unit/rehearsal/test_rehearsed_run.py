"""The run that is rehearsed: the one asked for, with fewer micro-batches and no folders, or that one's own errors."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.rehearsal.rehearsed_run import fewest_microbatches, rehearsed_run


def test_phases_folders_and_most_micro_batches_are_left_out() -> None:
    run = preset("dsv3-671b").override(save="runs/x", tensorboard_dir="runs/logs")
    rehearsed = rehearsed_run(run, 2048)
    assert rehearsed.training.phases == () and rehearsed.checkpoint.save is None
    assert rehearsed.logging.tensorboard_dir is None
    assert rehearsed.training.num_microbatches(128) == 32, "DualPipe fills 16 pipeline ranks with 2 x 16"
    assert (rehearsed.model, rehearsed.parallel) == (run.model, run.parallel)


@pytest.mark.parametrize(("schedule", "asked", "count"), [("1f1b", 3072, 24), ("1f1b", 1280, 10),
                                                          ("dualpipe", 4096, 32), ("dualpipev", 8192, 32)])
def test_as_few_micro_batches_as_fill_the_pipeline(schedule: str, asked: int, count: int) -> None:
    run = preset("dsv3-671b").override(pipeline_schedule=schedule)
    run = run.override(global_batch_size=asked, phases=())
    assert fewest_microbatches(run, 2048) == count


def test_a_number_of_micro_batches_is_taken_or_refused_by_the_run() -> None:
    run = preset("dsv3-671b")
    assert rehearsed_run(run, 2048, 30).training.global_batch_size == 30 * 128
    with pytest.raises(ConfigError, match="--num-microbatches=3: .* does not fit the schedule"):
        rehearsed_run(run.override(pipeline_schedule="dualpipe", global_batch_size=4096), 2048, 3)


def test_the_runs_own_errors_come_first() -> None:
    with pytest.raises(ConfigError, match="world_size=100"):
        rehearsed_run(preset("dsv3-671b"), 100)
