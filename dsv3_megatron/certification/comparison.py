"""A layout's step against one process's, and one process's against its definition: every number by its name.

Each rank's part of a tensor is compared with the same part of the expected one, so that a difference has a rank. Copies
of one part on several ranks must be equal to the last bit. Errors are relative to each tensor's largest expected entry.

What a step made of its gradients is held against its own gradients: their norm, and each parameter after the update.
So no tolerance of a gradient, and no precision in which it was computed, loosens what is said of the optimizer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch

from dsv3_megatron.certification.defined_steps import DefinedStep
from dsv3_megatron.certification.defined_update import GradientOfStep, adamw_update
from dsv3_megatron.certification.rank_step import RankPlace, RankStep, whole_tensors
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.config.training import TrainingConfig
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.model.global_names import WholeParameter


@dataclass(frozen=True)
class Tolerances:
    """Largest errors that rounding may make, relative to the largest entry of a tensor.

    Attributes:
        loss: Error of the mean losses.
        gradient: Error of each parameter's gradient.
        affinity: Distance of a router's affinities, which lie in 0..1.
        regrouped: Error of the gradients that FP8 rounds in groups of tokens, which a layout forms of others: the norm
            of the difference over the expected norm.
        norm: Error of the gradient's norm, given the gradients.
        update: Error of each entry of a parameter after the step, given its gradients, relative to the magnitudes that
            are added up for this entry.
    """

    loss: float
    gradient: float
    affinity: float
    regrouped: float = 0.0
    norm: float = 2.0**-20
    update: float = 2.0**-20

    def by_kind(self) -> dict[str, float]:
        """Tolerances by the kind of number under which `Comparison` keeps the largest error."""
        return {"affinity": self.affinity, "loss": self.loss, "gradient": self.gradient,
                "regrouped gradient": self.regrouped, "gradient norm": self.norm, "update": self.update}


# All fp32 (unit rounding 6e-8, 2^-24): the same products, cut elsewhere, and sums added in another order. An error of
# 0.1% in one rank's part of one gradient shows as 6e-4.
FP32 = Tolerances(loss=1e-6, gradient=2e-5, affinity=1e-5)
# Some gradients are small sums of large parts, or follow a loss steeply, so that rounding changes them more. That is
# measured: a layout and one process may be this many times as far apart as one process is from float64.
ROUNDINGS_APART = 4.0
# As the other run rounds to FP8 (`given_roundings`), what is left is fp32's rounding too. But a value of E4M3 is off by
# up to 6%, by 2.6% in the mean square, and weight gradients are products of two of them that have other scales in
# another layout.
FP8 = dataclasses.replace(FP32, regrouped=0.1)
# Where ranks pass latents, each rounds its share of a latent's gradient, and the shares largely cancel. 0.12 was seen
# for the norm of a latent, of whose gradient rounding to FP8 itself changes 0.2 to 0.3.
FP8_OF_PASSED_LATENTS = dataclasses.replace(FP8, regrouped=0.2)


@dataclass(frozen=True)
class Difference:
    """One number or tensor that is not what it should be.

    Attributes:
        quantity: Name of it, such as "gradient of decoder.layers.0.mlp.router.weight".
        moment: Step, and what it is compared with, such as "step 1".
        place: The rank that has it.
        error: Largest error, relative to the largest expected entry; infinite where numbers are missing or no numbers.
        tolerance: Largest error that rounding may make.
        detail: More about it; "" if there is nothing.
    """

    quantity: str
    moment: str
    place: RankPlace | None
    error: float
    tolerance: float
    detail: str = ""

    def __str__(self) -> str:
        where = f" on {self.place}" if self.place else ""
        detail = f" ({self.detail})" if self.detail else ""
        return (f"{self.quantity}{where}, {self.moment}: relative error {self.error:.3g} where rounding explains "
                f"{self.tolerance:.3g}{detail}")


@dataclass(frozen=True)
class StepGradients:
    """Whole gradients of a step by global name, not clipped, and their norm as the run has it."""

    gradients: dict[str, torch.Tensor]
    norm: float


@dataclass
class Comparison:
    """Differences found, the first first, and the largest errors among what agrees or not, by kind."""

    differences: list[Difference] = field(default_factory=list)
    largest: dict[str, float] = field(default_factory=dict)

    def check(self, kind: str, quantity: str, moment: str, place: RankPlace | None, actual: torch.Tensor,
              expected: torch.Tensor, tolerance: float, detail: Callable[[], str], scale: Scale | None = None) -> None:
        """Compare two tensors, and keep the error.

        Args:
            kind: Name under which the largest error is kept.
            quantity: Name of what is compared.
            moment: Words for the difference: which step, and with what.
            place: The rank whose it is.
            actual: Tensor that was found.
            expected: Tensor that it should be.
            tolerance: Largest error allowed.
            detail: Makes a text about it for people.
            scale: Magnitude that errors are relative to, and how both are measured; None: the largest expected entry.
        """
        error = relative_error(actual, expected, scale)
        self.largest[kind] = max(self.largest.get(kind, 0.0), error)
        if not error <= tolerance:
            self.differences.append(Difference(quantity, moment, place, error, tolerance, detail()))

    def add(self, other: Comparison) -> None:
        """Take in what another comparison has found, behind what is here."""
        self.differences += other.differences
        for kind, error in other.largest.items():
            self.largest[kind] = max(self.largest.get(kind, 0.0), error)


@dataclass(frozen=True)
class Scale:
    """Magnitude that an error is relative to.

    Attributes:
        value: Magnitude of the whole expected tensor; or one for each entry.
        is_norm: Whether the tensor's norm is meant, and that of the difference; else the largest entry is.
    """

    value: float | torch.Tensor
    is_norm: bool = False

    @classmethod
    def of(cls, expected: torch.Tensor, *, is_norm: bool = False) -> Scale:
        """Measure a whole expected tensor."""
        return cls(_magnitude(expected, is_norm), is_norm)


def _magnitude(tensor: torch.Tensor, is_norm: bool) -> float:
    tensor = tensor.detach().to(torch.float64)
    return (tensor.norm() if is_norm else tensor.abs().max()).item() if tensor.numel() else 0.0


def relative_error(actual: torch.Tensor, expected: torch.Tensor, scale: Scale | None = None) -> float:
    """Largest difference over the largest expected magnitude, or as a scale says; absolute where that is 0."""
    if actual.shape != expected.shape:
        return float("inf")
    scale = scale or Scale.of(expected)
    apart = actual.detach().to(torch.float64) - expected.detach().to(torch.float64)
    if isinstance(scale.value, torch.Tensor):
        error = _magnitude(torch.where(scale.value > 0, apart / scale.value, apart), is_norm=False)
    else:
        error = _magnitude(apart, scale.is_norm) / (scale.value if scale.value > 0 else 1.0)
    return error if error == error else float("inf")  # what is no number is never near one


def compare_steps(expected: RankStep, ranks: Sequence[RankStep], moment: str, tolerances: Tolerances,
                  regrouped: Callable[[str], bool] = lambda name: False,
                  roundings: Mapping[str, float] | None = None) -> Comparison:
    """Compare a layout's step with one process's step from the same weights, but for the updated parameters.

    Args:
        expected: The step of one process.
        ranks: The step of all ranks of the layout.
        moment: Words for the differences: which step.
        tolerances: Largest errors allowed.
        regrouped: Tells whether FP8 rounds the gradient of the named parameter in groups that the layout decides.
        roundings: What rounding makes of each gradient in one process, by global name (`gradient_roundings`); None: it
            is not known.
    """
    result = Comparison()
    for rank in ranks:
        _compare_loads(result, rank, expected.report.expert_load, moment)
        result.add(compare_losses(rank.place, rank.report, expected.report, moment, tolerances.loss))
    _compare_gradients(result, ranks, _whole(expected.gradients), moment, tolerances, regrouped, roundings or {})
    for rank in ranks:
        for row, bias in rank.biases.items():
            _compare_exactly(result, f"router bias of layer {row}", moment, rank.place, bias, expected.biases[row])
    held = {row for rank in ranks for row in rank.biases}
    for row in sorted(expected.biases.keys() - held):
        result.differences.append(Difference(f"router bias of layer {row}", moment, None, float("inf"), 0.0,
                                             "no rank has it"))
    return result


def compare_updates(training: TrainingConfig, before: dict[str, torch.Tensor], earlier: Sequence[StepGradients],
                    ranks: Sequence[RankStep], moment: str, tolerances: Tolerances) -> Comparison:
    """Compare what ranks made of their gradients with what is defined: the norm, and AdamW's parameters.

    Args:
        training: Settings of the optimizer.
        before: Whole parameters before the step, by global name.
        earlier: Whole gradients of the steps before it, from zero moments on.
        ranks: The step of all ranks of the layout.
        moment: Words for the differences: which step.
        tolerances: Largest errors allowed.
    """
    result = Comparison()
    whole, found = whole_tensors(rank.gradients for rank in ranks), ranks[0].report.grad_norm
    norm = float(torch.stack([gradient.double().norm() for gradient in whole.values()]).norm())
    result.check("gradient norm", "gradient norm", moment, ranks[0].place, torch.tensor(found, dtype=torch.float64),
                 torch.tensor(norm, dtype=torch.float64), tolerances.norm,
                 lambda: f"{found:.8g}, and the gradients' is {norm:.8g}")
    own = {rank.place: {part.name: part.local for part in rank.gradients} for rank in ranks}

    def wanted(rank: RankStep, part: WholeParameter) -> _Wanted:
        start = part.take(before[part.name])
        steps = [GradientOfStep(part.take(step.gradients[part.name]), step.norm) for step in earlier]
        steps.append(GradientOfStep(own[rank.place][part.name], rank.report.grad_norm))
        update = adamw_update(training, start, steps, is_decayed=len(part.shape) > 1)
        return _Wanted(part.local.double() - start.double(), update.value - start.double(), tolerances.update,
                       Scale(update.size))

    _compare_parts(result, "parameter {}", ranks, lambda step: step.values, before.keys(), wanted,
                   f"{moment}, given its gradients", lambda name: "update")
    return result


def compare_with_definition(step: RankStep, defined: DefinedStep, num_layers: int, moment: str, tolerances: Tolerances
                            ) -> Comparison:
    """Compare one process's step with what a step is by definition, but for the updated parameters.

    Args:
        step: The step of one process.
        defined: Numbers by definition.
        num_layers: Layers of the main model.
        moment: Words for the differences: which step.
        tolerances: Largest errors allowed.
    """
    result = Comparison()
    _compare_loads(result, step, defined.loads, moment)
    result.add(compare_losses(step.place, step.report, defined, moment, tolerances.loss))

    whole = {part.name: whole_from_reference(part.name, defined.gradients, num_layers) for part in step.values}
    _compare_gradients(result, [step], whole, moment, tolerances)
    for row, bias in step.biases.items():
        _compare_exactly(result, f"router bias of layer {row}", moment, step.place, bias, defined.biases[row])
    return result


def gradient_roundings(step: RankStep, defined: DefinedStep, num_layers: int) -> dict[str, float]:
    """How far each gradient of one process's step is from float64's, relative to its largest entry.

    Args:
        step: The step of one process.
        defined: Result of this step by definition, from equal weights and with equal choices of experts.
        num_layers: Layers of the main model.
    """
    return {part.name: relative_error(part.local, whole_from_reference(part.name, defined.gradients, num_layers))
            for part in step.gradients}


def compare_bits(expected: dict[str, torch.Tensor], parts: Sequence[tuple[RankPlace, list[WholeParameter]]],
                 moment: str) -> Comparison:
    """Compare parameters that must be equal to the last bit: what was saved and what was loaded.

    Args:
        expected: Whole parameters by global name.
        parts: Parts of them that each rank holds.
        moment: Words for the differences: which step.
    """
    result = Comparison()
    for place, held in parts:
        for part in held:
            _compare_exactly(result, f"parameter {part.name}", moment, place, part.local,
                             part.take(expected[part.name]))
    return result


def _compare_loads(result: Comparison, step: RankStep, expected: Mapping[int, list[int]], moment: str) -> None:
    for row, dtype in step.counters.items():
        if dtype.is_floating_point or torch.iinfo(dtype).bits < 32:
            result.differences.append(Difference(
                f"expert counts of layer {row}", moment, step.place, float("inf"), 0.0,
                f"the counter is {dtype}, which cannot count a step's tokens exactly; int64 can"))
    for row in sorted(expected.keys() | step.report.expert_load.keys()):
        found, wanted = step.report.expert_load.get(row), expected.get(row)
        if found != wanted:
            off = float("inf") if found is None or wanted is None else max(
                abs(a - b) for a, b in zip(found, wanted, strict=True)) / max(wanted)
            result.differences.append(Difference(f"expert counts of layer {row}", moment, step.place, off, 0.0,
                                                 f"{found} instead of {wanted}"))


def compare_losses(place: RankPlace, report: StepReport, expected: StepReport | DefinedStep, moment: str,
                   tolerance: float, kind: str = "loss") -> Comparison:
    """Compare a step's mean losses.

    Args:
        place: The rank that reports them.
        report: Report of the step.
        expected: Report, or definition, that it should agree with.
        moment: Words for the differences: which step.
        tolerance: Largest relative error allowed.
        kind: Name under which the largest error is kept.
    """
    result = Comparison()
    pairs = [("main loss", report.lm_loss, expected.lm_loss),
             ("balance loss", report.balance_loss, expected.balance_loss)]
    pairs += [(f"MTP loss of depth {depth}", found, wanted) for depth, (found, wanted) in enumerate(
        zip(report.mtp_losses or (), expected.mtp_losses or (), strict=True), start=1)]
    for name, found, wanted in pairs:
        if (found is None) != (wanted is None):
            detail = f"{found} instead of {wanted}"
            result.differences.append(Difference(name, moment, place, float("inf"), 0.0, detail))
        elif found is not None and wanted is not None:
            result.check(kind, name, moment, place, torch.tensor(found, dtype=torch.float64),
                         torch.tensor(wanted, dtype=torch.float64), tolerance,
                         partial("{:.8g} instead of {:.8g}".format, found, wanted))
    return result


def _whole(parts: list[WholeParameter]) -> dict[str, torch.Tensor]:
    """The whole tensors of one process, which has all of each."""
    return {part.name: part.local for part in parts}


@dataclass(frozen=True)
class _Wanted:
    """What a rank's part of a tensor is compared as, with what, and how near it must be."""

    found: torch.Tensor
    expected: torch.Tensor
    tolerance: float
    scale: Scale


def _compare_gradients(result: Comparison, ranks: Sequence[RankStep], expected: dict[str, torch.Tensor], moment: str,
                       tolerances: Tolerances, regrouped: Callable[[str], bool] = lambda name: False,
                       roundings: Mapping[str, float] = MappingProxyType({})) -> None:
    def wanted(_rank: RankStep, part: WholeParameter) -> _Wanted:
        whole, is_norm = expected[part.name], regrouped(part.name)
        near = max(tolerances.gradient, ROUNDINGS_APART * min(roundings.get(part.name, 0.0), tolerances.gradient))
        return _Wanted(part.local, part.take(whole), tolerances.regrouped if is_norm else near,
                       Scale.of(whole, is_norm=is_norm))

    _compare_parts(result, "gradient of {}", ranks, lambda step: step.gradients, expected.keys(), wanted, moment,
                   lambda name: "regrouped gradient" if regrouped(name) else "gradient")


def _compare_parts(result: Comparison, name: str, ranks: Sequence[RankStep],
                   parts_of: Callable[[RankStep], list[WholeParameter]], expected: Collection[str],
                   wanted: Callable[[RankStep, WholeParameter], _Wanted], moment: str, kind: Callable[[str], str]
                   ) -> None:
    """Compare every rank's parts, in the order of the model, and find what no rank has or what copies differ in."""
    seen: dict[str, torch.Tensor] = {}
    for rank in sorted(ranks, key=lambda rank: rank.place.pipeline):
        for part in parts_of(rank):
            quantity = name.format(part.name)
            if part.name not in expected:
                result.differences.append(Difference(quantity, moment, rank.place, float("inf"), 0.0,
                                                     "one process has no such parameter"))
                continue
            own = wanted(rank, part)
            result.check(kind(part.name), quantity, moment, rank.place, own.found, own.expected, own.tolerance,
                         partial(_in_words, own.found, own.expected), own.scale)
            full = seen.setdefault(part.name, torch.full(part.shape, torch.nan))
            before = part.take(full).clone()
            if not before.isnan().all() and not torch.equal(before, part.local):
                result.differences.append(Difference(
                    quantity, moment, rank.place, relative_error(part.local, before), 0.0,
                    "copies on two ranks differ"))
            part.put(full, part.local)
    for missing in sorted(set(expected) - seen.keys()):
        result.differences.append(Difference(name.format(missing), moment, None, float("inf"), 0.0, "no rank has it"))
    for found, full in seen.items():
        if full.isnan().any() and not any(found in difference.quantity for difference in result.differences):
            result.differences.append(Difference(name.format(found), moment, None, float("inf"), 0.0,
                                                 "no rank has all of it"))


def _in_words(found: torch.Tensor, expected: torch.Tensor) -> str:
    """Norms, and the factor between the two where one is a multiple of the other: what was counted twice shows so."""
    found, expected = found.double().flatten(), expected.double().flatten()
    square = expected.dot(expected)
    text = f"norm {found.norm():.4g} instead of {expected.norm():.4g}"
    if square > 0:
        factor = float(found.dot(expected) / square)
        if (found - factor * expected).norm() <= 1e-3 * expected.norm():
            text += f", {factor:.4g} times the expected"
    return text


def _compare_exactly(result: Comparison, quantity: str, moment: str, place: RankPlace, found: torch.Tensor,
                     expected: torch.Tensor) -> None:
    if not torch.equal(found, expected):
        result.differences.append(Difference(quantity, moment, place, relative_error(found, expected), 0.0,
                                             "it must be equal to the last bit"))
