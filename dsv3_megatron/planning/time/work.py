"""Operations of a stage as seconds on a machine: alone, and beside the all-to-all of another micro-batch."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import TypedDict

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.rank_state import has_final_norm
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.planning.machine.hardware import Hardware
from dsv3_megatron.planning.time.layer_operations import end_operations, layer_operations
from dsv3_megatron.planning.time.network import Network
from dsv3_megatron.planning.time.operations import (
    Collective,
    CoreAttention,
    LatentRing,
    Linears,
    Movement,
    Product,
    SequenceExchange,
    Shape,
    TokenExchange,
    WorkItem,
    WorkPart,
    layer_linears,
)


@dataclass(frozen=True)
class Work:
    """Seconds of some work on a rank.

    Attributes:
        products: Matrix products.
        attention: Core attention.
        movement: Element-wise kernels.
        idle: Time between kernels.
        tensor_parallel: All-gathers and reduce-scatters that compute waits for.
        context_parallel: Messages among the ranks that share a sequence, as far as compute waits for them.
        exchange: All-to-all, if nothing else ran.
    """

    products: float = 0.0
    attention: float = 0.0
    movement: float = 0.0
    idle: float = 0.0
    tensor_parallel: float = 0.0
    exchange: float = 0.0
    context_parallel: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, self.movement + other.movement,
                    self.idle + other.idle, self.tensor_parallel + other.tensor_parallel,
                    self.exchange + other.exchange, self.context_parallel + other.context_parallel)

    def times(self, factor: float) -> Work:
        """Multiply all of the work by a factor."""
        return Work(*(value * factor for value in dataclasses.astuple(self)))

    @property
    def compute(self) -> float:
        """Seconds that the compute stream is busy or idle between kernels, without the all-to-all."""
        return (self.products + self.attention + self.movement + self.idle + self.tensor_parallel
                + self.context_parallel)

    @property
    def alone(self) -> float:
        """Seconds of all of the work, with the all-to-all waited for."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class StageWork:
    """F, I and W of a micro-batch on a stage: on the whole device, and on what communication leaves of it."""

    alone: Mapping[WorkPart, Work]
    shared: Mapping[WorkPart, Work]

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork({part: self.alone[part] + other.alone[part] for part in WorkPart},
                         {part: self.shared[part] + other.shared[part] for part in WorkPart})

    def times(self, factor: float) -> StageWork:
        """Multiply all of the stage's work by a factor."""
        return StageWork({part: work.times(factor) for part, work in self.alone.items()},
                         {part: work.times(factor) for part, work in self.shared.items()})

    @property
    def has_exchange(self) -> bool:
        """Whether tokens go to other ranks."""
        return any(work.exchange for work in self.alone.values())

    def pair(self, backward: StageWork) -> tuple[float, float]:
        """Seconds of this stage's forward and another's backward at once, and of their all-to-all."""
        shared = (self.shared[WorkPart.FORWARD] + backward.shared[WorkPart.INPUT] + backward.shared[WorkPart.WEIGHT])
        unhindered = (self.alone[WorkPart.FORWARD] + backward.alone[WorkPart.INPUT] + backward.alone[WorkPart.WEIGHT])
        compute = shared.compute if shared.exchange else unhindered.compute
        return max(compute, shared.exchange), shared.exchange


class MemoryTerms(TypedDict):
    """Arguments of an estimate of memory."""

    device: str
    imbalance: float


@dataclass(frozen=True)
class Setting:
    """A machine as a run uses it.

    Attributes:
        hardware: The machine.
        num_devices: Devices, or processes on a CPU.
        imbalance: Rows of the busiest expert-parallel rank over the mean; None: see `Imbalance`.
        headroom_bytes: Memory of each device that the run's tensors cannot have; None: see `headroom.Headroom`.
    """

    hardware: Hardware
    num_devices: int
    imbalance: float | None = None
    headroom_bytes: float | None = None

    @property
    def overlaps_pairs(self) -> bool:
        """Whether all-to-alls run beside compute: on a CPU they take its cores."""
        return not self.hardware.is_cpu

    def precision(self, run: RunConfig) -> str:
        """Say in which precision, "bf16" or "fp32", the machine trains a run."""
        return run.training.precision_on(is_cpu=self.hardware.is_cpu)

    def memory_terms(self, run: RunConfig) -> MemoryTerms:
        """What `memory.estimate_memory` wants to know of it.

        Rows that a rank holds are those of many layers and micro-batches, so that the imbalance is that of a pair.
        """
        return {"device": "cpu" if self.hardware.is_cpu else "cuda", "imbalance": Imbalance.of(run, self).pair}


def _work(operations: Iterable[WorkItem], setting: Setting, network: Network, model: ModelConfig, sm_share: float
          ) -> dict[WorkPart, Work]:
    """Seconds of operations, by part."""
    hardware = setting.hardware
    idle_share = 1 / hardware["stream_busy_share"] - 1
    overhead = hardware["operation_overhead"] if hardware.has("operation_overhead") else 0.0
    sums = {part: [0.0] * 7 for part in WorkPart}  # in the order of Work's fields
    for operation in operations:
        own = sums[operation.part]
        if isinstance(operation, TokenExchange):
            own[5] += network.exchange_seconds(model, operation.tokens, operation.row_bytes, operation.carried)
            continue
        if isinstance(operation, Collective):
            own[4] += network.tensor_parallel_seconds(operation.num_bytes)
            continue
        if isinstance(operation, SequenceExchange):
            own[6] += network.sequence_exchange_seconds(operation.num_bytes)
            continue
        if isinstance(operation, LatentRing):
            beside = sum(_kernel_seconds(each, hardware, sm_share)[1] for each in operation.beside)
            message = network.ring_step_seconds(operation.num_bytes)
            own[6] += max(0.0, operation.steps * message - beside)
            continue
        place, seconds = _kernel_seconds(operation, hardware, sm_share)
        own[place] += seconds
        own[3] += seconds * idle_share + overhead
    return {part: Work(*values) for part, values in sums.items()}


def _kernel_seconds(operation: Product | CoreAttention | Movement, hardware: Hardware, sm_share: float
                    ) -> tuple[int, float]:
    """The place of a kernel among Work's fields, and its seconds."""
    if isinstance(operation, Product):
        return 0, hardware.product_seconds(
            operation.kind, operation.purpose, groups=operation.groups, rows=max(1, round(operation.rows)),
            columns=operation.columns, inner=max(1, round(operation.inner)), sm_share=sm_share)
    if isinstance(operation, CoreAttention):
        seconds = hardware.attention_seconds(
            operation.computed_flops, is_backward=operation.is_backward, seq_length=operation.seq_length,
            sm_share=sm_share)
        share = f"block_{'backward' if operation.is_backward else 'forward'}_share"
        return 1, seconds / hardware[share] if operation.of_blocks and hardware.has(share) else seconds
    return 2, hardware.movement_seconds(operation.kind, operation.num_bytes)


def sm_share_beside_communication(parallel: ParallelConfig, hardware: Hardware) -> float:
    """Part of the multiprocessors that computes while ranks communicate.

    What the run sets holds. Where it leaves the number open, the machine's figure does; on the GPUs that the default is
    made for they are equal.
    """
    if hardware.is_cpu:
        return 1.0
    is_open = parallel.num_communication_sms is None and parallel.has_messages_beside_computation
    count = parallel.communication_sms
    if is_open:
        count = int(hardware.for_dispatcher("communication_sms", parallel.moe_token_dispatcher_type))
    return 1 - count / hardware["num_sms"]


def _stage_work(alone: tuple[WorkItem, ...], shared: tuple[WorkItem, ...], setting: Setting, network: Network,
                model: ModelConfig, sm_share: float) -> StageWork:
    return StageWork(_work(alone, setting, network, model, 1.0), _work(shared, setting, network, model, sm_share))


@lru_cache(maxsize=4096)
def _layer_work(model: ModelConfig, linears: Linears, alone: Shape, shared: Shape, setting: Setting, network: Network,
                sm_share: float) -> StageWork:
    return _stage_work(layer_operations(model, linears, alone), layer_operations(model, linears, shared), setting,
                       network, model, sm_share)


@dataclass(frozen=True)
class Imbalance:
    """Routed rows of the busiest expert-parallel rank over the mean.

    Attributes:
        layer: Imbalance in one layer: a single pass waits for that rank at every all-to-all.
        pair: Imbalance over all layers of a pair, whose compute goes on meanwhile: it waits at the end.
    """

    layer: float
    pair: float

    @classmethod
    def of(cls, run: RunConfig, setting: Setting) -> Imbalance:
        """The expected maximum over the ranks, with the machine's deviation; or what the setting says."""
        ranks = run.parallel.expert_model_parallel_size
        if setting.imbalance is not None:
            return cls(setting.imbalance, setting.imbalance)
        deviation = setting.hardware["routed_rows_deviation"]
        if ranks == 1 or not deviation:
            return cls(1.0, 1.0)
        # Blom's approximation of the largest of n normal values.
        largest = NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
        passes = max(1.0, 2 * run.model.num_moe_layers / run.parallel.num_stages)
        return cls(1 + largest * deviation, 1 + largest * deviation / math.sqrt(passes))


class WorkTable:
    """Work of stages of one run on one machine; equal layers are judged once.

    Args:
        run: Model, split, batch, precision, recomputation.
        setting: The machine.
        splits_backward: Whether weight gradients wait; None: as the run's schedule has it.
    """

    def __init__(self, run: RunConfig, setting: Setting, *, splits_backward: bool | None = None) -> None:
        self.run, self.setting = run, setting
        imbalance = Imbalance.of(run, setting)
        self.shape = Shape.of(run, is_cpu=setting.hardware.is_cpu, imbalance=imbalance.layer)
        if splits_backward is not None:
            self.shape = dataclasses.replace(self.shape, splits_backward=splits_backward)
        self.shared_shape = dataclasses.replace(self.shape, imbalance=imbalance.pair)
        self.sm_share = sm_share_beside_communication(run.parallel, setting.hardware)
        self.network = Network(run.parallel, setting.hardware, setting.num_devices)
        # What a layer exchanges does not depend on the pipeline.
        split = ParallelConfig(tensor_model_parallel_size=self.shape.tp, expert_model_parallel_size=self.shape.ep,
                               expert_tensor_parallel_size=self.shape.etp, context_parallel_size=self.shape.cp,
                               moe_token_dispatcher_type=run.parallel.moe_token_dispatcher_type,
                               ranks_per_node=run.parallel.ranks_per_node)
        # Devices of a domain stand for those of the run, so that runs of other sizes share what is known of a layer.
        self._layer_network = dataclasses.replace(self.network, parallel=split, num_devices=self.network.node)
        linears = layer_linears(run)
        self.linears = [linears[f"decoder.layers.{index}"] for index in range(run.model.num_layers)]
        self._layers: dict[int, StageWork] = {}

    def layer(self, index: int) -> StageWork:
        """The work of one transformer layer, by its global id."""
        linears = self.linears[index]
        if id(linears) not in self._layers:
            self._layers[id(linears)] = _layer_work(self.run.model, linears, self.shape, self.shared_shape,
                                                    self.setting, self._layer_network, self.sm_share)
        return self._layers[id(linears)]

    def end(self, stage: StageLayout) -> StageWork:
        """The work of what a stage has beside its transformer layers."""
        alone, shared = (end_operations(self.run, stage, shape) for shape in (self.shape, self.shared_shape))
        return _stage_work(alone, shared, self.setting, self._layer_network, self.run.model, self.sm_share)

    def stage(self, stage: StageLayout) -> StageWork:
        """The work of a pipeline stage."""
        work = self.end(stage)
        first = {id(self.linears[index]): index for index in stage.layer_ids}
        for linears, count in Counter(id(self.linears[index]) for index in stage.layer_ids).items():
            work = work + self.layer(first[linears]).times(count)
        return work

    def stages(self) -> list[StageWork]:
        """The work of all stages; equal ones are one object."""
        found: dict[object, StageWork] = {}
        works = []
        for stage in stage_layouts(self.run.model, self.run.parallel):
            key = (*(id(self.linears[index]) for index in stage.layer_ids), *end_key(self.run.model, stage))
            if key not in found:
                found[key] = self.stage(stage)
            works.append(found[key])
        return works


def end_key(model: ModelConfig, stage: StageLayout) -> tuple[object, ...]:
    """What decides about a stage's ends."""
    return stage.has_embedding, stage.mtp_layer_ids, has_final_norm(model, stage), stage.has_loss
