"""What follows from what the processes of a layout, and one process, did: a verdict."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dsv3_megatron.certification.certified_layout import RankRecord, Resumed, RunToCertify
from dsv3_megatron.certification.comparison import (
    FP8,
    FP8_OF_PASSED_LATENTS,
    FP32,
    ROUNDINGS_APART,
    Comparison,
    Difference,
    StepGradients,
    Tolerances,
    compare_bits,
    compare_losses,
    compare_steps,
    compare_updates,
    compare_with_definition,
    gradient_roundings,
)
from dsv3_megatron.certification.defined_steps import DefinedStep, defined_steps
from dsv3_megatron.certification.rank_step import RankPlace, RankStep, whole_tensors
from dsv3_megatron.certification.routing_notes import Notes, Tie, compare_notes, in_steps, merge_notes
from dsv3_megatron.certification.weight_names import reference_from_whole
from dsv3_megatron.config.precision import precision_map
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.global_names import WholeParameter

# Factor on the tolerances of one process's second step against the definition's, which goes on from weights of its own:
# what an update has made of them differs by rounding.
AFTER_AN_UPDATE = 10.0
# Kind of an error: of one process's losses in FP8.
AGAINST_DEFINITION = "loss of the definition"
# Behind the kind of an error of a layout in FP8, which is certified without FP8 besides.
IN_FP8 = " in FP8"
# Largest difference of a loss in FP8 from the loss by definition, relative, where both take the same choices.
FP8_AGAINST_DEFINITION = 0.03


@dataclass
class Verdict:
    """What was found of one layout.

    Attributes:
        job: The run and its layout.
        differences: All that is not as it should be, the first first.
        ties: Tokens that went elsewhere within rounding, each once.
        num_taken: Roundings to FP8 that the order of a sum decides, and that were taken from the other run.
        largest: Largest errors by kind, of what agrees too.
        error: Text of what kept the layout from its steps; "" if nothing did.
        checks: What was compared, in words.
        seconds: Time that it took, its share of what it had with others.
    """

    job: RunToCertify
    differences: list[Difference] = field(default_factory=list)
    ties: list[Tie] = field(default_factory=list)
    num_taken: int = 0
    largest: dict[str, float] = field(default_factory=dict)
    error: str = ""
    checks: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def allowed(self) -> dict[str, float]:
        """Tolerances by kind, as in `largest`; ten times as much where a step goes on from weights of its own."""
        in_fp8 = {f"{kind}{IN_FP8}": most for kind, most in tolerances_of(self.job.run).by_kind().items()}
        in_fp8[f"{AGAINST_DEFINITION}{IN_FP8}"] = FP8_AGAINST_DEFINITION
        return {kind: (FP32.by_kind() | in_fp8)[kind] for kind in self.largest}

    @property
    def is_equal(self) -> bool:
        """Whether the layout computes what one process computes."""
        return bool(self.checks) and not self.differences and not self.error


@dataclass(frozen=True)
class OneProcess:
    """The run without any split, and its definition.

    Attributes:
        record: What the process did.
        defined: Steps by definition; None where there is none. Under FP8 only the loss is held to them.
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
        in_fp8.num_taken, plain.largest | {f"{kind}{IN_FP8}": error for kind, error in in_fp8.largest.items()},
        "\n".join(errors),
        [f"without FP8: {check}" for check in plain.checks] + [f"in FP8: {check}" for check in in_fp8.checks],
        one.seconds + other.seconds)


def judge(verdict: Verdict, one: OneProcess, ranks: list[RankRecord], crossed: Resumed | None) -> None:
    """Compare what all processes did.

    Every step is compared with one process's from the same weights: the first from those that are given; the second
    with one that went on from the layout's checkpoint.

    Args:
        verdict: Gets what is found.
        one: One process and the definition.
        ranks: Records of the layout's ranks.
        crossed: Resume of one process from the layout's checkpoint; None: there is one step only.
    """
    case = _Case(verdict, one, ranks, Comparison())
    case.judge_one_process()
    case.judge_first_step()
    if crossed is not None:
        case.judge_second_step(crossed)
        case.judge_resumes()
    verdict.differences, verdict.largest = case.found.differences, case.found.largest


def tolerances_of(run: RunConfig) -> Tolerances:
    """Tolerances for a run's precision."""
    if not run.fp8.is_enabled:
        return FP32
    return FP8_OF_PASSED_LATENTS if run.parallel.passes_latents else FP8


def regroups(run: RunConfig) -> Callable[[str], bool]:
    """What tells whether FP8 rounds a parameter's gradient, by its global name, in groups that the layout decides.

    Weight gradients have a scale for 128 tokens of a channel, of those tokens that a rank has. All else has scales of
    one token, but for gradients in blocks, and for those of latents that ranks round one by one before they are summed.
    """
    if not run.fp8.is_enabled:
        return lambda name: False
    if run.fp8.fp8_grad_grouping == "block" or run.parallel.passes_latents:
        return lambda name: True
    precisions = precision_map(run.fp8, run.model)

    def regrouped(name: str) -> bool:
        module = re.sub(r"\.experts\.\d+\.", ".experts.", name).removesuffix(".weight")
        return module in precisions and precisions[module].wgrad == "fp8"

    return regrouped


@dataclass
class _Case:
    """What is judged, and what has been found so far."""

    verdict: Verdict
    one: OneProcess
    ranks: list[RankRecord]
    found: Comparison

    def __post_init__(self) -> None:
        job = self.verdict.job
        self.run, self.num_steps = job.run, job.num_steps
        self.tolerances, self.regrouped = tolerances_of(job.run), regroups(job.run)
        self.initial = {part.name: part.local for part in self.one.record.initial}
        # Parameters after the first step.
        self.saved = whole_tensors(rank.steps[0].values for rank in self.ranks)

    def judge_one_process(self) -> None:
        """Compare one process with the definition, and its updates with AdamW's."""
        one, moment = self.one, "one process against the definition, step {}"
        steps = one.record.steps
        values = [self.initial, *(whole_tensors([step.values]) for step in steps)]
        for number, step in enumerate(steps):
            self._updates(values[number], [_gradients([earlier]) for earlier in steps[:number]], [step],
                          f"one process, step {number + 1}")
        if one.defined is None:
            self.verdict.checks.append("one process is not held to a definition: positions restart, attention does "
                                       "not")
            return
        if self.run.fp8.is_enabled:
            # Without FP8 the definition is another computation. Its choices are taken, and its losses are near.
            self.found.add(compare_losses(steps[0].place, steps[0].report, one.defined[0], moment.format(1),
                                          FP8_AGAINST_DEFINITION, AGAINST_DEFINITION))
            self.verdict.checks.append("the losses of one process in FP8 near the definition's without FP8")
            return
        self._routing("one process against the definition, ", one.given, [one.record.notes])
        for number, (step, defined) in enumerate(zip(steps, one.defined, strict=True)):
            self.found.add(compare_with_definition(step, defined, self.run.model.num_layers, moment.format(number + 1),
                                                   later(self.tolerances, number)))
        self.verdict.checks.append(f"{self.num_steps} step{'s' * (self.num_steps > 1)} of one process against the "
                                   "definition in float64")

    def judge_first_step(self) -> None:
        """Compare the layout's first step with one process's."""
        steps = [rank.steps[0] for rank in self.ranks]
        self._routing("", self.one.record.notes, [rank.notes for rank in self.ranks], 1)
        self._steps(self.one.record.steps[0], steps, "step 1", 1, self.initial)
        self._updates(self.initial, [], steps, "step 1")
        self.verdict.checks.append("the first step against one process's, and the update against AdamW in float64")
        self.verdict.num_taken += sum(rank.num_taken for rank in self.ranks)

    def judge_second_step(self, crossed: Resumed) -> None:
        """Compare the layout's second step with that of one process that went on from the layout's checkpoint."""
        moment, steps = "one process resumed from its checkpoint", [rank.steps[1] for rank in self.ranks]
        self.found.add(compare_bits(self.saved, _loaded([crossed]), f"{moment}, as loaded"))
        self._routing("", crossed.notes, [rank.notes for rank in self.ranks], 2)
        self._steps(crossed.step, steps, "step 2", 2, self.saved)
        first = [_gradients(rank.steps[0] for rank in self.ranks)]
        self._updates(self.saved, first, steps, "step 2")
        self._updates(self.saved, first, [crossed.step], f"{moment}, step 2")
        self.verdict.checks.append("the second step likewise, of which one process's goes on from the layout's "
                                   "checkpoint")
        self.verdict.num_taken += crossed.num_taken

    def judge_resumes(self) -> None:
        """Compare resumes of the layout from its own checkpoint and from one process's."""
        own = [rank.resumed for rank in self.ranks if rank.resumed is not None]
        other = [rank.resumed_from_other for rank in self.ranks if rank.resumed_from_other is not None]
        assert len(own) == len(other) == len(self.ranks)
        straight = whole_tensors(rank.steps[1].values for rank in self.ranks)
        moment = "resumed from its own checkpoint"
        self.found.add(compare_bits(self.saved, _loaded(own), f"{moment}, as loaded"))
        self.found.add(compare_bits(straight, [(part.place, part.step.values) for part in own],
                                    f"{moment}, after step 2"))
        first = self.one.record.steps[:1]
        of_one, moment = whole_tensors([first[0].values]), "resumed from one process's checkpoint"
        steps = [part.step for part in other]
        self.found.add(compare_bits(of_one, _loaded(other), f"{moment}, as loaded"))
        self._routing(f"{moment}, ", self.one.record.notes, [part.notes for part in other], 2)
        self._steps(self.one.record.steps[1], steps, f"{moment}, step 2", 2, of_one)
        self._updates(of_one, [_gradients(first)], steps, f"{moment}, step 2")
        self.verdict.checks.append("resumes from its own checkpoint (bit for bit) and from one process's")
        self.verdict.num_taken += sum(part.num_taken for part in other)

    def _steps(self, expected: RankStep, steps: Sequence[RankStep], moment: str, number: int,
               before: dict[str, torch.Tensor]) -> None:
        """Compare a step with one process's from the weights `before`, whole; where they differ, ask float64."""
        found = compare_steps(expected, steps, moment, self.tolerances, self.regrouped)
        if found.differences:
            roundings = self._roundings(expected, number, before)
            known = compare_steps(expected, steps, moment, self.tolerances, self.regrouped, roundings)
            if len(known.differences) < len(found.differences):
                self.verdict.checks.append(
                    f"{moment}: a gradient that rounding changes more than others, to {ROUNDINGS_APART:g} times the "
                    "distance of one process's from float64's")
            found = known
        self.found.add(found)

    def _roundings(self, step: RankStep, number: int, before: dict[str, torch.Tensor]) -> dict[str, float]:
        """How far one process's gradients of a step are from float64's; nothing where that is not the same step."""
        if self.one.defined is None or self.run.fp8.is_enabled:
            return {}
        defined = self.one.defined[0]
        if number > 1:
            biases = self.one.record.steps[number - 2].biases
            weights = reference_from_whole(before, biases, self.run.model.num_layers)
            (defined,), _notes = defined_steps(self.run, self.verdict.job.samples, weights, 1, first=number)
        if defined.loads != step.report.expert_load:
            return {}
        return gradient_roundings(step, defined, self.run.model.num_layers)

    def _updates(self, before: dict[str, torch.Tensor], earlier: Sequence[StepGradients], steps: Sequence[RankStep],
                 moment: str) -> None:
        self.found.add(compare_updates(self.run.training, before, earlier, steps, moment, self.tolerances))

    def _routing(self, moment: str, expected: Notes, ranks: Sequence[Notes], step: int | None = None) -> None:
        """Compare what routers saw and chose in a step; None: in all steps, which went on from weights of their own."""
        try:
            notes = merge_notes(list(ranks))
        except AssertionError as error:
            self.found.differences.append(Difference(f"routing: {error}", f"{moment}all steps", None, float("inf"),
                                                     0.0))
            return
        rounding, wanted = self.tolerances.affinity, expected
        if step is not None:
            wanted = in_steps(expected, range(step, step + 1))
        result = compare_notes(wanted, notes, rounding=rounding, common_steps=0 if step is None else step - 1)
        self.found.largest["affinity"] = max(self.found.largest.get("affinity", 0.0), result.largest)
        for fault in result.faults:
            name, _, what = fault.partition(", ")
            self.found.differences.append(Difference(f"routing, {what}", f"{moment}{name}", None, result.largest,
                                                     rounding))
        known = {(tie.name, tie.place) for tie in self.verdict.ties}
        self.verdict.ties += [tie for tie in result.ties if (tie.name, tie.place) not in known]


def later(tolerances: Tolerances, number: int) -> Tolerances:
    """Tolerances after so many updates of two runs, each of which adds its own rounding to the weights."""
    factor = AFTER_AN_UPDATE if number else 1.0
    return dataclasses.replace(tolerances, loss=factor * tolerances.loss, gradient=factor * tolerances.gradient)


def _gradients(ranks: Iterable[RankStep]) -> StepGradients:
    steps = list(ranks)
    return StepGradients(whole_tensors(step.gradients for step in steps), steps[0].report.grad_norm)


def _loaded(resumed: Sequence[Resumed]) -> list[tuple[RankPlace, list[WholeParameter]]]:
    return [(part.place, part.loaded) for part in resumed]
