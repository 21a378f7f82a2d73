"""What a run's schedule makes of steps that were taken already, and whether they were taken so. No torch.

A checkpoint records by which schedules its steps were planned: usually one, from the first step on; one more for each
time that a run deliberately went over to another (`Stretch`). A resumed run plans the same steps by its own settings
and compares, step by step: learning rate, batch, sequence length, lambda, gamma, tokens and samples. Settings may
differ as long as the steps so far do not, such as a longer run at a constant learning rate, or phases that lie ahead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv3_megatron.config.phases import DATA_FIELDS, MODEL_FIELDS, TRAINING_FIELDS
from dsv3_megatron.config.recipe import Recipe, StepPlan, TrainedAmount, plan_recipe
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import WITHOUT_PHASES, TrainingConfig

# Fields of a run that its steps follow from; in how many passes a step is taken changes nothing of it.
SCHEDULE_FIELDS = (*(name for name in TRAINING_FIELDS if name != "micro_batch_size"), *WITHOUT_PHASES, "phases")
_RATE_FIELDS = ("lr", "min_lr", "lr_warmup_iters", "lr_decay_style")
# Up to so many steps each is compared; of more, evenly spaced ones and those around every change of the batch.
_MAX_COMPARED = 4096


@dataclass(frozen=True)
class Stretch:
    """Steps in a row that one schedule planned.

    Attributes:
        fields: SCHEDULE_FIELDS of the run that planned them, plain values.
        start: Steps, tokens and samples of the run at which the stretch begins.
        shift: The planning run's `Recipe.shift` in the stretch.
    """

    fields: Mapping[str, Any]
    start: TrainedAmount = TrainedAmount()
    shift: TrainedAmount = TrainedAmount()

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"fields": dict(self.fields), "start": dataclasses.asdict(self.start),
                "shift": dataclasses.asdict(self.shift)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Stretch:
        """Make a stretch from the plain values that `as_dict` gave."""
        return cls(values["fields"], TrainedAmount(**values["start"]), TrainedAmount(**values["shift"]))


def schedule_fields(training: TrainingConfig) -> dict[str, Any]:
    """SCHEDULE_FIELDS of a run as plain values."""
    fields = {name: getattr(training, name) for name in SCHEDULE_FIELDS}
    return {**fields, "phases": [phase.as_dict() for phase in training.phases]}


def with_schedule(training: TrainingConfig, fields: Mapping[str, Any]) -> TrainingConfig:
    """Settings with the schedule of other ones; a stop after a phase that those do not have is dropped."""
    names = [phase["name"] for phase in fields["phases"]]
    stop = training.stop_after_phase if training.stop_after_phase in names else None
    return replace(training, stop_after_phase=stop, **{name: fields[name] for name in SCHEDULE_FIELDS})


def with_learning_rates(training: TrainingConfig, fields: Mapping[str, Any]) -> TrainingConfig:
    """Settings with the learning rates of other ones, step by step; neither has phases.

    The length of the run stays: after the other's end the learning rate is what it was there.
    """
    decay = fields["lr_decay_iters"]
    if decay is None and fields["lr_decay_style"] != "constant":
        decay = fields["train_iters"]
    return replace(training, lr_decay_iters=decay, **{name: fields[name] for name in _RATE_FIELDS})


def planned_steps(run: RunConfig, stretch: Stretch) -> Recipe:
    """The recipe that planned a stretch of another run, without what its phases did to model and data."""
    unknown: dict[str, Any] = dict.fromkeys((*MODEL_FIELDS, *DATA_FIELDS))
    training = with_schedule(run.training, stretch.fields)
    phases = tuple(replace(phase, **unknown) for phase in training.phases)
    recipe = plan_recipe(run.model, replace(training, phases=phases, stop_after_phase=None), run.data, run.parallel)
    return replace(recipe, shift=stretch.shift)


def differences(own: Recipe, past: Recipe, start: TrainedAmount, now: TrainedAmount) -> list[str]:
    """What a recipe would have done otherwise in a stretch; for each quantity the last step in which it differs.

    Args:
        own: The recipe that is asked, placed at the start of the stretch.
        past: The recipe that planned the stretch.
        start: Place of the run at which the stretch begins.
        now: Place of the run at which the stretch ends.
    """
    found: dict[str, str] = {}
    for iteration in _compared(start.iteration, now.iteration, (own, past)):
        theirs, mine = _plan_at(past, iteration), _plan_at(own, iteration)
        if theirs is None:
            continue  # beyond what the record explains: the totals below say so
        if mine is None:
            found["end"] = f"the run would have ended after {iteration} steps"
            break
        for (name, before), (_, value) in zip(_quantities(theirs), _quantities(mine), strict=True):
            if not math.isclose(before, value, rel_tol=1e-9):
                found[name] = f"{name} of step {iteration + 1} was {before:.6g}, here {value:.6g}"
    here = own.place_at(now.iteration)
    if here is not None:
        for name, before, value in (("tokens", now.tokens, here.tokens), ("samples", now.samples, here.samples)):
            if before != value:
                found[name] = f"{before} {name} were consumed in {now.iteration} steps, here {value}"
    elif now.iteration > start.iteration:
        found["end"] = f"the run would have ended after {own.num_steps} steps"
    return list(found.values())


def _plan_at(recipe: Recipe, iteration: int) -> StepPlan | None:
    place = recipe.place_at(iteration)
    whole = replace(recipe, num_phases=len(recipe.phases))  # where a launch stops says nothing about its steps
    return None if place is None else whole.step(iteration, place.tokens)


def _quantities(plan: StepPlan) -> list[tuple[str, float]]:
    return [("learning rate", plan.learning_rate), ("global batch size", plan.global_batch_size),
            ("seq_length", plan.phase.training.seq_length), ("lambda (mtp_loss_scaling_factor)", plan.mtp_weight),
            ("gamma (moe_router_bias_update_rate)", plan.bias_update_rate)]


def _compared(first: int, stop: int, recipes: Sequence[Recipe]) -> Iterable[int]:
    if stop - first <= _MAX_COMPARED:
        return range(first, stop)
    chosen = {first + number * (stop - first) // _MAX_COMPARED for number in range(_MAX_COMPARED)} | {stop - 1}
    for recipe in recipes:
        for phase in recipe.phases:
            starts = [plateau.iteration for plateau in phase.plateaus]
            starts.append(phase.learning_rate.first_iteration + phase.learning_rate.warmup_iters)
            chosen |= {start + recipe.shift.iteration + offset for start in starts for offset in (-1, 0, 1)}
    return sorted(iteration for iteration in chosen if first <= iteration < stop)


def other_settings(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Schedule settings that differ, with both values; "" if none does."""
    found = [f"{name}={mine[name]} (checkpoint: {theirs[name]})" for name in SCHEDULE_FIELDS
             if name != "phases" and mine[name] != theirs[name]]
    here, there = ({phase["name"]: phase for phase in fields["phases"]} for fields in (mine, theirs))
    if list(here) != list(there):
        found.append(f"phases {', '.join(here) or 'none'} (checkpoint: {', '.join(there) or 'none'})")
    for name in (name for name in here if name in there):
        found += [f"phase {name!r}: {key}={here[name].get(key)} (checkpoint: {there[name].get(key)})"
                  for key in {**there[name], **here[name]} if here[name].get(key) != there[name].get(key)]
    return ", ".join(found)
