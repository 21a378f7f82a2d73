"""Sizes that each schedule can be had with, and hypothesis strategies of them."""

from __future__ import annotations

import random

from hypothesis import strategies as st

from dsv3_megatron.schedule.plan import SCHEDULES, Plan, build_plan

# The schedules, and interleaved 1F1B with overlapped pairs.
FORMS = (*SCHEDULES, "interleaved with pairs")


def form(name: str, num_ranks: int, num_microbatches: int, virtual_stages: int | None = None) -> Plan:
    """A plan of one of FORMS."""
    schedule = name.removesuffix(" with pairs")
    return build_plan(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches,
                      virtual_stages=virtual_stages if schedule == "interleaved" else None,
                      is_overlapped=schedule != name)


def fewest(name: str, num_ranks: int) -> int:
    """The smallest number of micro-batches it can be had with."""
    return step(name, num_ranks)


def any_number(name: str, num_ranks: int, rng: random.Random) -> int:
    """A number of micro-batches, from the smallest to some more than twice as many as there are ranks."""
    unit = step(name, num_ranks)
    return unit * rng.randint(1, 2 * num_ranks // unit + 3)


def step(name: str, num_ranks: int) -> int:
    """From one possible number of micro-batches to the next."""
    if name == "dualpipe":
        return 2
    return num_ranks if name.startswith("interleaved") else 1


def has_ranks(name: str, num_ranks: int) -> bool:
    """Whether it can be had with so many ranks."""
    return num_ranks % 2 == 0 if name == "dualpipe" else num_ranks > 1 or not name.startswith("interleaved")


@st.composite
def plans(draw: st.DrawFn, forms: tuple[str, ...] = FORMS, max_ranks: int = 12) -> Plan:
    """Any plan of the forms, up to about four times as many micro-batches as ranks."""
    name = draw(st.sampled_from(forms))
    num_ranks = draw(st.integers(1, max_ranks).filter(lambda ranks: has_ranks(name, ranks)))
    more = draw(st.integers(0, max(1, 3 * num_ranks // step(name, num_ranks))))
    return form(name, num_ranks, fewest(name, num_ranks) + more * step(name, num_ranks), draw(st.integers(2, 4)))
