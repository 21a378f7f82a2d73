"""A figure that a paper states, and what this library gives for it: equal, apart, or not to be checked here.

A printed number says how exact it is: "671B" is equal to everything that rounds to it, so to 670.5B up to 671.5B.

Usage:
    claim = Claim("all parameters", REPORT, "4.2", "671B", lambda: count_parameters(model).main_total, unit=1e9,
                  command="dsv3 train --preset dsv3-671b --print-model")
    judged = judge(claim)              # judged.verdict, judged.given, judged.distance
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

REPORT = "report"
COMPANION = "companion"
WEIGHTS_README = "weights README"
PUBLISHED_CONFIG = "published config"
# What the short names stand for, with an address to open.
SOURCES = {
    REPORT: "DeepSeek-V3 Technical Report, <https://arxiv.org/abs/2412.19437>",
    COMPANION: "Insights into DeepSeek-V3: Scaling Challenges and Reflections on Hardware for AI Architectures, "
               "<https://arxiv.org/abs/2505.09343>",
    WEIGHTS_README: "README_WEIGHTS.md of <https://github.com/deepseek-ai/DeepSeek-V3>",
    PUBLISHED_CONFIG: "inference/configs of <https://github.com/deepseek-ai/DeepSeek-V3>",
}
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?")
# A float that should be on the edge of what rounds to a printed number may miss it by so much.
_EDGE = 1e-9


class Agreement(StrEnum):
    """What a comparison with a paper came to."""

    EQUAL = "equal"
    APART = "apart"
    NOT_HERE = "not checkable here"
    NOT_RUN = "not computed"


class Relation(StrEnum):
    """How a paper's number is meant: as the value, or as a bound of it."""

    IS = "="
    AT_MOST = "at most"
    AT_LEAST = "at least"


@dataclass(frozen=True)
class Claim:
    """A figure of a paper.

    Attributes:
        subject: What the figure is of, in a few words.
        source: One of SOURCES.
        place: Section or table of the source.
        said: The figure as it is printed, such as "671B", or words such as "E4M3".
        gives: Computes what this library gives: a number in plain units, or words to compare with `said`. None: it
            cannot be checked here.
        unit: Plain units in a printed unit: 1e9 for "671B".
        relation: Whether `said` is the value or a bound.
        command: The command that shows what this library gives.
        why: Why the two are apart, or what a check would take. It may stand beside an equal figure too.
        is_slow: Computed only if that is asked for, as it takes more than a second or two.
        is_estimate: Whether the planner makes it, whose answers move when the planner learns something.
    """

    subject: str
    source: str
    place: str
    said: str
    gives: Callable[[], float | str] | None = None
    unit: float = 1.0
    relation: Relation = Relation.IS
    command: str = ""
    why: str = ""
    is_slow: bool = False
    is_estimate: bool = False

    @cached_property
    def printed(self) -> str:
        """The first number of `said`, as it is printed.

        Raises:
            ValueError: there is none.
        """
        match = _NUMBER.search(self.said)
        if match is None:
            raise ValueError(f"{self.subject}: said={self.said!r} has no number, though `gives` returns one; "
                             "return words")
        return match.group()

    @property
    def value(self) -> float:
        """The printed number in plain units."""
        return float(self.printed.replace(",", "")) * self.unit

    @property
    def half_a_place(self) -> float:
        """Half of the last printed place, in plain units: what rounding hides."""
        mantissa, _, exponent = self.printed.replace(",", "").partition("e")
        decimals = len(mantissa.partition(".")[2])
        return 0.5 * 10.0 ** (int(exponent or 0) - decimals) * self.unit


@dataclass(frozen=True)
class Judged:
    """A claim beside what this library gives.

    Attributes:
        claim: The claim that was judged.
        verdict: What the comparison came to.
        given: What this library gives, to read; empty where nothing was computed.
        distance: Given over said, less 1; None where they are equal or words.
    """

    claim: Claim
    verdict: Agreement
    given: str = ""
    distance: float | None = None


def judge(claim: Claim, *, with_slow: bool = True) -> Judged:
    """Compute what the library gives for a claim, and compare.

    Args:
        claim: The claim.
        with_slow: Compute slow ones too; else they are NOT_RUN.

    Raises:
        ValueError: `said` has no number where the library gives one.
    """
    if claim.gives is None:
        return Judged(claim, Agreement.NOT_HERE)
    if claim.is_slow and not with_slow:
        return Judged(claim, Agreement.NOT_RUN)
    given = claim.gives()
    if isinstance(given, str):
        return Judged(claim, Agreement.EQUAL if given == claim.said else Agreement.APART, given)
    gap, edge = given - claim.value, claim.half_a_place * (1 + _EDGE)
    agrees = {Relation.IS: abs(gap) <= edge, Relation.AT_MOST: gap <= edge, Relation.AT_LEAST: gap >= -edge}
    shown = _shown(claim, given)
    if agrees[claim.relation]:
        return Judged(claim, Agreement.EQUAL, shown)
    return Judged(claim, Agreement.APART, shown, gap / claim.value)


def _shown(claim: Claim, given: float) -> str:
    """A number in the paper's own unit, with two places more than the paper prints, and what follows it there."""
    number = given / claim.unit
    if "e" in claim.printed:
        text = f"{number:.4g}"
    else:
        places = len(claim.printed.partition(".")[2]) + 2
        text = f"{number:,.{places}f}".rstrip("0").rstrip(".") if number != int(number) else f"{int(number):,}"
    before, after = claim.said.split(claim.printed, 1)
    return f"{before if before.strip() == '$' else ''}{text}{after.split(',')[0].split(' (')[0]}"
