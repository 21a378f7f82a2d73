"""Memory of each pipeline rank at the moment of a training step when it is most, component by component.

Usage:
    ranks = estimate_memory(run, world_size=2048)
    worst = max(ranks, key=lambda rank: rank.peak_bytes)
"""

from __future__ import annotations

from dataclasses import dataclass

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.planning.memory_state import rank_states


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank: bytes on the device at its peak, unless named host. Each tensor is in one component.

    All its tensor-, expert- and data-parallel ranks hold as much, if every expert gets as many tokens.

    Attributes:
        pipeline_rank: Which one.
        stages: The stages that it holds, by chunk.
        layer_ids: Their layers.
        num_parameters: Elements of its weights.
        parameter_bytes: Weights.
        gradient_bytes: fp32 main gradients.
        optimizer_bytes: Master weights and moments, with the scratch that narrow moments need.
        activation_bytes: What forward passes have kept for backward, of all micro-batches under way.
        deferred_bytes: What waits for the weight part of a backward pass that is split.
        working_bytes: What lives during the one pass that is at its peak, beside what is kept.
        communication_bytes: Tensors on their way between pipeline ranks.
        buffer_bytes: Small things that are always there: routers' biases and counts, rotary tables, FP8 weights.
        host_bytes: The average of the weights, in CPU memory.
    """

    pipeline_rank: int
    stages: tuple[int, ...]
    layer_ids: tuple[int, ...]
    num_parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    deferred_bytes: int
    working_bytes: int
    communication_bytes: int
    buffer_bytes: int
    host_bytes: int

    @property
    def state_bytes(self) -> int:
        """What is held between steps."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once on the device."""
        return (self.state_bytes + self.activation_bytes + self.deferred_bytes + self.working_bytes
                + self.communication_bytes)


def estimate_memory(run: RunConfig, world_size: int | None = None, *, device: str = "cuda") -> tuple[RankMemory, ...]:
    """Memory of a training step, by pipeline rank.

    Args:
        run: A valid run; of one with phases, `run.in_phase(phase)` for another phase than the first.
        world_size: Processes; None: the fewest that the layout runs on.
        device: "cuda" or "cpu": which operations the modules choose.
    """
    size = run.parallel.minimum_world_size if world_size is None else world_size
    precision = "bf16" if run.training.precision == "auto" else run.training.precision
    stages = stage_layouts(run.model, run.parallel)
    ranks = []
    for rank, (places, state) in enumerate(zip(placement(run.parallel), rank_states(run, size, precision=precision),
                                               strict=True)):
        ranks.append(RankMemory(
            pipeline_rank=rank, stages=tuple(place.stage for place in places),
            layer_ids=tuple(layer for place in places for layer in stages[place.stage].layer_ids),
            num_parameters=state.parameters, parameter_bytes=state.parameter_bytes,
            gradient_bytes=state.gradient_bytes,
            optimizer_bytes=state.master_bytes + state.moment_bytes + state.scratch_bytes,
            activation_bytes=0, deferred_bytes=0, working_bytes=0, communication_bytes=0, buffer_bytes=0,
            host_bytes=state.average_bytes))
    return tuple(ranks)
