"""What a plan costs before anyone runs it: step time, waiting, activations over time, parameters, by rank.

Discrete and exact: times are sums and maxima of the costs given, so integers and fractions give exact results, and
those of the published formulas (see `formulas`) come out to the last digit.

Usage:
    plan = build_plan("dualpipe", num_ranks=8, num_microbatches=32)
    result = simulate(plan, Costs.uniform(plan.num_stages, forward=1, backward=2, weight=1, overlapped=2.5))
    result.step_time, result.bubble, result.peak_activations
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.plan import Plan
from dsv3_megatron.schedule.timeline import Time, Timeline, run_in_order


@dataclass(frozen=True)
class StageCosts:
    """What one micro-batch costs on one stage, all in one unit of time.

    Stages differ: the first has the embedding, the last the MTP modules, the head and the loss, some have dense layers.

    Attributes:
        forward: F, its all-to-all included.
        backward: B, the full backward, its all-to-all included.
        weight: W, the part of B that makes the weights' gradients; it has no all-to-all.
        weight_tail: The part of W that a full backward leaves until it has handed on the gradient of its input. The
            executor does so with the weights in front of the first all-to-all; published formulas have none.
        all_to_all_forward: The part of F that is all-to-all, which an overlapped pair hides.
        all_to_all_backward: The part of B - W that is.
        optimizer: Time of this stage's share of the optimizer step, once a step.
        activation: Size of what it keeps of a micro-batch until the backward is done, in any unit.
        parameters: Size of what it holds always, in any unit.
    """

    forward: Time
    backward: Time
    weight: Time
    weight_tail: Time = 0
    all_to_all_forward: Time = 0
    all_to_all_backward: Time = 0
    optimizer: Time = 0
    activation: Time = 1
    parameters: Time = 1

    def validate(self, name: str = "") -> None:
        """Check that the costs can be.

        Args:
            name: Put before the fields in messages, to say which stage's.

        Raises:
            ConfigError: a cost is not a number, not positive where it must be, or larger than what it is a part of.
        """
        for part in ("forward", "backward", "weight"):
            require_cost(f"{name}{part}", getattr(self, part))
        for part in ("weight_tail", "all_to_all_forward", "all_to_all_backward", "optimizer", "activation",
                     "parameters"):
            require_cost(f"{name}{part}", getattr(self, part), is_zero_allowed=True)
        require_part(f"{name}weight", self.weight, "backward", self.backward)
        if self.weight_tail > self.weight:
            raise ConfigError(f"{name}weight_tail={_shown(self.weight_tail)} must be at most "
                              f"weight={_shown(self.weight)}, of which it is a part; try {_shown(self.weight)}")
        require_part(f"{name}all_to_all_forward", self.all_to_all_forward, "forward", self.forward)
        require_part(f"{name}all_to_all_backward", self.all_to_all_backward, "backward - weight",
                     self.backward - self.weight)


@dataclass(frozen=True)
class Costs:
    """What everything costs that a plan does.

    Attributes:
        stages: Costs of each stage of the model; both directions of DualPipe have the same.
        overlapped: F&B of a pair: one number, or by (stage of the forward, stage of the backward). None: the longer of
            the two chunks' compute and of their all-to-all, one after the other each, which is perfect hiding.
        p2p: Time that passes between the hand-over of an output and its use on another rank; none on the same rank.
            Transfers run beside the compute.
        p2p_of_boundary: Time of transfers across single boundaries between stages, by `Output.boundary`, where it is
            another.
    """

    stages: tuple[StageCosts, ...]
    overlapped: Time | Mapping[tuple[int, int], Time] | None = None
    p2p: Time = 0
    p2p_of_boundary: Mapping[int, Time] = field(default_factory=dict)

    @classmethod
    def uniform(cls, num_stages: int, *, forward: Time, backward: Time, weight: Time, overlapped: Time | None = None,
                p2p: Time = 0) -> Costs:
        """Make costs that are the same on every stage; `overlapped` is F + B if not given: nothing is hidden."""
        pair = forward + backward if overlapped is None else overlapped
        return cls((StageCosts(forward, backward, weight),) * num_stages, pair, p2p)

    def validate(self, num_stages: int) -> None:
        """Check the costs for a model of some stages.

        Raises:
            ConfigError: a cost is wrong, or there are not as many stages as the plan has.
        """
        if len(self.stages) != num_stages:
            raise ConfigError(f"stages has the costs of {len(self.stages)} stages; the plan has {num_stages}, and each "
                              "needs its own")
        for index, stage in enumerate(self.stages):
            if index == 0 or stage is not self.stages[index - 1]:
                stage.validate(f"stage {index}: ")
        require_cost("p2p", self.p2p, is_zero_allowed=True)
        for boundary, time in self.p2p_of_boundary.items():
            require_cost(f"p2p_of_boundary[{boundary}]", time, is_zero_allowed=True)
        if isinstance(self.overlapped, Mapping):
            for (forward, backward), pair in self.overlapped.items():
                if not (0 <= forward < num_stages and 0 <= backward < num_stages):
                    raise ConfigError(f"overlapped has the pair [{forward}, {backward}]; the plan has stages "
                                      f"0..{num_stages - 1}")
                require_pair(f"overlapped[{forward}, {backward}]", pair, self.stages[forward].forward,
                             self.stages[backward].backward)
        elif self.overlapped is not None:
            require_pair("overlapped", self.overlapped, max(stage.forward for stage in self.stages),
                         max(stage.backward for stage in self.stages))

    def duration(self, plan: Plan, rank: int, action: Action) -> Time:
        """How long an action takes."""
        stages = [plan.placement[rank][operation.chunk].stage for operation in action.operations]
        if action.is_overlapped:
            return self._pair(*stages)
        costs = self.stages[stages[0]]
        kind = action.operations[0].kind
        if kind is Kind.FORWARD:
            return costs.forward
        if kind is Kind.BACKWARD:
            return costs.backward
        return costs.weight if kind is Kind.BACKWARD_WEIGHT else costs.backward - costs.weight

    def tail(self, plan: Plan, rank: int, action: Action) -> Time:
        """How long an action goes on after it has handed over its outputs."""
        return sum(self.stages[plan.placement[rank][operation.chunk].stage].weight_tail
                   for operation in action.operations if operation.kind is Kind.BACKWARD)

    def _pair(self, forward_stage: int, backward_stage: int) -> Time:
        if isinstance(self.overlapped, Mapping):
            if (forward_stage, backward_stage) not in self.overlapped:
                raise ConfigError(f"overlapped has no cost of stage {forward_stage}'s forward with stage "
                                  f"{backward_stage}'s backward, which the plan runs as a pair")
            return self.overlapped[forward_stage, backward_stage]
        if self.overlapped is not None:
            return self.overlapped
        forward, backward = self.stages[forward_stage], self.stages[backward_stage]
        hidden = forward.all_to_all_forward + backward.all_to_all_backward
        return max(forward.forward + backward.backward - hidden, hidden)


@dataclass(frozen=True)
class Simulation:
    """What a step of a plan costs.

    Attributes:
        plan: Plan that was simulated.
        timeline: Spans of each rank's actions.
        step_time: Time that passes between the first action's start and the end of the last rank's optimizer step.
        ideal_time: What the step would take if no rank ever waited: the longest time that a rank works.
        bubble: Time that each rank stands still: the step time less the time that it works.
        activations: The (time, size held from then on) of each rank at each change.
        peak_activations: The most that each rank holds at once, in the unit of the stages' activations.
        parameters: The size that each rank holds always, in the unit of the stages' parameters.
    """

    plan: Plan
    timeline: Timeline
    step_time: Time
    ideal_time: Time
    bubble: tuple[Time, ...]
    activations: tuple[tuple[tuple[Time, Time], ...], ...]
    peak_activations: tuple[Time, ...]
    parameters: tuple[Time, ...]


def simulate(plan: Plan, costs: Costs) -> Simulation:
    """Run a plan in discrete time.

    A rank starts each action as soon as it is free and the inputs are there; all ranks wait for one another before the
    optimizer step, which needs the norm of all gradients. Activations are held from the beginning of a forward to the
    end of the backward, or of its weight part where it is split.

    Args:
        plan: A sound plan.
        costs: Costs of as many stages as the plan has.

    Raises:
        ConfigError: the costs are wrong.
        PlanError: the plan comes to a stop.
    """
    costs.validate(plan.num_stages)
    timeline = run_in_order(plan, lambda rank, action: costs.duration(plan, rank, action), costs.p2p,
                            lambda rank, action: costs.tail(plan, rank, action),
                            delay_of_boundary=costs.p2p_of_boundary)
    held = [[costs.stages[place.stage] for place in places] for places in plan.placement]
    optimizer = [sum(stage.optimizer for stage in stages) for stages in held]
    busy = [sum(span.end - span.start for span in spans) + own for spans, own in zip(timeline, optimizer, strict=True)]
    step_time = max(spans[-1].end for spans in timeline) + max(optimizer)
    activations = tuple(_activations(plan, rank, timeline, costs) for rank in range(plan.num_ranks))
    return Simulation(
        plan=plan, timeline=timeline, step_time=step_time, ideal_time=max(busy),
        bubble=tuple(step_time - own for own in busy), activations=activations,
        peak_activations=tuple(max(size for _, size in changes) for changes in activations),
        parameters=tuple(sum(stage.parameters for stage in stages) for stages in held))


def _activations(plan: Plan, rank: int, timeline: Timeline, costs: Costs) -> tuple[tuple[Time, Time], ...]:
    size: Time = 0
    changes: list[tuple[Time, Time]] = [(0, 0)]
    for span in timeline[rank]:
        for operation in span.action.operations:
            own = costs.stages[plan.placement[rank][operation.chunk].stage].activation
            if operation.kind is Kind.FORWARD:
                size += own
                changes.append((span.start, size))
            elif operation.kind is not Kind.BACKWARD_INPUT:
                size -= own
                changes.append((span.end, size))
    return tuple(changes)


def require_cost(name: str, value: Time, *, is_zero_allowed: bool = False) -> None:
    """Check that a cost is finite and positive.

    Raises:
        ConfigError: the cost is not finite, or not positive (negative, if zero is allowed).
    """
    if not math.isfinite(value):
        raise ConfigError(f"{name}={_shown(value)} must be a finite number")
    if value < 0 or (value == 0 and not is_zero_allowed):
        least = "not be negative; try 0" if is_zero_allowed else "be greater than 0; try 1"
        raise ConfigError(f"{name}={_shown(value)} must {least}")


def require_part(name: str, part: Time, whole_name: str, whole: Time) -> None:
    """Check that a cost is less than the one it is a part of.

    Raises:
        ConfigError: the cost is not less than the whole.
    """
    if part >= whole:
        raise ConfigError(f"{name}={_shown(part)} must be less than {whole_name}={_shown(whole)}, of which it is a "
                          f"part; try {_shown(whole / 2)}")


def require_pair(name: str, pair: Time, forward: Time, backward: Time) -> None:
    """Check the cost of an overlapped pair, which contains both of its chunks.

    Raises:
        ConfigError: the cost is not a positive number, or less than the longer of the two.
    """
    require_cost(name, pair)
    longer = max(forward, backward)
    if pair < longer:
        raise ConfigError(f"{name}={_shown(pair)} must be at least {_shown(longer)}, the longer of the forward and the "
                          f"backward that it contains; try {_shown(longer)} for perfect hiding, "
                          f"{_shown(forward + backward)} for none")


def _shown(value: Time) -> str:
    return f"{float(value):g}"
