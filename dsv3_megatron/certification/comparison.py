"""A layout's step against one process's, and one process's against its definition: every number by its name.

Each rank's part of a tensor is compared with the same part of the expected one, so that a difference has a rank. Copies
of one part on several ranks must be equal to the last bit. Errors are relative to each tensor's largest expected entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from dsv3_megatron.certification.defined_steps import DefinedStep
from dsv3_megatron.certification.rank_step import RankPlace, RankStep
from dsv3_megatron.certification.reference_weights import Weights
from dsv3_megatron.certification.weight_names import whole_from_reference
from dsv3_megatron.metrics.run_records import StepReport
from dsv3_megatron.model.global_names import WholeParameter


@dataclass(frozen=True)
class Tolerances:
    """Largest errors that rounding may make, relative to the largest entry of a tensor.

    Attributes:
        loss: Error of the mean losses.
        gradient: Error of each parameter's gradient, and of the gradient's norm.
        update: Error of what the steps changed in a parameter, relative to the largest change.
        affinity: Distance of a router's affinities, which lie in 0..1, in the first step.
        is_by_norm: Whether the error of a tensor is the norm of the difference over the expected norm, instead of the
            largest difference over the largest entry: where single entries are rounded coarsely.
    """

    loss: float
    gradient: float
    update: float
    affinity: float
    is_by_norm: bool = False


# All fp32 (unit rounding 6e-8): the same products, cut elsewhere, and sums added in another order. An error of 0.1% in
# one rank's part of one gradient shows as 6e-4. AdamW's g / (|g| + eps) divides rounding in the small gradients of a
# tensor by themselves, so that updates differ by more.
FP32 = Tolerances(loss=1e-6, gradient=2e-5, update=1e-4, affinity=1e-5)
# A layout changes the order of sums, which moves some values to the next one of E4M3, a step of 6 to 12%, and which
# tokens share a scale. What is counted twice, or not at all on one of two ranks, is off by half and more.
FP8 = Tolerances(loss=4e-3, gradient=0.2, update=0.2, affinity=0.1, is_by_norm=True)


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
        value: Magnitude of the whole expected tensor.
        is_norm: Whether the tensor's norm is meant, and that of the difference; else the largest entry is.
    """

    value: float
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
    difference = _magnitude(actual.detach().to(torch.float64) - expected.detach().to(torch.float64), scale.is_norm)
    # What is no number is never near one.
    return (difference / scale.value if scale.value > 0 else difference) if difference == difference else float("inf")


def compare_steps(expected: RankStep, ranks: Sequence[RankStep], initial: dict[str, torch.Tensor], moment: str,
                  tolerances: Tolerances) -> Comparison:
    """Compare a layout's step with one process's.

    Args:
        expected: The step of one process.
        ranks: The step of all ranks of the layout.
        initial: Whole parameters before the first step, by global name.
        moment: Words for the differences: which step.
        tolerances: Largest errors allowed.
    """
    result = Comparison()
    for rank in ranks:
        _compare_loads(result, rank, expected.report.expert_load, moment)
        _compare_losses(result, rank.place, rank.report, expected.report, moment, tolerances)
    _compare_parts(result, "gradient", "gradient of {}", ranks, lambda step: step.gradients,
                   _whole(expected.gradients), moment, tolerances)
    result.check("gradient norm", "gradient norm", moment, ranks[0].place, torch.tensor(ranks[0].report.grad_norm),
                 torch.tensor(expected.report.grad_norm), tolerances.gradient,
                 lambda: f"{ranks[0].report.grad_norm:.6g} instead of {expected.report.grad_norm:.6g}")
    _compare_parts(result, "update", "parameter {}", ranks, lambda step: step.values, _whole(expected.values), moment,
                   tolerances, initial)
    for rank in ranks:
        for row, bias in rank.biases.items():
            _compare_exactly(result, f"router bias of layer {row}", moment, rank.place, bias, expected.biases[row])
    held = {row for rank in ranks for row in rank.biases}
    for row in sorted(expected.biases.keys() - held):
        result.differences.append(Difference(f"router bias of layer {row}", moment, None, float("inf"), 0.0,
                                             "no rank has it"))
    return result


def compare_with_definition(step: RankStep, defined: DefinedStep, initial: Weights, num_layers: int, moment: str,
                            tolerances: Tolerances) -> Comparison:
    """Compare one process's step with what a step is by definition.

    Args:
        step: The step of one process.
        defined: Numbers by definition.
        initial: The reference's weights before the first step.
        num_layers: Layers of the main model.
        moment: Words for the differences: which step.
        tolerances: Largest errors allowed.
    """
    result = Comparison()
    _compare_loads(result, step, defined.loads, moment)
    _compare_losses(result, step.place, step.report, defined, moment, tolerances)

    def whole(weights: Weights) -> dict[str, torch.Tensor]:
        return {part.name: whole_from_reference(part.name, weights, num_layers) for part in step.values}

    _compare_parts(result, "gradient", "gradient of {}", [step], lambda step: step.gradients, whole(defined.gradients),
                   moment, tolerances)
    result.check("gradient norm", "gradient norm", moment, step.place, torch.tensor(step.report.grad_norm),
                 torch.tensor(defined.grad_norm), tolerances.gradient,
                 lambda: f"{step.report.grad_norm:.6g} instead of {defined.grad_norm:.6g}")
    _compare_parts(result, "update", "parameter {}", [step], lambda step: step.values, whole(defined.values), moment,
                   tolerances, whole(initial))
    for row, bias in step.biases.items():
        _compare_exactly(result, f"router bias of layer {row}", moment, step.place, bias, defined.biases[row])
    return result


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


def _compare_losses(result: Comparison, place: RankPlace, report: StepReport, expected: StepReport | DefinedStep,
                    moment: str, tolerances: Tolerances) -> None:
    pairs = [("main loss", report.lm_loss, expected.lm_loss),
             ("balance loss", report.balance_loss, expected.balance_loss)]
    pairs += [(f"MTP loss of depth {depth}", found, wanted) for depth, (found, wanted) in enumerate(
        zip(report.mtp_losses or (), expected.mtp_losses or (), strict=True), start=1)]
    for name, found, wanted in pairs:
        if (found is None) != (wanted is None):
            detail = f"{found} instead of {wanted}"
            result.differences.append(Difference(name, moment, place, float("inf"), 0.0, detail))
        elif found is not None and wanted is not None:
            result.check("loss", name, moment, place, torch.tensor(found, dtype=torch.float64),
                         torch.tensor(wanted, dtype=torch.float64), tolerances.loss,
                         partial("{:.8g} instead of {:.8g}".format, found, wanted))


def _whole(parts: list[WholeParameter]) -> dict[str, torch.Tensor]:
    """The whole tensors of one process, which has all of each."""
    return {part.name: part.local for part in parts}


def _compare_parts(result: Comparison, kind: str, name: str, ranks: Sequence[RankStep],
                   parts_of: Callable[[RankStep], list[WholeParameter]], expected: dict[str, torch.Tensor], moment: str,
                   tolerances: Tolerances, initial: dict[str, torch.Tensor] | None = None) -> None:
    """Compare every rank's parts, in the order of the model, and find what no rank has or what copies differ in."""
    seen: dict[str, torch.Tensor] = {}
    tolerance = tolerances.gradient if initial is None else tolerances.update
    for rank in sorted(ranks, key=lambda rank: rank.place.pipeline):
        for part in parts_of(rank):
            quantity, wanted = name.format(part.name), expected.get(part.name)
            if wanted is None:
                result.differences.append(Difference(quantity, moment, rank.place, float("inf"), 0.0,
                                                     "one process has no such parameter"))
                continue
            start = 0 if initial is None else initial[part.name]
            scale = Scale.of(wanted - start, is_norm=tolerances.is_by_norm)
            own, local = part.take(wanted - start), part.local
            if initial is not None:
                local = local - part.take(initial[part.name]).to(local.dtype)
            result.check(kind, quantity, moment, rank.place, local, own, tolerance, partial(_in_words, local, own),
                         scale)
            full = seen.setdefault(part.name, torch.full(part.shape, torch.nan))
            before = part.take(full).clone()
            if not before.isnan().all() and not torch.equal(before, part.local):
                result.differences.append(Difference(
                    quantity, moment, rank.place, relative_error(part.local, before), 0.0,
                    "copies on two ranks differ"))
            part.put(full, part.local)
    for missing in sorted(expected.keys() - seen.keys()):
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
