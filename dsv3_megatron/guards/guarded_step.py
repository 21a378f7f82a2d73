"""One optimizer step under guard: each rank judges the same numbers, and what is left out leaves no trace.

Losses and the gradient norm are sums over all ranks, so NaN or Inf on any one of them is seen by each; what the norm
leaves out is among the sums too. From the same numbers all ranks come to the same decision, without asking each other.
Only after that is anything changed: an update that is left out leaves parameters, the optimizer's state and its step
counter as they were, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer

from dsv3_megatron.guards.decisions import Finding, Guard, Judgement
from dsv3_megatron.guards.events import Event, EventLog
from dsv3_megatron.guards.spikes import LOSS
from dsv3_megatron.optim.update import apply_gradients

# Names in a log line; the rest are counted.
_NUM_NAMED = 3


@dataclass(frozen=True)
class StepOutcome:
    """What became of an optimizer step; the same on every rank.

    Attributes:
        is_applied: Whether parameters were updated.
        is_spike: Whether the step was flagged as a spike, applied or not.
        grad_norm: Global L2 norm before clipping.
    """

    is_applied: bool
    is_spike: bool
    grad_norm: float


@dataclass(frozen=True)
class StepFacts:
    """What is known of a step before its update.

    Attributes:
        iteration: Number of the step, counted from 1.
        losses: Losses by name, reduced over all ranks; "lm loss" is among them unless no token of the step counts.
        samples: The dataset's samples in the global batch.
        micro_batches: This rank's reports, each with "sums" and "sample_ids"; none but on the last pipeline stage.
        grad_norm: Global L2 norm of the gradient before clipping.
        has_nonfinite_copy: NaN or Inf is in a gradient that the norm leaves out, on some rank.
    """

    iteration: int
    losses: Mapping[str, float]
    samples: range
    micro_batches: Sequence[Mapping[str, Any]]
    grad_norm: float
    has_nonfinite_copy: bool


def guarded_step(guard: Guard, log: EventLog, optimizer: MegatronOptimizer, chunks: Iterable[torch.nn.Module],
                 facts: StepFacts) -> StepOutcome:
    """Update the parameters unless the guard finds a reason not to; every rank calls, with the same facts.

    Args:
        guard: Judges, and remembers.
        log: Told of what is found.
        optimizer: Optimizer whose gradients are ready, by `optim.update.squared_norm`.
        chunks: This rank's stages.
        facts: What is known of this step; the micro-batches' reports are this rank's.
    """
    norm = facts.grad_norm
    if LOSS not in facts.losses:  # what gradients there are, of balance losses, are of no token that is to be learned
        guard.pass_over()
        log.write(Event(facts.iteration, "uncounted", "skipped", ("no token of the step counts in the loss",),
                        (facts.samples.start, facts.samples.stop - 1), (), None, norm))
        return StepOutcome(False, False, norm)
    judgement = guard.judge(facts.losses, norm)
    if facts.has_nonfinite_copy and judgement.finding is not Finding.NONFINITE:
        judgement = Judgement(Finding.NONFINITE, ("a tensor-parallel rank's copy of a gradient is not finite",))
    finding = judgement.finding
    is_applied = guard.decide(finding, facts.losses[LOSS], norm)
    if finding is not Finding.NOTHING:
        reasons, sources = judgement.reasons, _collect_sources(finding, facts, chunks)
        log.write(Event(facts.iteration, finding.name.lower(), _action(guard, is_applied), reasons,
                        (facts.samples.start, facts.samples.stop - 1), sources, facts.losses[LOSS], norm))
    if is_applied:
        apply_gradients(optimizer, norm)
    return StepOutcome(is_applied, finding is Finding.SPIKE, norm)


def _action(guard: Guard, is_applied: bool) -> str:
    if guard.end_reason:
        return "ended the run"
    if guard.must_roll_back:
        return "rolled back"
    return "logged" if is_applied else "skipped"


def _collect_sources(finding: Finding, facts: StepFacts, chunks: Iterable[torch.nn.Module]) -> tuple[str, ...]:
    """Sources of NaN or Inf that any rank knows of, each once."""
    sources: list[str] = []
    if finding is Finding.NONFINITE:
        rank = torch.distributed.get_rank()
        sources += [f"micro-batch of samples {_span(entry['sample_ids'].tolist())} on rank {rank}"
                    for entry in facts.micro_batches if not bool(entry["sums"].isfinite().all())]
        names = [name for chunk in chunks for name, parameter in chunk.named_parameters()
                 if not _is_finite(getattr(parameter, "main_grad", None))]
        if names:
            more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
            sources.append(f"gradients on rank {rank}: {', '.join(names[:_NUM_NAMED])}{more}")
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, sources)
    return tuple(dict.fromkeys(source for mine in gathered for source in mine))


def _span(sample_ids: list[int]) -> str:
    return str(sample_ids[0]) if len(sample_ids) == 1 else f"{sample_ids[0]} to {sample_ids[-1]}"


def _is_finite(gradient: torch.Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())
