"""Memory of each pipeline rank at the moment of a training step when it is most, component by component.

Usage:
    ranks = estimate_memory(run, world_size=2048)
    worst = max(ranks, key=lambda rank: rank.peak_bytes)
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.planning.memory_buffers import buffer_bytes
from dsv3_megatron.planning.memory_ledger import run_turns
from dsv3_megatron.planning.memory_schedule import MAX_UNFINISHED, peak_of, rank_moments, steady_microbatches
from dsv3_megatron.planning.memory_settings import PassSettings, pass_settings
from dsv3_megatron.planning.memory_stage import StageContent, StageCost, stage_cost
from dsv3_megatron.planning.memory_state import rank_states

DEVICES = ("cuda", "cpu")


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
        working_bytes: What lives during the one pass that is at its peak, beside what was there when it began.
        communication_bytes: Tensors on their way between pipeline ranks.
        buffer_bytes: Small things that are always there: routers' biases and counts, rotary tables, FP8 weights.
        host_bytes: The average of the weights, in CPU memory.
        peak_action: What runs at the peak, such as "F0" or "F1 & B0": forward, backward, its input and weight parts
            (I, W), and the chunk; "step" is the optimizer's.
        num_kept: Micro-batches that each chunk keeps when that begins.
        kept_by_chunk: Of one micro-batch, by chunk: what is kept, by name.
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
    peak_action: str = ""
    num_kept: tuple[int, ...] = ()
    kept_by_chunk: tuple[dict[str, int], ...] = field(default=(), repr=False)

    @property
    def state_bytes(self) -> int:
        """What is held between steps."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once on the device."""
        return (self.state_bytes + self.activation_bytes + self.deferred_bytes + self.working_bytes
                + self.communication_bytes)


def estimate_memory(run: RunConfig, world_size: int | None = None, *, device: str = "cuda",
                    is_wide_product: bool = False, imbalance: float = 1.0) -> tuple[RankMemory, ...]:
    """Memory of a training step, by pipeline rank.

    Args:
        run: A valid run; of one with phases, `run.in_phase(phase)` for another phase than the first.
        world_size: Processes; None: the fewest that the layout runs on.
        device: "cuda" or "cpu": which operations the modules choose.
        is_wide_product: Of a CPU without bf16 matrix units: products of bf16 operands are computed on fp32 copies.
        imbalance: Rows that a rank's experts get, as a multiple of the mean over ranks; 1 is balance.

    Raises:
        ValueError: another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} of a memory estimate must be one of {', '.join(DEVICES)}")
    size = run.parallel.minimum_world_size if world_size is None else world_size
    precision = "bf16" if run.training.precision == "auto" else run.training.precision
    settings = pass_settings(run, device=device, precision=precision, is_wide_product=is_wide_product,
                             imbalance=imbalance)
    stages = stage_layouts(run.model, run.parallel)
    ranks = []
    for rank, (places, state) in enumerate(zip(placement(run.parallel), rank_states(run, size, precision=precision),
                                               strict=True)):
        held = [stages[place.stage] for place in places]
        contents = [StageContent.of(run.model, stage) for stage in held]
        costs = tuple(stage_cost(settings, content) for content in contents)
        peak = _peak(run, size, rank, costs, device)
        step = state.step_bytes if device == "cpu" else 0
        if sum(peak[1:5]) < step:
            peak = ("step", 0, 0, 0, step, ())
        ranks.append(RankMemory(
            pipeline_rank=rank, stages=tuple(place.stage for place in places),
            layer_ids=tuple(layer for stage in held for layer in stage.layer_ids),
            num_parameters=state.parameters, parameter_bytes=state.parameter_bytes,
            gradient_bytes=state.gradient_bytes,
            optimizer_bytes=state.master_bytes + state.moment_bytes + state.scratch_bytes,
            activation_bytes=peak[1], deferred_bytes=peak[2], communication_bytes=peak[3], working_bytes=peak[4],
            buffer_bytes=buffer_bytes(settings, contents), host_bytes=state.average_bytes,
            peak_action=peak[0], num_kept=peak[5], kept_by_chunk=tuple(cost.kept for cost in costs)))
    return tuple(ranks)


def _peak(run: RunConfig, world_size: int, rank: int, costs: tuple[StageCost, ...], device: str
          ) -> tuple[str, int, int, int, int, tuple[int, ...]]:
    """What runs at the peak; bytes kept, deferred, on their way, working; micro-batches kept by chunk."""
    parallel = run.parallel
    num_ranks = parallel.pipeline_model_parallel_size
    if num_ranks == 1:
        (cost,) = costs
        forward, backward = run_turns(cost.forward).peak, cost.kept_bytes + run_turns(cost.backward).peak
        if forward > backward:
            return "F0", 0, 0, 0, forward, (0,)
        return "B0", cost.kept_bytes, 0, 0, backward - cost.kept_bytes, (1,)
    microbatches = steady_microbatches(num_ranks, _most_microbatches(run, world_size))
    virtual = parallel.stages_per_rank if parallel.schedule == "interleaved" else None
    peak = peak_of(rank_moments(parallel.schedule, num_ranks, microbatches, virtual, rank, MAX_UNFINISHED[device]),
                   costs)
    action = " & ".join(f"{kind}{chunk}" for kind, chunk in peak.moment.operations)
    return action, peak.kept, peak.deferred, peak.on_the_way, peak.working, peak.moment.kept


def _most_microbatches(run: RunConfig, world_size: int) -> int:
    """Of a step of the first phase, at the end of its ramp."""
    training = run.training
    batch = max([training.global_batch_size, *(phase.global_batch_size or 0 for phase in training.phases[:1])])
    return batch // (training.micro_batch_size * run.parallel.data_parallel_size(world_size))


def kept_by_name(rank: RankMemory) -> dict[str, int]:
    """What makes up a rank's activations at its peak, by name, largest first."""
    total: dict[str, int] = {}
    for count, kept in zip(rank.num_kept, rank.kept_by_chunk, strict=True):
        for name, size in kept.items():
            total[name] = total.get(name, 0) + count * size
    return dict(sorted(total.items(), key=lambda item: -item[1]))


__all__ = ["DEVICES", "PassSettings", "RankMemory", "estimate_memory", "kept_by_name"]
