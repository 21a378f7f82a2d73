"""What the processes of one layout do to be certified: two steps, a resume of their own, one of another layout's.

One process alone does the same, and beforehand what is defined.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv3_megatron.certification.defined_steps import DefinedStep, defined_steps, has_definition
from dsv3_megatron.certification.given_roundings import RoundingNotes, RoundingWatch
from dsv3_megatron.certification.random_samples import RandomSamples
from dsv3_megatron.certification.rank_step import (
    MadeDataTrainer,
    RankPlace,
    RankStep,
    StepHooks,
    parameter_values,
    place_of,
    take_step,
)
from dsv3_megatron.certification.reference_weights import Weights, is_router_bias, random_weights
from dsv3_megatron.certification.routing_notes import Notes, RoutingWatch
from dsv3_megatron.certification.shrunk_run import NUM_STEPS
from dsv3_megatron.certification.weight_names import load_reference_weights
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.global_names import WholeParameter


@dataclass(frozen=True)
class RunToCertify:
    """A run that its processes take, and what they take it with.

    Attributes:
        name: Name for messages and folders.
        run: A small run, valid for world_size processes.
        world_size: Number of processes.
        seed: Seed of weights and samples.
        num_steps: Steps to take; only of more than one are resumes certified too.
    """

    name: str
    run: RunConfig
    world_size: int
    seed: int = 0
    num_steps: int = NUM_STEPS

    @property
    def samples(self) -> RandomSamples:
        """Samples of all steps."""
        return RandomSamples.of_run(self.run, self.num_steps, self.seed)


@dataclass(frozen=True)
class Resumed:
    """What one rank has after loading a checkpoint, and the step from there.

    Attributes:
        place: Place of the rank.
        loaded: Parameters as they were loaded.
        step: The next step.
        notes: What routers saw and chose in it.
        num_taken: Roundings to FP8 that it took from the run that it is compared with, and not its own.
    """

    place: RankPlace
    loaded: list[WholeParameter]
    step: RankStep
    notes: Notes
    num_taken: int


@dataclass(frozen=True)
class RankRecord:
    """What one rank of a layout did.

    Attributes:
        steps: Steps from the given weights.
        notes: What routers saw and chose in them.
        resumed: A resume from the checkpoint that the layout itself wrote after its first step; None: not asked for.
        resumed_from_other: A resume from one process's checkpoint; None likewise.
        initial: Parameters before the first step.
        roundings: Roundings to FP8 in the steps that the order of a sum decides.
        num_taken: Roundings that were taken from one process, and are not this rank's own.
    """

    steps: list[RankStep]
    notes: Notes
    resumed: Resumed | None
    resumed_from_other: Resumed | None
    initial: list[WholeParameter]
    roundings: RoundingNotes
    num_taken: int


def initial_weights(model: ModelConfig, seed: int) -> Weights:
    """Weights in float64 far from any special value, with router biases that fp32 holds exactly."""
    return {name: value.float().double() if is_router_bias(name) else value
            for name, value in random_weights(model, seed + 1).items()}


def definition_of(job: RunToCertify) -> tuple[list[DefinedStep], Notes] | None:
    """What the run's steps must give; None where there is no definition to compare with."""
    if not has_definition(job.run):
        return None
    return defined_steps(job.run, job.samples, initial_weights(job.run.model, job.seed), job.num_steps)


@dataclass(frozen=True)
class Decided:
    """What another run has decided where rounding decides, to be taken.

    Attributes:
        choices: Choices of experts; None: the routers' own.
        roundings: Roundings to FP8.
    """

    choices: Notes | None = None
    roundings: RoundingNotes = field(default_factory=dict)


def run_layout(job: RunToCertify, folder: Path, decided: Decided, other: Path | None,
               hooks: StepHooks | None = None) -> RankRecord:
    """Take the run's steps in this process and its peers; called by every rank.

    Args:
        job: The run.
        folder: Folder for its checkpoint; all ranks have the same.
        decided: Choices and roundings to take.
        other: Folder of another layout's checkpoint after the first step; None: nothing to resume from.
        hooks: Things to do on the way.
    """
    run, samples = job.run, job.samples
    run.validate(torch.distributed.get_world_size())
    saved = str(folder) if job.num_steps > 1 else None
    trainer = MadeDataTrainer(run.override(save=saved), samples)
    load_reference_weights(trainer.chunks, trainer.groups, initial_weights(run.model, job.seed), run.model.num_layers)
    trainer.optimizer.reload_model_params()
    initial = parameter_values(trainer)
    watch, rounding, steps = RoutingWatch(decided.choices), RoundingWatch(decided.roundings), []
    with closing(trainer.claim), watch.watched(), rounding.watched():
        for number in range(1, job.num_steps + 1):
            watch.begin(step_name(number))
            rounding.begin(step_name(number))
            steps.append(take_step(trainer, hooks))
            if number == 1 and saved:
                trainer.save(is_needed=True)
    leave_layout()
    return RankRecord(steps, watch.notes,
                      resume(job, Path(saved), decided, hooks) if saved else None,
                      resume(job, other, decided, hooks) if other else None, initial, rounding.notes,
                      rounding.num_taken)


def resume(job: RunToCertify, folder: Path, decided: Decided, hooks: StepHooks | None = None) -> Resumed:
    """Load a checkpoint after the first step and take the second; called by every rank.

    Args:
        job: The run.
        folder: Folder of the checkpoint.
        decided: Choices and roundings to take.
        hooks: Things to do on the way.
    """
    trainer = MadeDataTrainer(job.run.override(load=str(folder)), job.samples)
    loaded = parameter_values(trainer)
    watch, rounding = RoutingWatch(decided.choices), RoundingWatch(decided.roundings)
    with closing(trainer.claim), watch.watched(), rounding.watched():
        watch.begin(step_name(NUM_STEPS))
        rounding.begin(step_name(NUM_STEPS))
        step = take_step(trainer, hooks)
    result = Resumed(place_of(trainer), loaded, step, watch.notes, rounding.num_taken)
    leave_layout()
    return result


def step_name(number: int) -> str:
    """Name of a step's pass over the data, for those who watch it."""
    return f"step {number}"


def leave_layout() -> None:
    """Leave the groups of a layout, so that the processes can take another."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
