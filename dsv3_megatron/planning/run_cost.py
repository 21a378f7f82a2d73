"""What a whole run costs: its recipe's phases in steps, days, device-hours and money.

A batch that grows is costed at each of its sizes. Where the run's layout cannot do a phase (after `stop_after_phase` it
need not: the run goes on under another), the fastest layout that can is searched for and named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.pipeline import microbatches_problem
from dsv3_megatron.config.recipe import PlannedPhase
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.time.step_time import StepTime, step_seconds, step_time
from dsv3_megatron.planning.time.work import Setting

_HOURS = 3600.0
# Schedules that can do any number of micro-batches, the better first, for batches that the run's own cannot do.
_ANY_NUMBER = ("zb1p", "1f1b")

# Finds a layout for a run of one phase; gives it and says why, or what keeps all from being valid.
LayoutFinder = Callable[[RunConfig, Setting], tuple[RunConfig | None, str]]


@dataclass(frozen=True)
class PhaseCost:
    """A phase on a machine.

    Attributes:
        name: Name as the phase was written.
        num_steps: Optimizer steps; cut where `--tokens` ends the run.
        num_tokens: Tokens of those steps.
        seconds: Seconds of all those steps; None where no layout can do the phase.
        num_devices: Devices that the phase keeps.
        last_step: Predicted step of the phase's last batch size; None where no layout can do the phase.
        note: What is not as the run has it; empty if all is.
    """

    name: str
    num_steps: float
    num_tokens: float
    seconds: float | None
    num_devices: int
    last_step: StepTime | None
    note: str = ""

    @property
    def gpu_hours(self) -> float | None:
        """Hours of the phase times its devices; None where no layout can do it."""
        return None if self.seconds is None else self.seconds / _HOURS * self.num_devices

    @property
    def days(self) -> float | None:
        """Days that the phase takes; None where no layout can do it."""
        return None if self.seconds is None else self.seconds / _HOURS / 24


@dataclass(frozen=True)
class RunCost:
    """A run on a machine; sums leave out phases that no layout can do."""

    phases: tuple[PhaseCost, ...]
    price_per_gpu_hour: float | None

    @property
    def gpu_hours(self) -> float:
        """Hours times devices, summed over the phases."""
        return sum(phase.gpu_hours or 0.0 for phase in self.phases)

    @property
    def days(self) -> float:
        """Days that all phases take together."""
        return sum(phase.days or 0.0 for phase in self.phases)

    @property
    def num_tokens(self) -> float:
        """Tokens of the phases that can be done."""
        return sum(phase.num_tokens for phase in self.phases if phase.seconds is not None)

    def price(self, gpu_hours: float | None) -> float | None:
        """Money for device-hours; None without a price."""
        if self.price_per_gpu_hour is None or gpu_hours is None:
            return None
        return gpu_hours * self.price_per_gpu_hour


def main_phase(run: RunConfig) -> PlannedPhase:
    """The phase with most tokens of those that the run does: what its step is judged by."""
    return max(run.recipe().phases_to_run, key=lambda phase: phase.end.tokens - phase.start.tokens)


def only_phase(run: RunConfig, phase: PlannedPhase, *, global_batch_size: int | None = None) -> RunConfig:
    """The run as if that phase, at its last batch size or a given one, were all of it."""
    # The learning rate takes no time; what a phase leaves of its fields need not make a run without phases.
    training = dataclasses.replace(phase.training, phases=(), stop_after_phase=None, min_lr=0.0, lr_warmup_iters=0,
                                   lr_decay_style="constant")
    if global_batch_size is not None:
        training = dataclasses.replace(training, global_batch_size=global_batch_size)
    return dataclasses.replace(run, model=phase.model, training=training, data=phase.data, parallel=phase.parallel)


def require_possible(run: RunConfig, num_devices: int) -> None:
    """Check a run of one phase on so many devices: model, layout, batch, FP8.

    Raises:
        ConfigError: the first rule that is broken.
    """
    run.model.validate()
    run.parallel.validate(run.model, run.training.seq_length)
    run.parallel.validate_world_size(num_devices)
    run.training.validate(run.parallel, num_devices)
    run.fp8.validate(run.model, run.parallel, run.training.transformer_impl)
    if run.training.seq_length > run.model.max_position_embeddings and not run.policy.is_on:
        raise ConfigError(f"seq_length={run.training.seq_length} must not exceed max_position_embeddings="
                          f"{run.model.max_position_embeddings}")


def run_cost(run: RunConfig, setting: Setting, *, tokens: float | None = None, price_per_gpu_hour: float | None = None,
             find_layout: LayoutFinder | None = None) -> RunCost:
    """Cost of all phases of a run, those after a stop too.

    Args:
        run: Valid but for the number of devices.
        setting: The machine.
        tokens: Tokens at which the run ends: the recipe is cut there, or its last phase goes on; None: all of the
            recipe.
        price_per_gpu_hour: Price of a device for an hour, in any currency.
        find_layout: Finds a layout for phases that the run's own cannot do; None: they are left without a cost.

    Raises:
        ConfigError: tokens or price are not positive.
    """
    for name, value in (("tokens", tokens), ("price-per-gpu-hour", price_per_gpu_hour)):
        if value is not None and not value > 0:
            raise ConfigError(f"--{name}={value:g} must be greater than 0; leave it out")
    recipe = run.recipe()
    costs = []
    for phase in recipe.phases:
        is_last = phase is recipe.phases[-1]
        stop = tokens if tokens is not None else float("inf")
        if phase.start.tokens >= stop:
            break
        parts = list(_parts(phase, stop, goes_on=is_last and tokens is not None))
        costs.append(_phase_cost(run, phase, parts, setting, find_layout))
    return RunCost(tuple(costs), price_per_gpu_hour)


def _parts(phase: PlannedPhase, stop: float, *, goes_on: bool) -> Iterator[tuple[int, float]]:
    """(batch size, steps) of a phase up to a token; beyond its end if it goes on."""
    seq_length, plateaus = phase.training.seq_length, phase.plateaus
    for index, plateau in enumerate(plateaus):
        size = plateau.global_batch_size
        left = (stop - plateau.tokens) / (size * seq_length)
        steps = float(plateau.num_steps)
        if goes_on and index == len(plateaus) - 1:
            steps = left
        if steps > 0 and left > 0:
            yield size, min(steps, left)


def _phase_cost(run: RunConfig, phase: PlannedPhase, parts: list[tuple[int, float]], setting: Setting,
                find_layout: LayoutFinder | None) -> PhaseCost:
    seconds, num_steps, num_tokens, notes = 0.0, 0.0, 0.0, []
    last = None
    base = run
    for size, steps in parts:
        part = only_phase(base, phase, global_batch_size=size)
        num_steps, num_tokens = num_steps + steps, num_tokens + steps * part.training.tokens_per_step
        try:
            require_possible(part, setting.num_devices)
        except ConfigError as error:
            other, note = _another(part, setting, error, find_layout, is_ramp=size != parts[-1][0])
            if note not in notes:
                notes.append(note)
            if other is None:
                seconds, last = float("nan"), None
                continue
            part = other
        last = step_time(part, setting, with_transfers=False)
        seconds += steps * last.seconds
    is_known = seconds == seconds
    return PhaseCost(phase.name, num_steps, num_tokens, seconds if is_known else None, setting.num_devices,
                     last if is_known else None, "; ".join(notes))


def _another(part: RunConfig, setting: Setting, error: ConfigError, find_layout: LayoutFinder | None, *, is_ramp: bool
             ) -> tuple[RunConfig | None, str]:
    """A run of the phase that can be, and what is other about it; or none, and why.

    On the way of a growing batch the layout stays, and another schedule takes the steps that the run's cannot take.
    """
    replicas = part.parallel.data_parallel_size(setting.num_devices)
    unit = part.training.micro_batch_size * replicas
    if is_ramp and part.training.global_batch_size % unit == 0 and microbatches_problem(
            part.parallel.schedule, part.parallel.pipeline_model_parallel_size,
            part.training.num_microbatches(replicas), "pipeline_schedule"):
        for schedule in _ANY_NUMBER:
            other = dataclasses.replace(part, parallel=dataclasses.replace(
                part.parallel, pipeline_schedule=schedule, num_virtual_stages_per_pipeline_rank=1))
            try:
                require_possible(other, setting.num_devices)
            except ConfigError:
                continue
            return other, (f"a growing batch whose micro-batches {part.parallel.schedule} cannot do, costed under "
                           f"{schedule}")
    if find_layout is None:
        return None, f"the layout cannot do it: {error}"
    found, why = find_layout(part, setting)
    return found, f"under another layout: {why}" if found is not None else f"no layout can do it: {why}"


def sensitivities(run: RunConfig, setting: Setting, *, factor: float = 1.1) -> dict[str, float]:
    """What more of each resource of the machine buys: the change of the step time as a part of it, below 0 if shorter.

    Resources without effect on this run are left out. A share cannot be more than 1. More of a latency, of an overhead
    or of the deviation of routed rows is no gain.
    """
    base = step_seconds(run, setting)
    changes = {}
    for name in setting.hardware.resources():
        other = dataclasses.replace(setting, hardware=setting.hardware.scaled(name, factor))
        change = step_seconds(run, other) / base - 1
        if abs(change) > 5e-6:
            changes[name] = change
    return dict(sorted(changes.items(), key=lambda item: -abs(item[1])))
