"""How long a training step takes: each stage's work on a machine, the schedule with it, what follows the pipeline.

    operations of a stage -> seconds of F, I and W, of its all-to-all -> schedule/simulate.py -> pipeline
    + gradients' reduction + optimizer + weights' gathering = the step

Compute that runs beside an all-to-all has the multiprocessors that communication leaves. Overlapped pairs hide their
all-to-alls as far as compute lasts; single passes wait for them. What a pair computes is what its two passes do alone,
on fewer multiprocessors.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import NormalDist

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.metrics.parameters import optimizer_bytes_per_parameter, rank_memory, weight_bytes_per_parameter
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.planning.hardware import Hardware
from dsv3_megatron.planning.memory_state import has_final_norm
from dsv3_megatron.planning.network import Network
from dsv3_megatron.planning.operations import (
    Attention,
    Collective,
    Exchange,
    Linears,
    Operation,
    Part,
    Product,
    Shape,
    end_operations,
    expected_destinations,
    layer_linears,
    layer_operations,
)
from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.plan import Plan, build_plan
from dsv3_megatron.schedule.simulate import Costs, Simulation, StageCosts, simulate
from dsv3_megatron.schedule.timeline import Time, run_in_order

# Times of work that a schedule's rules want greater than nothing.
_LEAST_S = 1e-9


@dataclass(frozen=True)
class Work:
    """Seconds of some work on a rank.

    Attributes:
        products: Matrix products.
        attention: Core attention.
        movement: Element-wise kernels.
        idle: Between kernels.
        tensor_parallel: All-gathers and reduce-scatters that compute waits for.
        exchange: All-to-all, if nothing else ran.
    """

    products: float = 0.0
    attention: float = 0.0
    movement: float = 0.0
    idle: float = 0.0
    tensor_parallel: float = 0.0
    exchange: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.products + other.products, self.attention + other.attention, self.movement + other.movement,
                    self.idle + other.idle, self.tensor_parallel + other.tensor_parallel,
                    self.exchange + other.exchange)

    def times(self, factor: float) -> Work:
        """So many times as much."""
        return Work(*(value * factor for value in dataclasses.astuple(self)))

    @property
    def compute(self) -> float:
        """Everything that keeps the compute stream."""
        return self.products + self.attention + self.movement + self.idle + self.tensor_parallel

    @property
    def alone(self) -> float:
        """With the all-to-all waited for."""
        return self.compute + self.exchange


@dataclass(frozen=True)
class StageWork:
    """F, I and W of a micro-batch on a stage: on the whole device, and on what communication leaves of it."""

    alone: Mapping[Part, Work]
    shared: Mapping[Part, Work]

    def __add__(self, other: StageWork) -> StageWork:
        return StageWork({part: self.alone[part] + other.alone[part] for part in Part},
                         {part: self.shared[part] + other.shared[part] for part in Part})

    def times(self, factor: float) -> StageWork:
        """So many times as much."""
        return StageWork({part: work.times(factor) for part, work in self.alone.items()},
                         {part: work.times(factor) for part, work in self.shared.items()})

    def pair(self, backward: StageWork) -> tuple[float, float]:
        """Seconds of this stage's forward and another's backward at once, and of their all-to-all."""
        shared = (self.shared[Part.FORWARD] + backward.shared[Part.INPUT] + backward.shared[Part.WEIGHT])
        unhindered = (self.alone[Part.FORWARD] + backward.alone[Part.INPUT] + backward.alone[Part.WEIGHT])
        compute = shared.compute if shared.exchange else unhindered.compute
        return max(compute, shared.exchange), shared.exchange


@dataclass(frozen=True)
class Setting:
    """A machine as a run uses it.

    Attributes:
        hardware: The machine.
        num_devices: Devices, or processes on a CPU.
        sends_once_per_node: Tokens cross the network once for each node, and NVLink once for each rank, as DeepEP has
            them; else a row for each expert, as plain all-to-all does.
        imbalance: Rows of the busiest expert-parallel rank over the mean; None: see `Imbalance`.
    """

    hardware: Hardware
    num_devices: int
    sends_once_per_node: bool = True
    imbalance: float | None = None

    @property
    def overlaps_pairs(self) -> bool:
        """Whether all-to-alls run beside compute: on a CPU they take its cores."""
        return not self.hardware.is_cpu


def _work(operations: Iterable[Operation], setting: Setting, network: Network, model: ModelConfig, sm_share: float
          ) -> dict[Part, Work]:
    """Seconds of operations, by part."""
    hardware = setting.hardware
    idle_share = 1 / hardware["stream_busy_share"] - 1
    overhead = hardware["operation_overhead"] if hardware.has("operation_overhead") else 0.0
    sums = {part: [0.0] * 6 for part in Part}  # in the order of Work's fields
    for operation in operations:
        own = sums[operation.part]
        if isinstance(operation, Exchange):
            own[5] += network.exchange_seconds(model, operation.tokens, operation.row_bytes)
            continue
        if isinstance(operation, Collective):
            own[4] += network.tensor_parallel_seconds(operation.num_bytes)
            continue
        if isinstance(operation, Product):
            place, seconds = 0, hardware.product_seconds(
                operation.kind, operation.purpose, groups=operation.groups, rows=max(1, round(operation.rows)),
                columns=operation.columns, inner=max(1, round(operation.inner)), sm_share=sm_share)
        elif isinstance(operation, Attention):
            place, seconds = 1, hardware.attention_seconds(
                operation.computed_flops, is_backward=operation.is_backward, seq_length=operation.seq_length,
                sm_share=sm_share)
        else:
            place, seconds = 2, hardware.movement_seconds(operation.kind, operation.num_bytes)
        own[place] += seconds
        own[3] += seconds * idle_share + overhead
    return {part: Work(*values) for part, values in sums.items()}


def _stage_work(alone: tuple[Operation, ...], shared: tuple[Operation, ...], setting: Setting, network: Network,
                model: ModelConfig) -> StageWork:
    hardware = setting.hardware
    left = 1.0 if hardware.is_cpu else 1 - hardware["communication_sms"] / hardware["num_sms"]
    return StageWork(_work(alone, setting, network, model, 1.0), _work(shared, setting, network, model, left))


@lru_cache(maxsize=4096)
def _layer_work(model: ModelConfig, linears: Linears, alone: Shape, shared: Shape, setting: Setting, network: Network
                ) -> StageWork:
    return _stage_work(layer_operations(model, linears, alone), layer_operations(model, linears, shared), setting,
                       network, model)


@dataclass(frozen=True)
class Imbalance:
    """Routed rows of the busiest expert-parallel rank over the mean.

    Attributes:
        layer: In one layer: a single pass waits for that rank at every all-to-all.
        pair: Over all layers of a pair, whose compute goes on meanwhile: it waits at the end.
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
    """

    def __init__(self, run: RunConfig, setting: Setting) -> None:
        self.run, self.setting = run, setting
        imbalance = Imbalance.of(run, setting)
        self.shape = Shape.of(run, is_cpu=setting.hardware.is_cpu, imbalance=imbalance.layer)
        self.shared_shape = dataclasses.replace(self.shape, imbalance=imbalance.pair)
        self.network = Network(run.parallel, setting.hardware, setting.num_devices, setting.sends_once_per_node)
        # What a layer exchanges does not depend on the pipeline.
        split = ParallelConfig(tensor_model_parallel_size=self.shape.tp, expert_model_parallel_size=self.shape.ep,
                               expert_tensor_parallel_size=self.shape.etp)
        self._layer_network = dataclasses.replace(self.network, parallel=split, num_devices=0)
        linears = layer_linears(run)
        self.linears = [linears[f"decoder.layers.{index}"] for index in range(run.model.num_layers)]
        self._layers: dict[int, StageWork] = {}

    def layer(self, index: int) -> StageWork:
        """Of one transformer layer."""
        linears = self.linears[index]
        if id(linears) not in self._layers:
            self._layers[id(linears)] = _layer_work(self.run.model, linears, self.shape, self.shared_shape, self.setting,
                                                    self._layer_network)
        return self._layers[id(linears)]

    def end(self, stage: StageLayout) -> StageWork:
        """Of what a stage has beside its transformer layers."""
        return _stage_work(end_operations(self.run, stage, self.shape), end_operations(self.run, stage, self.shared_shape),
                           self.setting, self._layer_network, self.run.model)

    def stage(self, stage: StageLayout) -> StageWork:
        """Of a pipeline stage."""
        work = self.end(stage)
        first = {id(self.linears[index]): index for index in stage.layer_ids}
        for linears, count in Counter(id(self.linears[index]) for index in stage.layer_ids).items():
            work = work + self.layer(first[linears]).times(count)
        return work

    def stages(self) -> list[StageWork]:
        """Of all stages; equal ones are one object."""
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


@dataclass(frozen=True)
class UpdateTime:
    """Seconds at the end of a step, on the rank that takes longest.

    Attributes:
        gradient_reduction: Reduce-scatter of fp32 gradients, and the sum over copies of shared weights.
        optimizer: Norm, clipping and AdamW on the owned part, and zeroing the gradients.
        weight_gathering: All-gather of the weights.
    """

    gradient_reduction: float
    optimizer: float
    weight_gathering: float

    @property
    def total(self) -> float:
        """All of it: nothing of it is overlapped in this library."""
        return self.gradient_reduction + self.optimizer + self.weight_gathering


@dataclass(frozen=True)
class StepTime:
    """A training step, in seconds.

    Attributes:
        run: Of what; one phase of it.
        setting: On what.
        num_microbatches: Of one pipeline.
        pipeline: From the first forward to the last backward.
        bubble: Of that, what the busiest rank stands still.
        busy: Its work of all micro-batches; the exchange in it is what is waited for.
        hidden_exchange: All-to-all beside compute, on the busiest rank.
        exposed_transfer: Of the bubble, what transfers between pipeline ranks make of it.
        update: After the pipeline.
        simulation: Of the schedule; None without a pipeline.
    """

    run: RunConfig
    setting: Setting
    num_microbatches: int
    pipeline: float
    bubble: float
    busy: Work
    hidden_exchange: float
    exposed_transfer: float
    update: UpdateTime
    simulation: Simulation | None = field(repr=False, default=None)

    @property
    def seconds(self) -> float:
        """The step."""
        return self.pipeline + self.update.total

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.run.training.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        """Over all devices."""
        return self.tokens / self.seconds

    @property
    def gpu_hours_per_trillion_tokens(self) -> float:
        """Device-hours for 1e12 tokens at this speed."""
        return 1e12 / self.tokens_per_second * self.setting.num_devices / 3600

    def model_flops_per_second(self, *, is_causal: bool = True, with_mtp: bool = False) -> float:
        """FLOP/s of one device: the main model's, as published figures count; with MTP as a run's log does."""
        flops = flops_per_token(self.run.model, self.run.training.seq_length)
        per_token = flops.main if is_causal else flops.main_noncausal
        if with_mtp:
            per_token += flops.mtp if is_causal else flops.mtp_noncausal
        return per_token * self.tokens_per_second / self.setting.num_devices

    def mfu(self, *, is_causal: bool = True, with_mtp: bool = False) -> float:
        """That over the device's bf16 (on a CPU fp32) peak."""
        peak = self.setting.hardware.peak("fp32" if self.setting.hardware.is_cpu else "bf16")
        return self.model_flops_per_second(is_causal=is_causal, with_mtp=with_mtp) / peak

    def breakdown(self) -> dict[str, float]:
        """Seconds by what they go to, on the busiest rank; all but the hidden ones add up to the step."""
        return {
            "products": self.busy.products, "attention": self.busy.attention, "element_wise": self.busy.movement,
            "between_kernels": self.busy.idle, "tensor_parallel": self.busy.tensor_parallel,
            "exposed_all_to_all": self.busy.exchange, "exposed_p2p": self.exposed_transfer,
            "bubble": self.bubble - self.exposed_transfer, "gradient_reduction": self.update.gradient_reduction,
            "optimizer": self.update.optimizer, "weight_gathering": self.update.weight_gathering,
            "hidden_all_to_all": self.hidden_exchange,
        }


def update_time(run: RunConfig, setting: Setting) -> UpdateTime:
    """What follows the pipeline, on the rank with most to do."""
    training = run.training
    if setting.hardware.is_cpu and training.precision == "auto":
        training = dataclasses.replace(training, precision="fp32")
    return _update_time(run.model, run.parallel, weight_bytes_per_parameter(training.precision),
                        optimizer_bytes_per_parameter(training), setting)


@lru_cache(maxsize=4096)
def _dense_and_experts(model: ModelConfig, parallel: ParallelConfig, num_devices: int) -> tuple[tuple[int, int], ...]:
    """Parameters of each pipeline rank."""
    run = dataclasses.replace(preset("tiny"), model=model, parallel=parallel)
    return tuple((rank.dense_parameters, rank.expert_parameters)
                 for rank in rank_memory(run, num_devices, stage_layouts(model, parallel)))


@lru_cache(maxsize=4096)
def _update_time(model: ModelConfig, parallel: ParallelConfig, weight_bytes: int, state_bytes: int, setting: Setting
                 ) -> UpdateTime:
    hardware, num_devices = setting.hardware, setting.num_devices
    network = Network(parallel, hardware, num_devices, setting.sends_once_per_node)
    copies = parallel.num_model_copies
    times = []
    for dense, experts in _dense_and_experts(model, parallel, num_devices):
        owned = (dense / (parallel.data_parallel_size(num_devices) * copies)
                 + experts / (parallel.expert_data_parallel_size(num_devices) * copies))
        # Read: gradient, moments and master weight; written: the latter two, and the weight if it is another.
        master = 4 if weight_bytes == 4 else 0
        adamw = owned * (4 + 2 * (state_bytes + master) + (0 if master else weight_bytes))
        # All gradients are set to zero and divided by the tokens: three passes; the norm takes the owned ones.
        gradients = 4 * (3 * (dense + experts) + owned)
        times.append(UpdateTime(
            gradient_reduction=network.reduction_seconds(4 * dense, 4 * experts),
            optimizer=hardware.movement_seconds("optimizer", adamw + gradients),
            weight_gathering=network.reduction_seconds(weight_bytes * dense, weight_bytes * experts)))
    return max(times, key=lambda time: time.total)


@lru_cache(maxsize=512)
def plan_of(schedule: str, num_ranks: int, num_microbatches: int, virtual_stages: int | None) -> Plan:
    """A schedule's plan; those of a search recur."""
    return build_plan(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=virtual_stages)


def stage_costs(works: list[StageWork], *, overlaps: bool, p2p: float) -> Costs:
    """Costs for the simulator. Pairs of stages that meet in a plan are judged one by one."""
    stages = []
    for work in works:
        forward, inputs, weight = (work.alone[part] for part in Part)
        weight_s = max(weight.alone, _LEAST_S)
        stages.append(StageCosts(
            forward=max(forward.alone, _LEAST_S), backward=max(inputs.alone, _LEAST_S) + weight_s, weight=weight_s))
    pairs: dict[tuple[int, int], float] = {}
    known: dict[tuple[int, int], float] = {}
    for first, forward_work in enumerate(works):
        for second, backward_work in enumerate(works):
            key = (id(forward_work), id(backward_work))
            if key not in known:
                one_after_the_other = stages[first].forward + stages[second].backward
                longest = max(stages[first].forward, stages[second].backward)
                seconds = forward_work.pair(backward_work)[0] if overlaps else one_after_the_other
                # On fewer multiprocessors a pair may take longer than its passes alone; a run would not pair then.
                known[key] = min(max(seconds, longest), one_after_the_other)
            pairs[first, second] = known[key]
    return Costs(tuple(stages), pairs, p2p)


def step_time(run: RunConfig, setting: Setting, *, with_transfers: bool = True) -> StepTime:
    """Predict a step of a run without phases, or of one phase of a run.

    Args:
        run: As of `run_cost.only_phase`; valid on as many devices.
        setting: The machine.
        with_transfers: Also find what transfers between pipeline ranks cost, which takes a second simulation.
    """
    parallel = run.parallel
    table = WorkTable(run, setting)
    works = table.stages()
    microbatches = run.training.num_microbatches(parallel.data_parallel_size(setting.num_devices))
    update = update_time(run, setting)
    if parallel.pipeline_model_parallel_size == 1:
        work = sum((works[0].alone[part] for part in Part), Work()).times(microbatches)
        return StepTime(run, setting, microbatches, work.alone, 0.0, work, 0.0, 0.0, update)
    plan, costs = _plan_and_costs(run, setting, table, works, microbatches)
    simulation = simulate(plan, costs)
    busiest = min(range(plan.num_ranks), key=lambda rank: simulation.bubble[rank])
    busy, hidden = _busy(plan, busiest, works, costs, overlaps=setting.overlaps_pairs)
    pipeline, bubble, transfer = float(simulation.step_time), float(simulation.bubble[busiest]), 0.0
    if with_transfers:
        transfer = pipeline - pipeline_seconds(plan, dataclasses.replace(costs, p2p=0))
    return StepTime(run, setting, microbatches, pipeline, bubble, busy, hidden, min(transfer, bubble), update,
                    simulation)


def step_seconds(run: RunConfig, setting: Setting) -> float:
    """The same as `step_time(...).seconds` and nothing else, in less time."""
    table = WorkTable(run, setting)
    works = table.stages()
    microbatches = run.training.num_microbatches(run.parallel.data_parallel_size(setting.num_devices))
    update = update_time(run, setting).total
    if run.parallel.pipeline_model_parallel_size == 1:
        return microbatches * sum(one.alone for one in works[0].alone.values()) + update
    return pipeline_seconds(*_plan_and_costs(run, setting, table, works, microbatches)) + update


def _plan_and_costs(run: RunConfig, setting: Setting, table: WorkTable, works: list[StageWork], microbatches: int
                    ) -> tuple[Plan, Costs]:
    parallel = run.parallel
    plan = plan_of(parallel.schedule, parallel.pipeline_model_parallel_size, microbatches,
                   parallel.stages_per_rank if parallel.schedule == "interleaved" else None)
    p2p = table.network.p2p_seconds(table.shape.local_tokens * run.model.hidden_size * table.shape.value_bytes)
    return plan, stage_costs(works, overlaps=setting.overlaps_pairs, p2p=p2p)


def pipeline_seconds(plan: Plan, costs: Costs) -> float:
    """When the last rank is done, by the simulator's own clock."""
    known: dict[tuple[object, ...], Time] = {}

    def duration(rank: int, action: Action) -> Time:
        key = (rank, *(part for operation in action.operations for part in operation[:2]))
        if key not in known:
            known[key] = costs.duration(plan, rank, action)
        return known[key]

    return float(max(spans[-1].end for spans in run_in_order(plan, duration, costs.p2p)))


def _busy(plan: Plan, rank: int, works: list[StageWork], costs: Costs, *, overlaps: bool) -> tuple[Work, float]:
    """What a rank does in a step, and what of its all-to-all is hidden."""
    counts: dict[tuple[tuple[Kind, int], ...], int] = {}
    for action in plan.actions[rank]:
        key = tuple((operation.kind, plan.placement[rank][operation.chunk].stage) for operation in action.operations)
        counts[key] = counts.get(key, 0) + 1
    busy, hidden = Work(), 0.0
    for key, count in counts.items():
        if len(key) == 2 and overlaps:
            assert isinstance(costs.overlapped, Mapping)
            (_, first), (_, second) = key
            exchange = works[first].pair(works[second])[1]
            source = "shared" if exchange else "alone"
            parts = [getattr(works[first], source)[Part.FORWARD], getattr(works[second], source)[Part.INPUT],
                     getattr(works[second], source)[Part.WEIGHT]]
            total = sum(parts, Work())
            exposed = max(0.0, float(costs.overlapped[first, second]) - total.compute)
            busy += dataclasses.replace(total, exchange=exposed).times(count)
            hidden += (exchange - exposed) * count
            continue
        for kind, stage in key:
            alone = works[stage].alone
            for part in _PARTS[kind]:
                busy += alone[part].times(count)
    return busy, hidden


_PARTS = {Kind.FORWARD: (Part.FORWARD,), Kind.BACKWARD_INPUT: (Part.INPUT,), Kind.BACKWARD_WEIGHT: (Part.WEIGHT,),
          Kind.BACKWARD: (Part.INPUT, Part.WEIGHT)}
