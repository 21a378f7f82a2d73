"""What the report says of pipeline schedules (table 2), against schedules that are simulated action by action."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from dsv3_megatron.papers.claim import REPORT, Claim, Relation
from dsv3_megatron.schedule.plan import build_plan
from dsv3_megatron.schedule.simulate import Costs, Simulation, simulate

_RANKS, _MICROBATCHES = 16, 120
# One chunk: forward, full backward, its weight part, an overlapped pair. A pair hides a tenth.
_F, _B, _W, _FB = Fraction(1), Fraction(2), Fraction(1), Fraction(27, 10)


@dataclass(frozen=True)
class BubbleRow:
    """A row of table 2.

    Attributes:
        schedule: This library's name of the schedule.
        printed: The bubble as the table prints it.
        bubble: The printed formula, of PP, F, B, W and F&B.
        copies: Copies of the parameters.
        activations: Micro-batches whose activations a rank keeps, of PP.
    """

    schedule: str
    printed: str
    bubble: Callable[[int, Fraction, Fraction, Fraction, Fraction], Fraction]
    copies: int
    activations: Callable[[int], int]


ROWS = (
    BubbleRow("1f1b", "(PP-1)(F+B)", lambda pp, f, b, w, fb: (pp - 1) * (f + b), 1, lambda pp: pp),
    BubbleRow("zb1p", "(PP-1)(F+B-2W)", lambda pp, f, b, w, fb: (pp - 1) * (f + b - 2 * w), 1, lambda pp: pp),
    BubbleRow("dualpipe", "(PP/2-1)(F&B+B-3W)", lambda pp, f, b, w, fb: (Fraction(pp, 2) - 1) * (fb + b - 3 * w), 2,
              lambda pp: pp + 1),
)


@lru_cache(maxsize=8)
def simulated(schedule: str, num_microbatches: int = _MICROBATCHES) -> Simulation:
    """A step of a schedule on 16 ranks, exactly."""
    plan = build_plan(schedule, num_ranks=_RANKS, num_microbatches=num_microbatches)
    return simulate(plan, Costs.uniform(plan.num_stages, forward=_F, backward=_B, weight=_W, overlapped=_FB))


def _command(schedule: str) -> str:
    return (f"dsv3 simulate --schedule {schedule} --pipeline-model-parallel-size {_RANKS} --num-microbatches "
            f"{_MICROBATCHES} --cost-f {float(_F):g} --cost-b {float(_B):g} --cost-w {float(_W):g} "
            f"--cost-fb {float(_FB):g}")


def _row_claims(row: BubbleRow) -> tuple[Claim, ...]:
    bubble = float(row.bubble(_RANKS, _F, _B, _W, _FB))
    name, command = row.schedule, _command(row.schedule)
    return (
        Claim(f"{name}: bubble, {row.printed}", REPORT, "table 2", f"{bubble:g}",
              lambda: float(max(simulated(name).bubble)), command=command,
              why=f"PP = {_RANKS}, F = {float(_F):g}, B = {float(_B):g}, W = {float(_W):g}, F&B = {float(_FB):g}; "
                  "simulated, not by the formula."),
        Claim(f"{name}: copies of the parameters", REPORT, "table 2", f"{row.copies}",
              lambda: float(max(simulated(name).parameters)), command=command),
        Claim(f"{name}: activations, in micro-batches", REPORT, "table 2", f"{row.activations(_RANKS)}",
              lambda: float(max(simulated(name).peak_activations)), command=command),
    )


def _growth(of: str) -> float:
    """Largest bubble, or largest number of activations, of twice the micro-batches over that of as many."""
    few, many = simulated("dualpipe"), simulated("dualpipe", 2 * _MICROBATCHES)
    return float(max(getattr(many, of)) / max(getattr(few, of)))


SCHEDULES_COMPARED = tuple(claim for row in ROWS for claim in _row_claims(row)) + (
    Claim("dualpipe: bubble with twice the micro-batches, over that with as many", REPORT, "3.2.1", "1",
          lambda: _growth("bubble"), relation=Relation.AT_MOST, command=_command("dualpipe")),
    Claim("dualpipe: activations with twice the micro-batches, over those with as many", REPORT, "3.2.1", "1",
          lambda: _growth("peak_activations"), relation=Relation.AT_MOST, command=_command("dualpipe")),
    Claim("dualpipe: micro-batches must be divisible by", REPORT, "3.2.1", "2",
          lambda: float(_least_step()), command=_command("dualpipe"),
          why="And at least twice as many as there are ranks, as in the published implementation."),
)


def _least_step() -> int:
    """The least step between numbers of micro-batches that DualPipe takes, by asking for plans."""
    taken = []
    for number in range(2 * _RANKS, 2 * _RANKS + 8):
        try:
            build_plan("dualpipe", num_ranks=_RANKS, num_microbatches=number)
        except ValueError:
            continue
        taken.append(number)
    return min(second - first for first, second in zip(taken, taken[1:], strict=False))
