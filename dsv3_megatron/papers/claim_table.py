"""All claims in the order of the page, and the verdicts on them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from dsv3_megatron.papers.claim import Agreement, Claim, Judged, judge
from dsv3_megatron.papers.cluster_claims import COST, DISPATCH, LAYOUT, TIME
from dsv3_megatron.papers.fp8_claims import FP8
from dsv3_megatron.papers.later_claims import INFERENCE, POST_TRAINING, RESULTS
from dsv3_megatron.papers.model_claims import ARCHITECTURE, OPERATIONS, PARAMETERS
from dsv3_megatron.papers.schedule_claims import SCHEDULES_COMPARED
from dsv3_megatron.papers.training_claims import EXTENSION, RECIPE

# Heading on the page -> its claims.
SECTIONS: dict[str, tuple[Claim, ...]] = {
    "Architecture": ARCHITECTURE,
    "Parameters": PARAMETERS,
    "Operations and cache": OPERATIONS,
    "Recipe of pre-training": RECIPE,
    "Context extension": EXTENSION,
    "Pipeline schedules": SCHEDULES_COMPARED,
    "Layout and memory": LAYOUT,
    "Dispatch of tokens": DISPATCH,
    "FP8": FP8,
    "Time of a step": TIME,
    "Cost": COST,
    "Post-training": POST_TRAINING,
    "Inference": INFERENCE,
    "Results": RESULTS,
}


@dataclass(frozen=True)
class JudgedSection:
    """A section of the page: its heading, and its claims with their verdicts."""

    heading: str
    rows: tuple[Judged, ...]


def all_claims() -> Iterator[Claim]:
    """Every claim, in the order of the page."""
    for claims in SECTIONS.values():
        yield from claims


def judge_all(*, with_slow: bool, report: Callable[[], None] = lambda: None) -> tuple[JudgedSection, ...]:
    """Compare every claim with what the library gives.

    Args:
        with_slow: Compute those too that take longer: they import torch, or search layouts.
        report: Called when a claim has been looked at.
    """
    def judged(claim: Claim) -> Judged:
        found = judge(claim, with_slow=with_slow)
        report()
        return found

    return tuple(JudgedSection(heading, tuple(map(judged, claims))) for heading, claims in SECTIONS.items())


def count_verdicts(sections: Iterable[JudgedSection]) -> dict[Agreement, int]:
    """Number of rows by verdict, verdicts without a row left out."""
    counts = Counter(row.verdict for section in sections for row in section.rows)
    return {verdict: counts[verdict] for verdict in Agreement if counts[verdict]}
