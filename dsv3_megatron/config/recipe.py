"""What each step of a run is taken with: its phases laid out from the first token to the last. No torch.

Everything follows from the position, the optimizer steps and the tokens before a step, which a checkpoint holds. A run
without phases is one phase, made of `lr`, `min_lr`, `train_iters` and the like.

    recipe = run.recipe()
    step = recipe.step(iteration, consumed_tokens)      # step.learning_rate, step.global_batch_size, ...
    recipe.num_steps                                    # before the run stops

The boundaries are laid out once, in closed form: a phase is a few stretches of equal batch, whatever its length.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from dsv3_megatron.config.data import DataConfig
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.phases import (
    DATA_FIELDS,
    LAYOUT_FIELDS,
    MODEL_FIELDS,
    TRAINING_FIELDS,
    Phase,
    errors_of_phase,
)
from dsv3_megatron.config.ramps import BatchSize, LearningRate, Plateau
from dsv3_megatron.config.training import TrainingConfig

_MAX_INCREMENTS = 100_000


@dataclass(frozen=True)
class PlannedPhase:
    """A phase in its run.

    Attributes:
        index: Position among the run's phases, from 0.
        name: Name as the phase was written.
        model: The architecture in it.
        training: Training configuration of a run that is this phase alone: batch size and learning rate are those at
            its end.
        data: Data configuration of a run that is this phase alone.
        parallel: Layout of the phase.
        plateaus: The phase's steps by batch size; at least one stretch.
        learning_rate: Learning rate at each step of the phase.
        batch_size: Batch size at each step of the phase.
        planned_end_token: Token at which the phase would end if a step could be cut; in a phase given in steps, where
            it ends.
        is_in_steps: Whether the phase's length was given in steps, not in tokens.
    """

    index: int
    name: str
    model: ModelConfig
    training: TrainingConfig
    data: DataConfig
    parallel: ParallelConfig
    plateaus: tuple[Plateau, ...]
    learning_rate: LearningRate
    batch_size: BatchSize
    planned_end_token: int
    is_in_steps: bool

    @property
    def start(self) -> Plateau:
        """The plateau with which the phase begins."""
        return self.plateaus[0]

    @property
    def end(self) -> Plateau:
        """The place where the phase ends: a plateau of no steps."""
        return _end_of(self.plateaus[-1], self.training.seq_length)

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the phase."""
        return self.end.iteration - self.start.iteration

    def step(self, iteration: int, tokens: int) -> StepPlan:
        """The plan of the step at a position in the phase."""
        return StepPlan(self, self.learning_rate.at(iteration, tokens), self.batch_size.at(tokens),
                        self.training.mtp_loss_scaling_factor, self.training.moe_router_bias_update_rate)

    def place_of(self, tokens: int) -> tuple[int, int]:
        """Steps and tokens before the phase's first step that begins at or beyond a token."""
        plateau = max((plateau for plateau in self.plateaus if plateau.tokens <= tokens), default=self.start,
                      key=lambda plateau: plateau.tokens)
        size = plateau.global_batch_size * self.training.seq_length
        steps = min(plateau.num_steps, max(0, -((plateau.tokens - tokens) // size)))
        return plateau.iteration + steps, plateau.tokens + steps * size

    @property
    def summary(self) -> str:
        """Steps, batch and context of the phase in a few words."""
        sizes = self.batch_size.sizes()
        batch = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        model = self.model
        rope = f"YaRN x {model.rotary_scaling_factor:g}" if model.rope_type == "yarn" else "plain rotary embedding"
        return f"{self.num_steps} steps of {batch} sequences of {self.training.seq_length} tokens, {rope}"


@dataclass(frozen=True)
class TrainedAmount:
    """How far a run is, or has come since another place.

    Attributes:
        iteration: Optimizer steps.
        tokens: Tokens trained on.
        samples: Sequences trained on.
    """

    iteration: int = 0
    tokens: int = 0
    samples: int = 0

    def __add__(self, other: TrainedAmount) -> TrainedAmount:
        return TrainedAmount(self.iteration + other.iteration, self.tokens + other.tokens, self.samples + other.samples)

    def __sub__(self, other: TrainedAmount) -> TrainedAmount:
        return TrainedAmount(self.iteration - other.iteration, self.tokens - other.tokens, self.samples - other.samples)


@dataclass(frozen=True)
class DataSpan:
    """Phases in a row that read one dataset: the same files, cut into sequences of the same length.

    Each span's dataset is read from its beginning and shuffled anew: by the run's seed plus the span's number.

    Attributes:
        index: Position among the run's spans, from 0.
        first_phase: Index of the first of them.
        last_phase: Index of the last of them.
        first_sample: Sequences that the run has taken before it.
        num_samples: Sequences that it takes.
    """

    index: int
    first_phase: int
    last_phase: int
    first_sample: int
    num_samples: int


@dataclass(frozen=True)
class StepPlan:
    """The settings that one optimizer step is taken with.

    Attributes:
        phase: The phase it belongs to.
        learning_rate: Learning rate that the optimizer takes.
        global_batch_size: Sequences in the step, over all ranks.
        mtp_weight: Weight of the MTP losses, lambda.
        bias_update_rate: Step of the routers' biases, gamma.
    """

    phase: PlannedPhase
    learning_rate: float
    global_batch_size: int
    mtp_weight: float
    bias_update_rate: float

    @property
    def num_tokens(self) -> int:
        """Tokens of the step."""
        return self.global_batch_size * self.phase.training.seq_length


@dataclass(frozen=True)
class Recipe:
    """The phases of a run in order, and the datasets they read.

    Attributes:
        phases: Phases of the run, in order.
        spans: Spans of data that the phases read, in order.
        num_phases: Phases that are run before the run stops, for good or to go on under another layout.
        shift: What a run has done more, or less, than the recipe lays out up to the same step of it: not nothing where
            a run went over to another recipe under way (`placed_at`). The places of phases are without it.
    """

    phases: tuple[PlannedPhase, ...]
    spans: tuple[DataSpan, ...]
    num_phases: int
    shift: TrainedAmount = TrainedAmount()

    @property
    def phases_to_run(self) -> tuple[PlannedPhase, ...]:
        """Phases before the run stops."""
        return self.phases[: self.num_phases]

    @cached_property
    def _last_tokens(self) -> list[int]:
        return [phase.end.tokens for phase in self.phases]

    @property
    def num_steps(self) -> int:
        """Optimizer steps before the run stops."""
        return self.phases_to_run[-1].end.iteration + self.shift.iteration

    def place_at(self, iteration: int) -> TrainedAmount | None:
        """The place of the run after so many steps; None where its phases end before."""
        wanted = iteration - self.shift.iteration
        for phase in self.phases:
            for plateau in phase.plateaus:
                steps = wanted - plateau.iteration
                if 0 <= steps <= plateau.num_steps:
                    samples = steps * plateau.global_batch_size
                    return self.shift + TrainedAmount(wanted, plateau.tokens + samples * phase.training.seq_length,
                                                      plateau.samples + samples)
        return None

    def placed_at(self, place: TrainedAmount) -> Recipe:
        """The recipe for a run that comes to it from another one.

        Its place in the recipe is that after as many steps; where a phase is given in tokens, that after as many
        tokens, or the first step beyond them.

        Raises:
            ConfigError: the recipe has no step left there.
        """
        plain = dataclasses.replace(self, shift=TrainedAmount())
        end = plain.phases_to_run[-1].end
        if all(phase.is_in_steps for phase in self.phases):
            found = plain.place_at(place.iteration) if place.iteration < end.iteration else None
        else:
            phase = next((phase for phase in self.phases_to_run if place.tokens < phase.end.tokens), None)
            found = plain.place_at(phase.place_of(place.tokens)[0]) if phase is not None else None
        if found is None or found.iteration >= end.iteration:
            raise ConfigError(
                f"nothing is left to do: the run ends after {end.iteration} steps and {end.tokens} tokens, the "
                f"checkpoint has {place.iteration} and {place.tokens}; make it longer "
                f"({'phases' if len(self.phases) > 1 else 'train_iters'}), or load an earlier checkpoint")
        return dataclasses.replace(self, shift=place - found)

    def step(self, iteration: int, tokens: int) -> StepPlan | None:
        """What the step at a position is taken with; None where the run stops.

        A step belongs to the first phase whose last token it does not pass. A run that follows its recipe meets the
        boundaries exactly; one that was resumed with another recipe stops short of them rather than run past.

        Args:
            iteration: Optimizer steps before it.
            tokens: Tokens before it.
        """
        iteration, tokens = iteration - self.shift.iteration, tokens - self.shift.tokens
        first = bisect.bisect_right(self._last_tokens, tokens)
        for phase, last_token in zip(self.phases[first: self.num_phases], self._last_tokens[first:], strict=False):
            plan = phase.step(iteration, tokens)
            if tokens + plan.num_tokens <= last_token:
                return plan
        return None

    def phase_before(self, tokens: int) -> PlannedPhase:
        """The phase of the last step before a place; the first phase where there was none."""
        index = bisect.bisect_left(self._last_tokens, tokens - self.shift.tokens)
        return self.phases[min(index, len(self.phases) - 1)]

    def span_of(self, phase: PlannedPhase) -> DataSpan:
        """The dataset that a phase reads."""
        return next(span for span in self.spans if span.first_phase <= phase.index <= span.last_phase)


def plan_recipe(model: ModelConfig, training: TrainingConfig, data: DataConfig, parallel: ParallelConfig) -> Recipe:
    """Lay out a run's phases.

    Args:
        model: The run's, before the first phase.
        training: The run's training configuration, with its phases. Each phase alone, or a run without any, must be
            valid.
        data: The run's data configuration, before the first phase.
        parallel: The run's layout, before the first phase.

    Raises:
        ConfigError: a phase does not fit what comes before it; names the phase.
    """
    written = training.phases or (_whole_run(training),)
    last = _last_phase(written, training.stop_after_phase if training.phases else None)
    place, planned_token = Plateau(0, 0, 0, 0, 0), 0
    phases: list[PlannedPhase] = []
    for index, phase in enumerate(written):
        with errors_of_phase(phase.name):
            planned = _plan(index, phase, (model, training, data, parallel), place, planned_token)
        phases.append(planned)
        model, training, data, parallel = planned.model, planned.training, planned.data, planned.parallel
        place, planned_token = planned.end, planned.planned_end_token
    return Recipe(tuple(phases), tuple(_spans(phases)), last + 1)


def _last_phase(phases: Sequence[Phase], name: str | None) -> int:
    names = [phase.name for phase in phases]
    if name is not None and name not in names:
        raise ConfigError(f"stop_after_phase={name!r} is no phase of the run; its phases are {', '.join(names)}")
    return names.index(name) if name is not None else len(names) - 1


def _whole_run(training: TrainingConfig) -> Phase:
    """The one phase of a run without phases."""
    is_constant = training.lr_decay_style == "constant"
    return Phase("training", train_iters=training.train_iters, lr=training.lr if is_constant else training.min_lr,
                 lr_decay_style=training.lr_decay_style, lr_warmup_iters=training.lr_warmup_iters,
                 lr_decay_iters=None if is_constant else training.lr_decay_iters)


def _plan(index: int, phase: Phase, before: tuple[ModelConfig, TrainingConfig, DataConfig, ParallelConfig],
          place: Plateau, planned_token: int) -> PlannedPhase:
    old_model, old_training, old_data, old_parallel = before
    parallel = replace(old_parallel, **phase.given(LAYOUT_FIELDS))
    training = replace(old_training, **phase.given(TRAINING_FIELDS))
    data = replace(old_data, **phase.given(DATA_FIELDS))
    end_token = None if phase.train_tokens is None else planned_token + phase.train_tokens
    batch_size = _batch_size(phase, old_training.global_batch_size, training.global_batch_size, planned_token,
                             end_token or 0)
    seq_length = training.seq_length
    plateaus = tuple(batch_size.plateaus(place, seq_length, num_steps=phase.train_iters, stop_token=end_token))
    if not plateaus:
        raise ConfigError(f"train_tokens={phase.train_tokens} are fewer than the last step of the phase before has "
                          "taken beyond its own end; leave the phase out, or make it longer")
    end = _end_of(plateaus[-1], seq_length)
    num_steps = end.iteration - place.iteration
    if phase.train_tokens is not None and phase.lr_warmup_iters > num_steps:
        raise ConfigError(f"lr_warmup_iters={phase.lr_warmup_iters} must not exceed the {num_steps} steps that "
                          f"train_tokens={phase.train_tokens} make; make the warm-up shorter or the phase longer")
    # The way of the learning rate begins after the warm-up: with the planned tokens of the phase if there is none.
    first_token = planned_token if phase.train_tokens is not None else place.tokens
    if phase.lr_warmup_iters:
        first_token = _token_after(phase.lr_warmup_iters, batch_size, place, seq_length)
    last_token = end_token or end.tokens
    if phase.lr_decay_iters is not None:
        last_token = _token_after(phase.lr_decay_iters, batch_size, place, seq_length)
    learning_rate = LearningRate(old_training.lr, training.lr, phase.lr_decay_style, phase.lr_warmup_iters,
                                 place.iteration, first_token, last_token)
    return PlannedPhase(index, phase.name, _model(phase, old_model), training, data, parallel, plateaus,
                        learning_rate, batch_size, end_token or end.tokens, phase.train_tokens is None)


def _batch_size(phase: Phase, start: int, end: int, first_token: int, last_token: int) -> BatchSize:
    increment = phase.global_batch_size_increment
    if increment and (end == start or (end - start) % increment):
        raise ConfigError(
            f"global_batch_size_increment={increment} must divide the way from the {start} sequences before the phase "
            f"to its global_batch_size={end}" + (", which is none; leave it out" if end == start else
                                                 f", {abs(end - start)}"))
    batch_size = BatchSize(start, end, increment, first_token, last_token)
    if batch_size.num_increments > _MAX_INCREMENTS:
        raise ConfigError(f"global_batch_size_increment={increment} makes {batch_size.num_increments} batch sizes "
                          f"between {start} and {end}; at most {_MAX_INCREMENTS} are laid out: give a larger increment")
    return batch_size


def _model(phase: Phase, before: ModelConfig) -> ModelConfig:
    """The architecture in a phase: weights stay, rotary embedding and context length may change."""
    given = phase.given(MODEL_FIELDS)
    model = replace(before, **given)
    if model.rope_type != "yarn" or not given:
        return model
    original, reach = model.original_max_position_embeddings, before.max_position_embeddings
    if before.rope_type != "yarn" and original > reach:
        raise ConfigError(f"original_max_position_embeddings={original} must not exceed max_position_embeddings="
                          f"{reach} of the phase before, whose context YaRN extends; give the phase "
                          f"original_max_position_embeddings={reach}")
    if phase.max_position_embeddings is None:
        model = replace(model, max_position_embeddings=int(original * model.rotary_scaling_factor))
    return model


def _token_after(num_steps: int, batch_size: BatchSize, place: Plateau, seq_length: int) -> int:
    """Tokens after so many steps from a place."""
    *_, last = batch_size.plateaus(place, seq_length, num_steps=num_steps)
    return _end_of(last, seq_length).tokens


def _end_of(plateau: Plateau, seq_length: int) -> Plateau:
    taken = plateau.num_steps * plateau.global_batch_size
    return Plateau(plateau.iteration + plateau.num_steps, plateau.tokens + taken * seq_length, plateau.samples + taken,
                   0, plateau.global_batch_size)


def _spans(phases: Sequence[PlannedPhase]) -> list[DataSpan]:
    spans: list[DataSpan] = []
    for phase in phases:
        before = phases[phase.index - 1]
        if spans and (phase.data, phase.training.seq_length) == (before.data, before.training.seq_length):
            span = spans[-1]
            spans[-1] = dataclasses.replace(span, last_phase=phase.index,
                                            num_samples=phase.end.samples - span.first_sample)
        else:
            spans.append(DataSpan(len(spans), phase.index, phase.index, phase.start.samples,
                                  phase.end.samples - phase.start.samples))
    return spans
