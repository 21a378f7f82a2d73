"""What follows from what the processes of a layout, and one process, did: a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3_megatron.certification.certified_layout import RankRecord, Resumed, RunToCertify, initial_weights
from dsv3_megatron.certification.comparison import (
    FP8,
    FP32,
    Comparison,
    Difference,
    Tolerances,
    compare_bits,
    compare_steps,
    compare_with_definition,
)
from dsv3_megatron.certification.defined_steps import DefinedStep
from dsv3_megatron.certification.rank_step import whole_tensors
from dsv3_megatron.certification.routing_notes import Notes, Tie, compare_notes, in_steps, merge_notes
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.global_names import WholeParameter

# Factor on the tolerances of the second step, in fp32 and in FP8: weights that an update has made differ by rounding.
AFTER_AN_UPDATE = {False: 10.0, True: 2.0}
# Largest difference of the loss in FP8 from the loss by definition, relative.
FP8_AGAINST_DEFINITION = 0.05


@dataclass
class Verdict:
    """What was found of one layout.

    Attributes:
        job: The run and its layout.
        differences: All that is not as it should be, the first first.
        ties: Tokens that went elsewhere within rounding, each once.
        largest: Largest errors by kind, of what agrees too.
        error: Text of what kept the layout from its steps; "" if nothing did.
        checks: What was compared, in words.
        seconds: Time that it took, its share of what it had with others.
    """

    job: RunToCertify
    differences: list[Difference] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)
    error: str = ""
    checks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_equal(self) -> bool:
        """Whether the layout computes what one process computes."""
        return bool(self.checks) and not self.differences and not self.error


@dataclass(frozen=True)
class OneProcess:
    """The run without any split, and its definition.

    Attributes:
        record: What the process did.
        defined: Steps by definition; None where there is none, and only the loss is held to them under FP8.
        given: Choices of experts that layouts take.
        folder: Folder of its checkpoint.
    """

    record: RankRecord
    defined: list[DefinedStep] | None
    given: Notes
    folder: Path


def both_precisions(one: Verdict, other: Verdict) -> Verdict:
    """The verdict of a layout in FP8 with that of the same layout without."""
    in_fp8, plain = (one, other) if one.job.run.fp8.is_enabled else (other, one)
    errors = [f"without FP8: {plain.error}"] * bool(plain.error) + [in_fp8.error] * bool(in_fp8.error)
    return Verdict(
        in_fp8.job,
        [dataclasses.replace(found, moment=f"without FP8, {found.moment}") for found in plain.differences]
        + in_fp8.differences,
        [dataclasses.replace(tie, name=f"without FP8, {tie.name}") for tie in plain.ties] + in_fp8.ties,
        plain.largest | {f"{kind} in FP8": error for kind, error in in_fp8.largest.items()}, "\n".join(errors),
        [f"without FP8: {check}" for check in plain.checks] + [f"in FP8: {check}" for check in in_fp8.checks],
        one.seconds + other.seconds)


def judge(verdict: Verdict, one: OneProcess, ranks: list[RankRecord], crossed: Resumed | None) -> None:
    """Compare what all processes did.

    Args:
        verdict: Gets what is found.
        one: One process and the definition.
        ranks: Records of the layout's ranks.
        crossed: Resume of one process from the layout's checkpoint; None: not asked for.
    """
    job, found = verdict.job, Comparison()
    tolerances = tolerances_of(job.run)
    initial = {part.name: part.local for part in one.record.initial}
    _judge_one_process(verdict, one, tolerances, found)
    _judge_routing(verdict, "", one.given, [rank.notes for rank in ranks], tolerances, found)
    for number in range(job.num_steps):
        steps = [rank.steps[number] for rank in ranks]
        found.add(compare_steps(one.record.steps[number], steps, initial, f"step {number + 1}",
                                later(tolerances, number)))
    verdict.checks.append(f"{job.num_steps} step{'s' * (job.num_steps > 1)} against one process's")
    if crossed is not None:
        _judge_resumes(verdict, one, ranks, crossed, initial, tolerances, found)
    verdict.differences, verdict.largest = found.differences, found.largest


def tolerances_of(run: RunConfig) -> Tolerances:
    """Tolerances for a run's precision."""
    return FP8 if run.fp8.is_enabled else FP32


def later(tolerances: Tolerances, number: int) -> Tolerances:
    """Tolerances after so many updates, each of which adds its own rounding to the weights."""
    if not number:
        return tolerances
    factor = AFTER_AN_UPDATE[tolerances == FP8]
    return dataclasses.replace(tolerances, loss=factor * tolerances.loss, gradient=factor * tolerances.gradient,
                               update=factor * tolerances.update)


def _judge_one_process(verdict: Verdict, one: OneProcess, tolerances: Tolerances, found: Comparison) -> None:
    job = verdict.job
    if one.defined is None:
        verdict.checks.append("one process is not held to a definition: positions restart, attention does not")
        return
    weights = initial_weights(job.run.model, job.seed)
    moment = "one process against the definition, step {}"
    if job.run.fp8.is_enabled:
        # Without FP8 the definition is another computation: its losses are near, its routing is not the same.
        step, defined = one.record.steps[0], one.defined[0]
        error = abs(step.report.lm_loss / defined.lm_loss - 1) if step.report.lm_loss else float("inf")
        if not error <= FP8_AGAINST_DEFINITION:
            found.differences.append(Difference("main loss", moment.format(1), step.place, error,
                                                FP8_AGAINST_DEFINITION))
        verdict.checks.append("the loss of one process in FP8 near the definition's without FP8")
        return
    _judge_routing(verdict, "one process against the definition, ", one.given, [one.record.notes], tolerances, found)
    for number, (step, defined) in enumerate(zip(one.record.steps, one.defined, strict=True)):
        found.add(compare_with_definition(step, defined, weights, job.run.model.num_layers, moment.format(number + 1),
                                          later(tolerances, number)))
    verdict.checks.append(f"{job.num_steps} step{'s' * (job.num_steps > 1)} of one process against the definition "
                          "in float64")




def _judge_routing(verdict: Verdict, moment: str, given: Notes, ranks: Sequence[Notes], tolerances: Tolerances,
                   found: Comparison, steps: range = range(1, 1000)) -> None:
    try:
        notes = merge_notes(list(ranks))
    except AssertionError as error:
        found.differences.append(Difference(f"routing: {error}", f"{moment}all steps", None, float("inf"), 0.0))
        return
    result = compare_notes(in_steps(given, steps), notes, rounding=tolerances.affinity)
    found.largest["affinity"] = max(found.largest.get("affinity", 0.0), result.largest)
    for fault in result.faults:
        step, _, what = fault.partition(", ")
        found.differences.append(Difference(f"routing, {what}", f"{moment}{step}", None, result.largest,
                                            tolerances.affinity))
    known = {(tie.name, tie.place) for tie in verdict.ties}
    verdict.ties += [tie for tie in result.ties if (tie.name, tie.place) not in known]


def _judge_resumes(verdict: Verdict, one: OneProcess, ranks: list[RankRecord], crossed: Resumed,
                   initial: dict[str, Any], tolerances: Tolerances, found: Comparison) -> None:
    """Resumes of the layout from its own checkpoint, of the layout from one process's, of one process from its."""
    own = [rank.resumed for rank in ranks if rank.resumed is not None]
    other = [rank.resumed_from_other for rank in ranks if rank.resumed_from_other is not None]
    assert len(own) == len(other) == len(ranks)
    last = range(2, 3)
    saved = whole_tensors([rank.steps[0].values for rank in ranks])
    straight = whole_tensors([rank.steps[1].values for rank in ranks])
    moment = "resumed from its own checkpoint"
    found.add(compare_bits(saved, _loaded(own), f"{moment}, as loaded"))
    found.add(compare_bits(straight, [(part.place, part.step.values) for part in own], f"{moment}, after step 2"))
    _judge_routing(verdict, f"{moment}, ", one.given, [part.notes for part in own], tolerances, found, last)
    of_one = whole_tensors([one.record.steps[0].values])
    moment = "resumed from one process's checkpoint"
    found.add(compare_bits(of_one, _loaded(other), f"{moment}, as loaded"))
    _judge_routing(verdict, f"{moment}, ", one.given, [part.notes for part in other], tolerances, found, last)
    found.add(compare_steps(one.record.steps[1], [part.step for part in other], initial, f"{moment}, step 2",
                            later(tolerances, 1)))
    moment = "one process resumed from its checkpoint"
    found.add(compare_bits(saved, _loaded([crossed]), f"{moment}, as loaded"))
    _judge_routing(verdict, f"{moment}, ", one.given, [crossed.notes], tolerances, found, last)
    found.add(compare_steps(one.record.steps[1], [crossed.step], initial, f"{moment}, step 2", later(tolerances, 1)))
    verdict.checks.append("resumes from its own checkpoint (bit for bit), from one process's, and one process's from "
                          "its")


def _loaded(resumed: Sequence[Resumed]) -> list[tuple[Any, list[WholeParameter]]]:
    return [(part.place, part.loaded) for part in resumed]
