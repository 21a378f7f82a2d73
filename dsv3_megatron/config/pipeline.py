"""The pipeline schedules by name, and the rules of their sizes, once for runs, plans and the planner.

    schedule      stages  ranks      micro-batches of a step
    1f1b          P       any        any
    interleaved   V * P   P >= 2     a multiple of P, as Megatron-Core requires
    zb1p          P       any        any
    zbv           2P      any        any
    dualpipe      P       even       even
    dualpipev     2P      any        any

P is the number of pipeline ranks, V the chunks that each holds of an interleaved pipeline. Under dualpipe a rank holds
two stages as well, of two copies of the model. The schedules themselves are in `schedule/`.

A rule says what is wrong; who asks knows the way out. `field` is what the asker calls the schedule, such as
"pipeline_schedule".
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from dsv3_megatron.config.fields import ConfigError


@dataclass(frozen=True)
class ScheduleRules:
    """Sizes that a schedule can be had with, and what it does.

    Attributes:
        stages: Stages of one copy of the model that a rank holds; None: V, as many as are asked for, at least 2.
        copies: Copies of the model along one pipeline, which share the ranks and the micro-batches.
        fewest_ranks: Least number of pipeline ranks.
        is_in_rounds: Micro-batches come in rounds of as many as there are ranks.
        is_v_shaped: Stages go along the ranks and back, so that the last rank holds the two middle ones and rank 0 the
            first and the last.
        is_paired: A forward and a backward pass always run as a pair.
        splits_backward: Weight gradients wait for a time when their rank would stand still.
    """

    stages: int | None = 1
    copies: int = 1
    fewest_ranks: int = 1
    is_in_rounds: bool = False
    is_v_shaped: bool = False
    is_paired: bool = False
    splits_backward: bool = False


RULES: dict[str, ScheduleRules] = {
    "1f1b": ScheduleRules(),
    "interleaved": ScheduleRules(stages=None, fewest_ranks=2, is_in_rounds=True),
    "zb1p": ScheduleRules(splits_backward=True),
    "zbv": ScheduleRules(stages=2, is_v_shaped=True, splits_backward=True),
    "dualpipe": ScheduleRules(copies=2, is_paired=True, splits_backward=True),
    "dualpipev": ScheduleRules(stages=2, is_v_shaped=True, is_paired=True, splits_backward=True),
}
SCHEDULES = tuple(RULES)
V_SHAPED = tuple(name for name, rules in RULES.items() if rules.is_v_shaped)
# Schedules that have the first and the last stage on one rank.
FOLDED = tuple(name for name, rules in RULES.items() if rules.is_v_shaped or rules.copies > 1)
PAIRED = tuple(name for name, rules in RULES.items() if rules.is_paired)
SPLIT_BACKWARD = tuple(name for name, rules in RULES.items() if rules.splits_backward)
# Schedules that can run forwards and backwards as pairs, if they are asked to.
PAIRABLE = ("interleaved", *PAIRED)


def stages_per_rank(schedule: str, virtual_stages: int | None = None) -> int:
    """Stages of one copy of the model that a rank holds.

    Args:
        schedule: Name of a schedule, one of SCHEDULES.
        virtual_stages: V of the interleaved one, 2 if not given.
    """
    return RULES[schedule].stages or virtual_stages or 2


def num_model_copies(schedule: str) -> int:
    """Copies of the model along one pipeline."""
    return RULES[schedule].copies


def require_schedule(schedule: str, field: str, *others: str) -> None:
    """Check that a schedule, or one of the other words that a field takes, is known.

    Raises:
        ConfigError: the word is none of them; the nearest name is given.
    """
    if schedule not in (*others, *SCHEDULES):
        near = difflib.get_close_matches(schedule.lower(), SCHEDULES, 1)
        raise ConfigError(f"{field}={schedule!r} must be one of {', '.join((*others, *SCHEDULES))}"
                          + (f"; did you mean {near[0]}?" if near else ""))


def ranks_problem(schedule: str, num_ranks: int, field: str) -> str:
    """What keeps a schedule from so many pipeline ranks; "" if nothing does."""
    given = f"pipeline_model_parallel_size={num_ranks}"
    if num_ranks < RULES[schedule].fewest_ranks:
        return f"{given} must be at least {RULES[schedule].fewest_ranks} under {field}={schedule}"
    if num_ranks % RULES[schedule].copies:
        return (f"{given} must be even under {field}={schedule}, whose ranks hold a stage before the middle of the "
                "model and one behind it")
    return ""


def stages_problem(schedule: str, virtual_stages: int, field: str, *, name: str, unset: int) -> str:
    """What keeps a schedule from so many chunks on a rank; "" if nothing does.

    Args:
        schedule: Name of a schedule, one of SCHEDULES.
        virtual_stages: V, or `unset` if the schedule's own number is wanted.
        field: Name of the field that says the schedule.
        name: Name of the field that says V.
        unset: Value of that field that asks for nothing.
    """
    if RULES[schedule].stages is None:
        is_enough = virtual_stages >= 2
        return "" if is_enough else (f"{name}={virtual_stages} must be at least 2 under {field}={schedule}, which is "
                                     "1f1b with one")
    held = stages_per_rank(schedule) * num_model_copies(schedule)
    return "" if virtual_stages == unset else (
        f"{name}={virtual_stages} must be {unset} under {field}={schedule}, whose ranks hold {held} "
        f"stage{'s'[:held - 1]} each")


def microbatches_multiple(schedule: str, num_ranks: int) -> int:
    """The number of which the micro-batches of a step must be a multiple."""
    rules = RULES[schedule]
    return num_ranks if rules.is_in_rounds else rules.copies


def microbatches_to_fill(schedule: str, num_ranks: int) -> int:
    """Micro-batches of a step from which on every rank of a schedule reaches its steady state."""
    rules = RULES[schedule]
    return 2 * num_ranks if rules.is_paired or rules.is_v_shaped else num_ranks


def microbatches_problem(schedule: str, num_ranks: int, num_microbatches: int, field: str) -> str:
    """What keeps a schedule from so many micro-batches in a step; "" if nothing does."""
    given = f"num_microbatches={num_microbatches}"
    if num_microbatches % microbatches_multiple(schedule, num_ranks) == 0:
        return ""
    if RULES[schedule].is_in_rounds:
        return (f"{given} must be a multiple of pipeline_model_parallel_size={num_ranks} under {field}={schedule}, "
                "as Megatron-Core requires")
    return f"{given} must be even under {field}={schedule}, where half of them enter at each end"


def nearest_microbatches(schedule: str, num_ranks: int, wanted: int) -> list[int]:
    """The possible numbers of micro-batches next to `wanted`, one or two, in ascending order."""
    multiple = microbatches_multiple(schedule, num_ranks)
    if wanted <= multiple:
        return [multiple]
    below = wanted // multiple * multiple
    return [below] if below == wanted else [below, below + multiple]
