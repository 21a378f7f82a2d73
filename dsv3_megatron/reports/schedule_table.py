"""Lists a run's recipe as a table: where steps, tokens, learning rate, batch, loss weights and context change. No
torch.

What `python -m dsv3_megatron train --preset NAME --print-schedule [--json]` prints. Nothing is trained or stepped
through: the boundaries are laid out in closed form (config/recipe.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.output import json_text
from dsv3_megatron.config.recipe import PlannedPhase, Recipe
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.reports.model_table import aligned

# A ramp of more batch sizes is shown by as many of them, evenly spread.
_MAX_BATCHES_SHOWN = 16


@dataclass(frozen=True)
class Boundary:
    """A place of a run at which something changes; the values are those of the step that begins there.

    Attributes:
        phase: Name of the phase.
        event: What changes there, in words.
        iteration: Steps before it.
        tokens: Tokens before it.
        learning_rate: Learning rate that the optimizer takes.
        global_batch_size: Sequences in the step.
        mtp_weight: Weight of the MTP losses, lambda.
        bias_update_rate: Step of the routers' biases, gamma.
        seq_length: Tokens in a sequence.
        rope_type: "rope" or "yarn".
        rotary_scaling_factor: YaRN's s; 1 under plain rotary embedding.
    """

    phase: str
    event: str
    iteration: int
    tokens: int
    learning_rate: float
    global_batch_size: int
    mtp_weight: float
    bias_update_rate: float
    seq_length: int
    rope_type: str
    rotary_scaling_factor: float


def boundaries(recipe: Recipe) -> list[Boundary]:
    """Every boundary of all phases, in order; the last is the end."""
    rows = [row for phase in recipe.phases for row in _phase_boundaries(phase)]
    last = recipe.phases[-1]
    return [*rows, _boundary(last, "end", last.end.iteration, last.end.tokens)]


def schedule_table(run: RunConfig, as_json: bool = False) -> str:
    """Describe how a run goes.

    Args:
        run: A validated run.
        as_json: One JSON object instead of text.

    Returns:
        Text without a newline at its end.
    """
    recipe = run.recipe()
    if as_json:
        return json_text(schedule_summary(run), indent=2)
    end, is_whole = recipe.phases[-1].end, recipe.num_phases == len(recipe.phases)
    title = f"{run.name}: {end.iteration:,} steps, {end.tokens:,} tokens, {end.samples:,} sequences"
    lines = [title, *aligned([_HEADINGS, *map(_cells, boundaries(recipe))], left=2)]
    if not is_whole:
        stop = recipe.phases_to_run[-1]
        lines.append(f"this run stops after phase {stop.name}, at step {stop.end.iteration:,}: what follows may need "
                     "another layout (--stop-after-phase none)")
    return "\n".join(lines)


def schedule_summary(run: RunConfig) -> dict[str, Any]:
    """The table's numbers as plain values; keys are stable, counts are exact integers."""
    recipe = run.recipe()
    end = recipe.phases[-1].end
    return {
        "preset": run.name, "num_steps": end.iteration, "num_tokens": end.tokens, "num_sequences": end.samples,
        "num_steps_before_stop": recipe.num_steps,
        "phases": [{"name": phase.name, "first_step": phase.start.iteration, "num_steps": phase.num_steps,
                    "first_token": phase.start.tokens, "num_tokens": phase.end.tokens - phase.start.tokens,
                    "batch_sizes": sorted({plateau.global_batch_size for plateau in phase.plateaus})}
                   for phase in recipe.phases],
        "boundaries": [dataclasses.asdict(row) for row in boundaries(recipe)],
    }


def _phase_boundaries(phase: PlannedPhase) -> list[Boundary]:
    places = {(phase.start.iteration, phase.start.tokens): "start"}
    for place, event in sorted(_events_within(phase)):
        if place < (phase.end.iteration, phase.end.tokens):
            places[place] = f"{places[place]}, {event}" if place in places else event
    return [_boundary(phase, event, *place) for place, event in places.items()]


def _events_within(phase: PlannedPhase) -> Iterator[tuple[tuple[int, int], str]]:
    """Places and what happens there, in any order."""
    rate = phase.learning_rate
    if rate.warmup_iters:
        yield phase.place_of(rate.first_token), "warm-up ends"
    if rate.style != "constant":
        yield phase.place_of(rate.last_token), f"{rate.style} decay ends"
    changes = phase.plateaus[1:]
    shown = max(1, -(-len(changes) // _MAX_BATCHES_SHOWN))
    for plateau in changes[shown - 1:: shown]:
        yield (plateau.iteration, plateau.tokens), "batch"


def _boundary(phase: PlannedPhase, event: str, iteration: int, tokens: int) -> Boundary:
    plan, model = phase.step(iteration, tokens), phase.model
    factor = model.rotary_scaling_factor if model.rope_type == "yarn" else 1.0
    return Boundary(phase.name, event, iteration, tokens, plan.learning_rate, plan.global_batch_size, plan.mtp_weight,
                    plan.bias_update_rate, phase.training.seq_length, model.rope_type, factor)


_HEADINGS = ["phase", "", "step", "tokens", "learning rate", "batch", "lambda", "gamma", "sequence", "context"]


def _cells(row: Boundary) -> list[str]:
    context = f"YaRN x {row.rotary_scaling_factor:g}" if row.rope_type == "yarn" else "RoPE"
    return [row.phase if row.event.startswith("start") else "", row.event, f"{row.iteration:,}", f"{row.tokens:,}",
            f"{row.learning_rate:.4g}", f"{row.global_batch_size:,}", f"{row.mtp_weight:g}",
            f"{row.bias_update_rate:g}", f"{row.seq_length:,}", context]
