"""Which schedule for this model on these ranks: all of them simulated with the same work, and one recommended.

Schedules cut the model into different numbers of stages. The costs of one chunk are scaled with the size of a stage, so
that every schedule computes the same; a transfer stays as it is, since a micro-batch's activations between two layers
have one size wherever the cut is. Activations and parameters are compared in units of a P-th of the model, what a rank
of plain 1F1B holds of it.

DualPipe and DualPipeV run overlapped pairs. So can interleaved 1F1B in Megatron-Core
(`overlap_moe_expert_parallel_comm`), and it is compared with them in that form too, wherever a pair saves time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.schedule.plan import SCHEDULES, build_plan
from dsv3_megatron.schedule.simulate import Costs, simulate
from dsv3_megatron.schedule.timeline import Time


@dataclass(frozen=True)
class Candidate:
    """A schedule as one could ask for it.

    Attributes:
        schedule: Name of a schedule, one of SCHEDULES.
        virtual_stages: Chunks per rank of the interleaved schedule; None of the others.
        is_overlapped: Interleaved with overlapped pairs.
    """

    schedule: str
    virtual_stages: int | None = None
    is_overlapped: bool = False

    def __str__(self) -> str:
        if self.virtual_stages is None:
            return self.schedule
        return f"{self.schedule} V={self.virtual_stages}" + (" with pairs" if self.is_overlapped else "")


@dataclass(frozen=True)
class Outcome:
    """What a candidate costs; of the ranks the worst, in units of a P-th of the model.

    Attributes:
        candidate: The schedule that was simulated.
        num_stages: Stages of the model; it needs at least as many layers.
        step_time: Time of a step, in the unit of the costs.
        bubble: The longest wait of a rank.
        activations: The most a rank holds at once.
        parameters: The most a rank holds.
        problem: Why the schedule cannot be had with these sizes; then the numbers are 0. None: it can.
    """

    candidate: Candidate
    num_stages: int = 0
    step_time: Time = 0
    bubble: Time = 0
    activations: Time = 0
    parameters: Time = 0
    problem: str | None = None


@dataclass(frozen=True)
class Recommendation:
    """The choice and its reason.

    Attributes:
        fastest: The shortest step; of equal ones the smallest.
        same_parameters: The shortest step of those that hold no more parameters than 1F1B, if that is another.
        same_memory: The shortest step of those that hold no more activations either, if that is yet another.
        reason: A sentence or two for a reader.
    """

    fastest: Outcome
    same_parameters: Outcome | None
    same_memory: Outcome | None
    reason: str


def candidates(max_virtual_stages: int, is_pair_faster: bool) -> list[Candidate]:
    """Every schedule; the interleaved ones with 2, 4, 8, ... and `max_virtual_stages` chunks per rank.

    Raises:
        ConfigError: `max_virtual_stages` is less than 2.
    """
    if max_virtual_stages < 2:
        raise ConfigError(f"virtual_stages={max_virtual_stages} must be at least 2, as the most chunks per rank to "
                          "compare the interleaved schedule with; try 2, or leave it out")
    chunks = sorted({max_virtual_stages, *(2 ** power for power in range(1, max_virtual_stages.bit_length()))})
    found: list[Candidate] = []
    for schedule in SCHEDULES:
        if schedule != "interleaved":
            found.append(Candidate(schedule))
            continue
        found += [Candidate(schedule, number) for number in chunks]
        found += [Candidate(schedule, number, True) for number in chunks if is_pair_faster]
    return found


def compare(costs_of_chunk: Costs, *, num_stages: int, num_ranks: int, num_microbatches: int,
            max_virtual_stages: int = 4) -> list[Outcome]:
    """Simulate every schedule on the same ranks, micro-batches and model.

    Args:
        costs_of_chunk: Costs of one stage, their `overlapped` a number: what a chunk costs if the model has
            `num_stages`.
        num_stages: Stages of the model that the costs belong to.
        num_ranks: Pipeline ranks, P.
        num_microbatches: Micro-batches of a step.
        max_virtual_stages: Most chunks per rank of the interleaved schedule: P times as many layers must be there.

    Returns:
        In the order of SCHEDULES; one that cannot be had with these sizes says why.

    Raises:
        ConfigError: the costs are wrong, or `max_virtual_stages` is less than 2.
    """
    chunk, pair = costs_of_chunk.stages[0], costs_of_chunk.overlapped
    assert isinstance(pair, (int, float, Fraction)), "the cost of a pair is one number here"
    outcomes = []
    for candidate in candidates(max_virtual_stages, pair < chunk.forward + chunk.backward):
        try:
            plan = build_plan(candidate.schedule, num_ranks=num_ranks, num_microbatches=num_microbatches,
                              virtual_stages=candidate.virtual_stages, is_overlapped=candidate.is_overlapped)
        except ConfigError as error:
            outcomes.append(Outcome(candidate, problem=str(error)))
            continue
        scale, share = Fraction(num_stages, plan.num_stages), Fraction(num_ranks, plan.num_stages)
        result = simulate(plan, Costs.uniform(
            plan.num_stages, forward=chunk.forward * scale, backward=chunk.backward * scale,
            weight=chunk.weight * scale, overlapped=pair * scale, p2p=costs_of_chunk.p2p))
        outcomes.append(Outcome(candidate, plan.num_stages, result.step_time, max(result.bubble),
                                max(result.peak_activations) * share, max(result.parameters) * share))
    return outcomes


def recommend(outcomes: Sequence[Outcome]) -> Recommendation:
    """Choose by step time, and say what the choice costs.

    Raises:
        ValueError: none of them can be had.
    """
    possible = [outcome for outcome in outcomes if outcome.problem is None]
    if not possible:
        raise ValueError("no schedule can be had with these sizes: " + "; ".join(str(o.problem) for o in outcomes))
    fastest = min(possible, key=_rank)
    plain = next((outcome for outcome in possible if outcome.candidate.schedule == "1f1b"), fastest)
    lean = [outcome for outcome in possible if outcome.parameters <= plain.parameters]
    same_parameters = min(lean, key=_rank)
    same_memory = min((outcome for outcome in lean if outcome.activations <= plain.activations), key=_rank)
    reason = f"{fastest.candidate} has the shortest step, {_number(fastest.step_time)}"
    if fastest is not plain:
        reason += f", {float(100 * (1 - fastest.step_time / plain.step_time)):.1f}% less than 1f1b"
    reason += (f". Activations: {_number(fastest.activations)}, 1f1b {_number(plain.activations)}; parameters: "
               f"{_number(fastest.parameters)}, 1f1b {_number(plain.parameters)} (on the rank that holds most; unit: "
               "what one rank of 1f1b holds of a micro-batch, and of the model).")
    if fastest.candidate.schedule == "interleaved":
        reason += f" It needs a model of {fastest.num_stages} layers or more."
    if same_parameters is not fastest:
        reason += (f" With no more parameters than 1f1b: {same_parameters.candidate}, "
                   f"{_number(same_parameters.step_time)}.")
    if same_memory is not same_parameters:
        reason += (f" With no more parameters and activations than 1f1b: {same_memory.candidate}, "
                   f"{_number(same_memory.step_time)}.")
    return Recommendation(fastest, same_parameters if same_parameters is not fastest else None,
                          same_memory if same_memory is not same_parameters else None, reason)


def _rank(outcome: Outcome) -> tuple[Any, ...]:
    return outcome.step_time, outcome.parameters, outcome.activations, outcome.num_stages


def _number(value: Time) -> str:
    return f"{float(value):.6g}"
