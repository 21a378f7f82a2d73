"""Names of the pipeline schedules and the rules of their sizes; the schedules themselves are in `schedule/`.

    schedule      stages  ranks      micro-batches of a step
    1f1b          P       any        any
    interleaved   V * P   P >= 2     a multiple of P, as Megatron-Core requires
    zb1p          P       any        any
    zbv           2P      any        any
    dualpipe      P       even       even, at least 2P
    dualpipev     2P      any        at least 2P

P is the number of pipeline ranks, V the chunks that each holds of an interleaved pipeline. Under dualpipe a rank holds
two stages as well, of two copies of the model.
"""

from __future__ import annotations

SCHEDULES = ("1f1b", "interleaved", "zb1p", "zbv", "dualpipe", "dualpipev")
# Stages go along the ranks and back, so that the last rank holds the two middle ones and rank 0 the first and the last.
V_SHAPED = ("zbv", "dualpipev")
# Schedules that have the first and the last stage on one rank.
FOLDED = (*V_SHAPED, "dualpipe")

# Schedules that always run a forward and a backward pass as a pair.
PAIRED = ("dualpipe", "dualpipev")
# Schedules in which weight gradients wait for a time when their rank would stand still.
SPLIT_BACKWARD = ("zb1p", *FOLDED)


def stages_per_rank(schedule: str, virtual_stages: int | None = None) -> int:
    """Stages of one copy of the model that a rank holds.

    Args:
        schedule: Name of a schedule, one of SCHEDULES.
        virtual_stages: V of the interleaved one, 2 if not given.
    """
    if schedule == "interleaved":
        return virtual_stages or 2
    return 2 if schedule in V_SHAPED else 1


def num_model_copies(schedule: str) -> int:
    """Copies of the model along one pipeline."""
    return 2 if schedule == "dualpipe" else 1


def microbatch_rule(schedule: str, num_ranks: int) -> tuple[int, int]:
    """The fewest micro-batches of a step that a schedule runs, and the number of which they must be a multiple."""
    if schedule == "interleaved":
        return num_ranks, num_ranks
    if schedule.startswith("dualpipe"):
        return 2 * num_ranks, num_model_copies(schedule)
    return 1, 1


def nearest_microbatches(schedule: str, num_ranks: int, wanted: int) -> list[int]:
    """The possible numbers of micro-batches next to `wanted`, one or two, in ascending order."""
    fewest, multiple = microbatch_rule(schedule, num_ranks)
    if wanted <= fewest:
        return [fewest]
    below = wanted // multiple * multiple
    return [below] if below == wanted else [below, below + multiple]
