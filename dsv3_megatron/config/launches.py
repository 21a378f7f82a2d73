"""Which of a run's phases one start of it takes: those in a row under one layout.

A phase may name another layout than the one before it (`phases.py`). A process cannot change the ranks that it shares
weights with under way: so a start ends with the last phase of its layout, saves, and tells its launcher by an exit code
that the run goes on. The launcher starts the same command again, which loads that checkpoint under the next layout.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dsv3_megatron.config.recipe import PlannedPhase, Recipe, TrainedAmount
from dsv3_megatron.config.run import RunConfig

# What a process returns whose run goes on under another layout, in another start.
EXIT_NEXT_LAYOUT = 5


@dataclass(frozen=True)
class LaunchPart:
    """A run as one start of it has it.

    Attributes:
        run: The run, in the layout of the phase that it begins or goes on with.
        recipe: The run's recipe, which stops after the last phase under that layout.
        first_phase: Phase that it begins or goes on with.
        next_phase: First phase of another layout that the run does later; None: the start takes the run to its end.
    """

    run: RunConfig
    recipe: Recipe
    first_phase: PlannedPhase
    next_phase: PlannedPhase | None

    @classmethod
    def at(cls, run: RunConfig, recipe: Recipe, place: TrainedAmount) -> LaunchPart:
        """The part that a start at a place of the run takes.

        Args:
            run: A valid run.
            recipe: Recipe of the run, placed where the run is.
            place: Steps and tokens before the start.
        """
        phases = recipe.phases_to_run
        plan = recipe.step(place.iteration, place.tokens)
        first = phases[-1] if plan is None else plan.phase
        others = [phase for phase in phases[first.index:] if phase.parallel != first.parallel]
        num_phases = others[0].index if others else recipe.num_phases
        return cls(dataclasses.replace(run, parallel=first.parallel),
                   dataclasses.replace(recipe, num_phases=num_phases), first, others[0] if others else None)
