"""What the passes of a step hide of its gradients' reduction and of its weights' gathering, and what is waited for.

As `model/stage/buckets.py` has it: a message for each layer, and for what is before and behind the layers. A rank's
messages go one after the other. A reduction begins where the last pass back on its stage has come to its place; what
is not over when the last rank's passes are counts. Weights are gathered from the step's beginning on; a first pass
forward waits at each place for its weights, and all ranks are taken to wait as long as the one that waits longest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.parameters import EXPERT, REPLICATED, TENSOR, stage_components, weight_bytes_per_parameter
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.planning.time.network import Network
from dsv3_megatron.planning.time.operations import WorkPart
from dsv3_megatron.planning.time.work import Setting, StageWork, WorkTable
from dsv3_megatron.schedule.actions import Kind
from dsv3_megatron.schedule.timeline import Span, Timeline

_GRADIENT_BYTES = 4


class TimedPlace(NamedTuple):
    """A part of a stage whose gradients are one message, and its weights.

    Attributes:
        forward: Seconds of a micro-batch's forward pass through it.
        backward: Seconds of its backward pass; of the weight gradients alone where these are passes of their own.
        reduction: Seconds of its gradients' reduction.
        gathering: Seconds of its weights' gathering.
    """

    forward: float
    backward: float
    reduction: float
    gathering: float


class Exposed(NamedTuple):
    """Seconds that nothing hides, on the rank with most of them."""

    reduction: float
    gathering: float


def exposed_messages(run: RunConfig, setting: Setting, table: WorkTable, timeline: Timeline | None) -> Exposed:
    """Find what of a step's messages its passes do not hide.

    Args:
        run: A run of one phase.
        setting: The machine; on a CPU messages take the cores that compute.
        table: Work of the run's stages on it.
        timeline: Times of all actions of a step; None without a pipeline.
    """
    parallel = run.parallel
    weight_bytes = weight_bytes_per_parameter(setting.precision(run))
    stages = [_places(run, setting, table, stage, weight_bytes) for stage in stage_layouts(run.model, parallel)]
    hides = not setting.hardware.is_cpu
    exposed = []
    for rank, held in enumerate(placement(parallel)):
        chunks = [stages[place.stage] for place in held]
        if timeline is None:
            forward, backward = (sum(place[part] for place in chunks[0]) for part in (0, 1))
            first, last, end = [0.0], [(forward, forward + backward)], forward + backward
        else:
            end = max(float(spans[-1].end) for spans in timeline)
            first = [_first_forward(timeline[rank], chunk) for chunk in range(len(chunks))]
            last = [_last_backward(timeline[rank], chunk) for chunk in range(len(chunks))]
        everything = [place for chunk in chunks for place in chunk]
        exposed.append(Exposed(
            _waited_for_reductions(chunks, last, end) if hides and parallel.overlap_grad_reduce
            else sum(place.reduction for place in everything),
            _waited_for_weights(chunks, first) if hides and parallel.overlap_param_gather
            else sum(place.gathering for place in everything)))
    return Exposed(max(one.reduction for one in exposed), max(one.gathering for one in exposed))


def _waited_for_reductions(chunks: Sequence[Sequence[TimedPlace]], last: Sequence[tuple[float, float]], end: float
                           ) -> float:
    ready: list[tuple[float, float]] = []
    for places, (begins, ends) in zip(chunks, last, strict=True):
        total = sum(place.backward for place in places)
        done = 0.0
        for place in reversed(places):
            done += place.backward
            ready.append((begins + (ends - begins) * (done / total if total else 1.0), place.reduction))
    clock = 0.0
    for begins, seconds in sorted(ready, key=lambda message: message[0]):
        clock = max(clock, begins) + seconds
    return max(0.0, clock - end)


def _waited_for_weights(chunks: Sequence[Sequence[TimedPlace]], first: Sequence[float]) -> float:
    gathered = waited = 0.0
    for places, clock in zip(chunks, first, strict=True):
        for place in places:
            gathered += place.gathering
            waited = max(waited, gathered - clock)
            clock += place.forward
    return waited


def _first_forward(spans: Sequence[Span], chunk: int) -> float:
    return next(float(span.start) for span in spans for operation in span.action.operations
                if operation.chunk == chunk and operation.kind is Kind.FORWARD)


def _last_backward(spans: Sequence[Span], chunk: int) -> tuple[float, float]:
    return next((float(span.start), float(span.end)) for span in reversed(spans) for operation in span.action.operations
                if operation.chunk == chunk and operation.kind in (Kind.BACKWARD, Kind.BACKWARD_WEIGHT))


def _places(run: RunConfig, setting: Setting, table: WorkTable, stage: StageLayout, weight_bytes: int
            ) -> list[TimedPlace]:
    """The places of a stage, in the order of a forward pass."""
    network = Network(run.parallel, setting.hardware, setting.num_devices)
    nothing = dataclasses.replace(stage, layer_ids=(), has_embedding=False, mtp_layer_ids=(), has_loss=False)
    parts: list[tuple[StageLayout, StageWork | None]] = []
    if stage.has_embedding:
        parts.append((dataclasses.replace(nothing, has_embedding=True), None))
    # A norm behind the last layer is left with it.
    parts += [(dataclasses.replace(nothing, layer_ids=(layer,)), table.layer(layer)) for layer in stage.layer_ids]
    if stage.mtp_layer_ids or stage.has_loss:
        rest = dataclasses.replace(nothing, mtp_layer_ids=stage.mtp_layer_ids, has_loss=stage.has_loss)
        parts.append((rest, table.end(rest)))
    places = []
    for layout, work in parts:
        dense, experts = _parameters(run.model, run.parallel.tensor_model_parallel_size,
                                     run.parallel.expert_model_parallel_size
                                     * run.parallel.expert_tensor_parallel_size, dataclasses.replace(layout, stage=0))
        reduction, gathering = (network.reduction_seconds(size * dense, size * experts)
                                for size in (_GRADIENT_BYTES, weight_bytes))
        places.append(TimedPlace(_seconds(work, (WorkPart.FORWARD,)), _seconds(work, (WorkPart.INPUT, WorkPart.WEIGHT)),
                            reduction, gathering))
    return places


def _seconds(work: StageWork | None, parts: Iterable[WorkPart]) -> float:
    return sum(work.alone[part].alone for part in parts) if work else 0.0


@lru_cache(maxsize=4096)
def _parameters(model: ModelConfig, tensor_ranks: int, expert_shards: int, layout: StageLayout) -> tuple[int, int]:
    """A rank's dense parameters, and its experts'."""
    sizes = {REPLICATED: 0, TENSOR: 0, EXPERT: 0}
    for component in stage_components(model, layout):
        sizes[component.sharding] += component.total
    return sizes[REPLICATED] + sizes[TENSOR] // tensor_ranks, sizes[EXPERT] // expert_shards
