"""Memory of each pipeline rank at the moment of a training step when it is most, component by component.

Usage:
    ranks = estimate_memory(run, world_size=2048)
    worst = max(ranks, key=lambda rank: rank.peak_bytes)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.pipeline import SPLIT_BACKWARD
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.rank_state import rank_states, stages_of
from dsv3_megatron.parallel.layout import StageLayout
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.planning.memory.buffers import buffer_bytes, fp8_weight_bytes
from dsv3_megatron.planning.memory.ledger import run_turns
from dsv3_megatron.planning.memory.moments import MAX_UNFINISHED, peak_of, rank_moments, steady_microbatches
from dsv3_megatron.planning.memory.settings import ModelPrecisions, PassSettings, model_precisions, pass_settings
from dsv3_megatron.planning.memory.stage_cost import StageContent, StageCost, stage_cost
from dsv3_megatron.schedule.plan import PlanSizes

DEVICES = ("cuda", "cpu")


@dataclass(frozen=True)
class RankMemory:
    """One pipeline rank: bytes on the device at its peak, unless named host. Each tensor is in one component.

    All its tensor-, expert- and data-parallel ranks hold as much, if every expert gets as many tokens.

    Attributes:
        pipeline_rank: Number of the pipeline rank.
        stages: The stages that it holds, by chunk.
        layer_ids: Global ids of those stages' transformer layers.
        num_parameters: Elements of its weights.
        parameter_bytes: Weights in the run's precision.
        gradient_bytes: fp32 main gradients.
        optimizer_bytes: Master weights and moments, with the scratch that narrow moments need.
        activation_bytes: What forward passes have kept for backward, of all micro-batches under way.
        deferred_bytes: What waits for the weight part of a backward pass that is split.
        working_bytes: What lives during the one pass that is at its peak, beside what was there when it began.
        communication_bytes: Tensors on their way between pipeline ranks.
        buffer_bytes: Small things that are always there: routers' biases and counts, rotary tables.
        fp8_weight_bytes: Weights in FP8, during a step beside the run's own.
        host_bytes: The average of the weights, in CPU memory.
        peak_action: What runs at the peak, such as "F0" or "F1 & B0": forward, backward, its input and weight parts
            (I, W), and the chunk; "step" is the optimizer's.
        num_kept: Micro-batches that each chunk keeps when that begins.
        kept_by_chunk: What is kept of one micro-batch, in bytes by name, for each chunk.
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
    fp8_weight_bytes: int
    host_bytes: int
    peak_action: str = ""
    num_kept: tuple[int, ...] = ()
    kept_by_chunk: tuple[dict[str, int], ...] = field(default=(), repr=False)

    @property
    def state_bytes(self) -> int:
        """Bytes that are held between steps."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.buffer_bytes

    @property
    def peak_bytes(self) -> int:
        """The most that is held at once on the device."""
        return (self.state_bytes + self.activation_bytes + self.deferred_bytes + self.working_bytes
                + self.communication_bytes + self.fp8_weight_bytes)


def estimate_memory(run: RunConfig, world_size: int | None = None, *, device: str = "cuda",
                    is_wide_product: bool = False, imbalance: float = 1.0) -> tuple[RankMemory, ...]:
    """Memory of a training step, by pipeline rank.

    Args:
        run: A valid run; of one with phases, `run.in_phase(phase)` for another phase than the first.
        world_size: Processes; None: the fewest that the layout runs on.
        device: "cuda" or "cpu": which operations the modules choose.
        is_wide_product: The CPU has no bf16 matrix units: products of bf16 operands are computed on fp32 copies.
        imbalance: Rows that a rank's experts get, as a multiple of the mean over ranks; 1 is balance.

    Raises:
        ValueError: another device.
    """
    if device not in DEVICES:
        raise ValueError(f"device={device!r} of a memory estimate must be one of {', '.join(DEVICES)}")
    size = run.parallel.minimum_world_size if world_size is None else world_size
    precision = run.training.precision_on(is_cpu=device == "cpu")
    settings = pass_settings(run, device=device, precision=precision, is_wide_product=is_wide_product,
                             imbalance=imbalance)
    num_microbatches = _most_microbatches(run, size)
    states = rank_states(run, size, precision=precision)
    ranks = []
    for rank, (stages, contents) in enumerate(_held(run.model, run.parallel, model_precisions(run.fp8, run.model))):
        state = states[rank]
        passes = _passes(settings, contents, run.parallel, num_microbatches, rank)
        if device == "cpu" and passes.total < state.step_bytes:
            passes = _Passes("step", 0, 0, 0, state.step_bytes, (0,) * len(stages))
        ranks.append(RankMemory(
            pipeline_rank=rank, stages=tuple(stage.stage for stage in stages),
            layer_ids=tuple(layer for stage in stages for layer in stage.layer_ids),
            num_parameters=state.parameters, parameter_bytes=state.parameter_bytes,
            gradient_bytes=state.gradient_bytes,
            optimizer_bytes=state.optimizer_bytes,
            activation_bytes=passes.kept, deferred_bytes=passes.deferred, communication_bytes=passes.on_the_way,
            working_bytes=passes.working, buffer_bytes=buffer_bytes(settings, contents),
            fp8_weight_bytes=fp8_weight_bytes(run.fp8, run.model, run.parallel, stages, device=device),
            host_bytes=state.average_bytes, peak_action=passes.action, num_kept=passes.num_kept,
            kept_by_chunk=tuple(cost.kept for cost in _costs(settings, contents, run.parallel))))
    return tuple(ranks)


class _Passes(NamedTuple):
    """A rank's peak: what runs, bytes by kind, and the micro-batches that each chunk keeps."""

    action: str
    kept: int
    deferred: int
    on_the_way: int
    working: int
    num_kept: tuple[int, ...]

    @property
    def total(self) -> int:
        return self.kept + self.deferred + self.on_the_way + self.working


@functools.lru_cache(maxsize=4096)
def _held(model: ModelConfig, parallel: ParallelConfig, precisions: ModelPrecisions
          ) -> tuple[tuple[tuple[StageLayout, ...], tuple[StageContent, ...]], ...]:
    """Contents by pipeline rank: its stages, and what they are made of."""
    layouts = stages_of(model, parallel)
    held = [tuple(layouts[place.stage] for place in places) for places in placement(parallel)]
    return tuple((stages, tuple(StageContent.of(model, stage, precisions) for stage in stages)) for stages in held)


@functools.lru_cache(maxsize=16384)
def _passes(settings: PassSettings, contents: tuple[StageContent, ...], parallel: ParallelConfig, num_microbatches: int,
            rank: int) -> _Passes:
    """Passes of a rank with these stages, by the schedule."""
    costs = _costs(settings, contents, parallel)
    num_ranks = parallel.pipeline_model_parallel_size
    if num_ranks == 1:
        (cost,) = costs
        forward, backward = run_turns(cost.forward).peak, cost.kept_bytes + run_turns(cost.backward).peak
        if forward > backward:
            return _Passes("F0", 0, 0, 0, forward, (0,))
        return _Passes("B0", cost.kept_bytes, 0, 0, backward - cost.kept_bytes, (1,))
    sizes = PlanSizes.of_run(parallel, steady_microbatches(num_ranks, num_microbatches))
    last_length = max(max(content.num_depths, content.num_depths_given) for content in contents)
    peak = peak_of(rank_moments(sizes, rank, MAX_UNFINISHED[settings.device], last_length), costs)
    action = " & ".join(f"{kind}{chunk}" for kind, chunk in peak.moment.operations)
    return _Passes(action, peak.kept, peak.deferred, peak.on_the_way, peak.working, peak.moment.kept)


def _costs(settings: PassSettings, contents: tuple[StageContent, ...], parallel: ParallelConfig
           ) -> tuple[StageCost, ...]:
    is_split = settings.is_piped and parallel.schedule in SPLIT_BACKWARD
    return tuple(stage_cost(settings, content, is_split=is_split) for content in contents)


def _most_microbatches(run: RunConfig, world_size: int) -> int:
    """Count the micro-batches of a step of the first phase, at the end of its ramp."""
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

