"""How a run goes on from a checkpoint that was made by other settings, or does not. No torch.

The schedule of the run is asked what it would have done up to the checkpoint (config/past.py). Where that is what was
done, the run goes on. Where it is not, it is refused, unless the command line says which of the two schedules holds
from here on. The two flags are Megatron-LM's, which compares the settings of its scheduler instead of the steps.

    --override-opt-param-scheduler        this command line's, at the same step of it (of phases in tokens: same token)
    --use-checkpoint-opt-param-scheduler  the checkpoint's learning rates, or all of its phases

Either way the run ends where this command line's --train-iters says, if it has no phases.

The data must be those of the checkpoint too, in the same order (data/identity.py), or --allow-data-change say that they
need not: then other data are read from their first sample, and the run's samples are counted on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsv3_megatron.checkpoint.folder import TRAINING, CheckpointError, Manifest, RunProgress, check_architecture
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.launches import LaunchPart
from dsv3_megatron.config.past import (
    Stretch,
    differences,
    other_settings,
    planned_steps,
    schedule_fields,
    with_learning_rates,
    with_schedule,
)
from dsv3_megatron.config.recipe import DataSpan, Recipe, TrainedAmount
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.data.identity import other_data, run_identity


@dataclass(frozen=True)
class Resumption:
    """What a run does from its first step in this launch on.

    Attributes:
        run: The run, with the schedule that holds; its flags about other schedules are used up.
        recipe: The run's recipe, placed where the run is.
        stretches: Schedules by which the steps so far, and from here on, were planned.
        span: Index of the dataset that its last step read.
        first_sample: Samples that the run had taken, or jumped over, when it began that dataset.
        position: The batch iterator's position in that dataset, for its check; None where there is nothing to compare.
        notes: What there is to say about it.
        place: Steps, tokens and samples before that step.
    """

    run: RunConfig
    recipe: Recipe
    stretches: tuple[Stretch, ...]
    span: int = 0
    first_sample: int = 0
    position: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    place: TrainedAmount = TrainedAmount()

    @property
    def part(self) -> LaunchPart:
        """What the start that goes on there takes of the run."""
        return LaunchPart.at(self.run, self.recipe, self.place)

    def start_of(self, span: DataSpan) -> int:
        """Samples that the run has taken, or jumped over, when it begins a dataset."""
        return self.first_sample if span.index == self.span else span.first_sample + self.recipe.shift.samples

    def schedules_at(self, iteration: int) -> list[dict[str, Any]]:
        """The schedules for a checkpoint after so many steps: one that no step was taken by is not part of it."""
        known = [stretch for stretch in self.stretches if stretch.start.iteration < iteration]
        return [stretch.as_dict() for stretch in known or self.stretches[:1]]


def plan_resumption(run: RunConfig, load: str | None, iteration: int | None = None) -> Resumption:
    """Place a run where its newest checkpoint is, in its recipe and in its data; no tensor is read.

    Args:
        run: A valid run, whose data are there.
        load: Folder of checkpoints; None: the run begins.
        iteration: Step of the checkpoint; None: the newest.

    Raises:
        ConfigError: the steps up to the checkpoint would have been others, or none is left.
        CheckpointError: there is no usable checkpoint, or it is of another architecture or of other data.
    """
    planned, manifest = plan_schedule(run, load, iteration)
    is_allowed = run.checkpoint.allow_data_change
    planned = replace(planned, run=planned.run.override(allow_data_change=False))
    if manifest is None:
        return planned
    return _place_in_data(planned, manifest, is_allowed)


def plan_schedule(run: RunConfig, load: str | None, iteration: int | None = None
                  ) -> tuple[Resumption, Manifest | None]:
    """The part of `plan_resumption` that looks at no data, and the checkpoint of a run that goes on."""
    overrides, keeps = run.checkpoint.override_opt_param_scheduler, run.checkpoint.use_checkpoint_opt_param_scheduler
    if overrides and keeps:
        raise ConfigError("--override-opt-param-scheduler takes this command line's schedule and "
                          "--use-checkpoint-opt-param-scheduler the checkpoint's; give one of them")
    manifest = check_architecture(load, run, iteration) if load is not None else None
    run = run.override(override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False)
    own = Stretch(schedule_fields(run.training))
    if manifest is None or manifest.contents != TRAINING or not manifest.progress.iteration:
        return Resumption(run, run.recipe(), (own,)), None
    past, notes = _recorded(manifest, run)
    now = _place_of(manifest.progress)
    *earlier, last = past
    if keeps:
        run = replace(run, training=_kept(run, last))
        run.validate()
        own = Stretch(schedule_fields(run.training))
        notes.append("the learning rates are the checkpoint's (use_checkpoint_opt_param_scheduler)")
    if own.fields == last.fields:
        recipe = replace(run.recipe(), shift=last.shift)
        _require_steps(recipe, now, manifest)
        return Resumption(run, recipe, past, notes=tuple(notes), place=now), manifest
    try:
        placed = run.recipe() if last.start == TrainedAmount() else run.recipe().placed_at(last.start)
        wrong = differences(placed, planned_steps(run, last), last.start, now)
    except ConfigError as error:  # the recipe was not so long when the stretch began
        placed, wrong = run.recipe(), [str(error)]
    settings = other_settings(own.fields, last.fields)
    if not wrong:
        _require_steps(placed, now, manifest)
        notes.append(f"{settings}: the {now.iteration} steps up to the checkpoint would have been the same")
        stretches = (*earlier, replace(own, start=last.start, shift=placed.shift))
        return Resumption(run, placed, stretches, notes=tuple(notes), place=now), manifest
    if not (overrides or keeps):
        raise CheckpointError(_refusal(manifest, wrong, settings, own, last))
    try:
        recipe = run.recipe().placed_at(now)
    except ConfigError as error:
        raise CheckpointError(f"load={load}: {error}") from error
    notes.append(f"another schedule from step {now.iteration + 1} on ({settings}): {'; '.join(wrong)}")
    stretches = (*past, replace(own, start=now, shift=recipe.shift))
    return Resumption(run, recipe, stretches, notes=tuple(notes), place=now), manifest


def _place_in_data(planned: Resumption, manifest: Manifest, is_change_allowed: bool) -> Resumption:
    """Compare the data of the run's last step with those of the checkpoint, and find the run's place in them.

    Raises:
        CheckpointError: the data differ, and may not.
    """
    run, recipe, progress = planned.run, planned.recipe, manifest.progress
    phase = recipe.phase_before(progress.consumed_tokens)
    span = recipe.span_of(phase)
    planned = replace(planned, span=span.index)
    if not progress.data:
        note = ("the checkpoint is of a release that did not record its data: they are taken to be these, and the run "
                "goes on after as many samples as it has taken")
        return replace(planned, first_sample=span.first_sample + recipe.shift.samples, notes=(*planned.notes, note))
    wrong = other_data(run_identity(run, phase), progress.data["identity"])
    if not wrong:
        return replace(planned, first_sample=progress.data["first_sample"], position=progress.data["position"])
    if not is_change_allowed:
        raise CheckpointError(
            f"checkpoint {manifest.path} was trained on other data, or in another order: {'; '.join(wrong)}. Give the "
            "checkpoint's, or --allow-data-change to go on with these: they are read from their first sample, so that "
            "what was seen of them may be seen again")
    note = f"other data, read from their first sample ({'; '.join(wrong)})"
    return replace(planned, first_sample=progress.consumed_samples + jumped_samples(progress.guards),
                   notes=(*planned.notes, note))


def jumped_samples(guards: Mapping[str, Any]) -> int:
    """Samples that rollbacks jumped over, by the state of the guards in a checkpoint."""
    return sum(stop - first for first, stop in guards["counters"]["jumps"]) if guards else 0


def _place_of(progress: RunProgress) -> TrainedAmount:
    return TrainedAmount(progress.iteration, progress.consumed_tokens, progress.consumed_samples)


def _recorded(manifest: Manifest, run: RunConfig) -> tuple[tuple[Stretch, ...], list[str]]:
    """What the checkpoint's steps were planned by, and what it does not say.

    Checkpoints of earlier releases have the settings of the phase they were made in only: what comes before a run's
    first phase, or its decay, is taken to be this run's.
    """
    if manifest.progress.schedules:
        return tuple(map(Stretch.from_dict, manifest.progress.schedules)), []
    mine, stored = schedule_fields(run.training), manifest.run.get("training", {})
    fields = {**mine, **{name: stored[name] for name in mine if name in stored}}
    unknown = []
    if fields["phases"]:
        unknown = ["lr", "global_batch_size", "seq_length", "mtp_loss_scaling_factor", "moe_router_bias_update_rate"]
        defaults = schedule_fields(type(run.training)(phases=fields["phases"]))
        fields |= {name: defaults[name] for name in mine if name not in stored}
    elif fields["lr_decay_style"] != "constant":
        unknown = ["lr"]
    fields |= {name: mine[name] for name in unknown}
    note = f"the checkpoint is of a release that did not record the schedule: {', '.join(unknown)} not compared"
    return (Stretch(fields),), [note] if unknown else []


def _kept(run: RunConfig, last: Stretch) -> TrainingConfig:
    """The run's training settings with the schedule of the checkpoint, as far as `keeps` asks for it."""
    if run.training.phases or last.fields["phases"]:
        return with_schedule(run.training, last.fields)
    return with_learning_rates(run.training, last.fields)


def _require_steps(recipe: Recipe, now: TrainedAmount, manifest: Manifest) -> None:
    """Refuse a run that ended before its checkpoint; one that ended there has nothing left to do, and is complete."""
    if now.iteration > recipe.num_steps:
        last = recipe.phases_to_run[-1]
        end = f"stop_after_phase={last.name}" if len(recipe.phases) > 1 else f"train_iters={recipe.num_steps}"
        raise CheckpointError(
            f"{end} ends the run after {recipe.num_steps} steps, and checkpoint {manifest.path} has {now.iteration} "
            "already: nothing is left to do; set it higher, or load an earlier checkpoint")


def _refusal(manifest: Manifest, wrong: Sequence[str], settings: str, own: Stretch, last: Stretch) -> str:
    fields = last.fields
    extends = (own.fields["train_iters"] != fields["train_iters"] and not fields["phases"] and not own.fields["phases"]
               and dataclasses.replace(own, fields={**own.fields, "train_iters": fields["train_iters"]}) == replace(
                   own, fields=dict(fields)))
    keep = ""
    if extends and fields["lr_decay_iters"] is None:
        keep = (f" --lr-decay-iters {fields['train_iters']} with this --train-iters keeps the checkpoint's decay, and "
                "its last learning rate from there on;")
    return (f"checkpoint {manifest.path} was not reached by this schedule: {'; '.join(wrong)}. What differs: "
            f"{settings or 'nothing that the checkpoint records'}.{keep} give the checkpoint's values,"
            " --use-checkpoint-opt-param-scheduler to go on with its learning rates, or "
            "--override-opt-param-scheduler to go on by this command line's schedule from the next step on")
