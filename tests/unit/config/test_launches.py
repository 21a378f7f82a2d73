"""Phases under several layouts, and what each start of a run does of them."""

from __future__ import annotations

from typing import Any

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.launches import LaunchPart
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.recipe import TrainedAmount
from dsv3_megatron.config.run import RunConfig

LENGTHS = ((256, None), (512, 2), (512, None), (1024, 4))


def run_of_lengths(**changes: Any) -> RunConfig:
    """Five steps of each length; the third phase keeps the layout of the second."""
    phases = []
    for number, (length, ranks) in enumerate(LENGTHS):
        phase = {"name": f"p{number}", "train_iters": 5, "seq_length": length}
        if ranks:
            phase |= {"context_parallel_size": ranks, "rope_type": "yarn", "rotary_scaling_factor": 4.0,
                      "original_max_position_embeddings": 256}
        phases.append(phase)
    return preset("tiny").override(phases=read(phases), **{"save": "checkpoints", **changes})


def read(phases: list[dict[str, Any]]) -> Any:
    from dsv3_megatron.config.phases import read_phases

    return read_phases(phases)


def part_after(run: RunConfig, steps: int) -> LaunchPart:
    place = run.recipe().place_at(steps)
    assert place is not None
    return LaunchPart.at(run, run.recipe(), place)


@pytest.mark.parametrize(("steps", "ranks", "end", "following"), [
    (0, 1, 5, "p1"), (4, 1, 5, "p1"), (5, 2, 15, "p3"), (12, 2, 15, "p3"), (15, 4, 20, None), (20, 4, 20, None)])
def test_a_start_takes_the_phases_of_one_layout(steps: int, ranks: int, end: int, following: str | None) -> None:
    run = run_of_lengths()
    run.validate(4)
    part = part_after(run, steps)
    assert part.run.parallel.context_parallel_size == ranks and part.recipe.num_steps == end
    assert (part.next_phase.name if part.next_phase else None) == following
    assert part.run.in_phase(part.first_phase).parallel == part.run.parallel


def test_without_other_layouts_a_start_takes_all() -> None:
    run = preset("tiny")
    part = LaunchPart.at(run, run.recipe(), TrainedAmount())
    assert part.run == run and part.recipe == run.recipe() and part.next_phase is None


def test_a_stop_comes_before_another_layout_too() -> None:
    run = run_of_lengths(stop_after_phase="p0", save=None)
    run.validate(4)  # what comes after the stop is not checked
    assert part_after(run, 0).next_phase is None
    assert run.minimum_world_size == 1 and run_of_lengths().minimum_world_size == 4


def test_each_phase_has_to_fit_under_its_own_layout() -> None:
    with pytest.raises(ConfigError, match="phase 'p3': .* = 1 x 1 x 4 = 4 must divide world_size=2"):
        run_of_lengths().validate(2)
    with pytest.raises(ConfigError, match="phase 'p1': the phase has another layout than the run begins with, and goes "
                                          "on from a checkpoint under it: give save, a folder, or --stop-after-phase"):
        run_of_lengths(save=None).validate(4)


def test_the_extension_of_deepseek_v3_keeps_the_tokens_of_a_rank() -> None:
    """480 sequences of 128K divide among 2048 GPUs: 4 replicas of 16 stages, of which 32 ranks share a sequence."""
    run = preset("dsv3-671b").override(stop_after_phase=None, save="checkpoints")
    run.validate(2048)
    for phase in run.recipe().phases[-2:]:
        assert phase.training.seq_length / phase.parallel.context_parallel_size == 4096
        replicas = phase.parallel.data_parallel_size(2048)
        assert phase.training.global_batch_size % replicas == 0 and phase.parallel.pipeline_model_parallel_size == 16
    assert [phase.parallel.data_parallel_size(2048) for phase in run.recipe().phases[-3:]] == [128, 16, 4]
