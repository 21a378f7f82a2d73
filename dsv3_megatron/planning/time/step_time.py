"""How long a training step takes: each stage's work on a machine, the schedule with it, what follows the pipeline.

    operations of a stage -> seconds of F, I and W, of its all-to-all -> schedule/simulate.py -> pipeline
    + what passes do not hide of gradients' reduction and weights' gathering + optimizer = the step

Compute that runs beside an all-to-all has the multiprocessors that communication leaves. Overlapped pairs hide their
all-to-alls as far as compute lasts; single passes wait for them. What a pair computes is what its two passes do alone,
on fewer multiprocessors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.flops import flops_per_token
from dsv3_megatron.metrics.parameters import optimizer_bytes_per_parameter, rank_parameters, weight_bytes_per_parameter
from dsv3_megatron.metrics.rank_state import stages_of
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.time.network import Network
from dsv3_megatron.planning.time.operations import WorkPart
from dsv3_megatron.planning.time.under_passes import Exposed, exposed_messages
from dsv3_megatron.planning.time.work import Setting, StageWork, Work, WorkTable
from dsv3_megatron.schedule.actions import Action, Kind
from dsv3_megatron.schedule.plan import Plan, PlanSizes, known_plan
from dsv3_megatron.schedule.simulate import Costs, Simulation, StageCosts, simulate
from dsv3_megatron.schedule.timeline import Time, Timeline, run_in_order

# Times of work that a schedule's rules want greater than nothing.
_LEAST_S = 1e-9


@dataclass(frozen=True)
class UpdateTime:
    """Seconds at the end of a step, on the rank that takes longest.

    Attributes:
        gradient_reduction: Reduce-scatter of fp32 gradients, and the sum over copies of shared weights.
        optimizer: Norm, clipping and AdamW on the owned part, and zeroing the gradients.
        weight_gathering: All-gather of the weights.
        hidden: What passes hide of the reduction and the gathering, and is in neither of them.
    """

    gradient_reduction: float
    optimizer: float
    weight_gathering: float
    hidden: float = 0.0

    @property
    def total(self) -> float:
        """Seconds of all parts that are waited for."""
        return self.gradient_reduction + self.optimizer + self.weight_gathering

    def waiting_for(self, exposed: Exposed) -> UpdateTime:
        """Make the update of a step that waits for so much of its messages."""
        reduction = min(self.gradient_reduction, exposed.reduction)
        gathering = min(self.weight_gathering, exposed.gathering)
        hidden = (self.gradient_reduction - reduction) + (self.weight_gathering - gathering)
        return UpdateTime(reduction, self.optimizer, gathering, hidden)


@dataclass(frozen=True)
class StepTime:
    """A training step, in seconds.

    Attributes:
        run: The run of one phase that the step is of.
        setting: The machine that the step is on.
        num_microbatches: Micro-batches of one pipeline.
        pipeline: Time between the start of the first forward and the end of the last backward.
        bubble: Time within it that the busiest rank stands still.
        busy: The busiest rank's work of all micro-batches; the exchange in it is what is waited for.
        hidden_exchange: All-to-all beside compute, on the busiest rank.
        exposed_transfer: Part of the bubble that transfers between pipeline ranks make.
        update: Time that follows the pipeline.
        simulation: Simulation of the schedule; None without a pipeline.
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
        """Seconds that the whole step takes."""
        return self.pipeline + self.update.total

    @property
    def tokens(self) -> int:
        """Tokens of the step."""
        return self.run.training.tokens_per_step

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second, over all devices."""
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
        """Model FLOP/s of each device over its bf16 (on a CPU fp32) peak."""
        peak = self.setting.hardware.peak("fp32" if self.setting.hardware.is_cpu else "bf16")
        return self.model_flops_per_second(is_causal=is_causal, with_mtp=with_mtp) / peak

    def breakdown(self) -> dict[str, float]:
        """Seconds by what they go to, on the busiest rank; all but the hidden ones add up to the step."""
        return {
            "products": self.busy.products, "attention": self.busy.attention, "element_wise": self.busy.movement,
            "between_kernels": self.busy.idle, "tensor_parallel": self.busy.tensor_parallel,
            "context_parallel": self.busy.context_parallel,
            "exposed_all_to_all": self.busy.exchange, "exposed_p2p": self.exposed_transfer,
            "bubble": self.bubble - self.exposed_transfer, "gradient_reduction": self.update.gradient_reduction,
            "optimizer": self.update.optimizer, "weight_gathering": self.update.weight_gathering,
            "hidden_all_to_all": self.hidden_exchange, "hidden_update": self.update.hidden,
        }


def update_time(run: RunConfig, setting: Setting) -> UpdateTime:
    """All that an update takes, on the rank with most to do, were nothing of it under passes."""
    training = dataclasses.replace(run.training, precision=setting.precision(run))
    return _update_time(run.model, run.parallel, weight_bytes_per_parameter(training.precision),
                        optimizer_bytes_per_parameter(training), setting)


@lru_cache(maxsize=4096)
def _dense_and_experts(model: ModelConfig, parallel: ParallelConfig) -> tuple[tuple[int, int], ...]:
    """Parameters of each pipeline rank."""
    run = dataclasses.replace(preset("tiny"), model=model, parallel=parallel)
    return tuple((rank.dense_parameters, rank.expert_parameters)
                 for rank in rank_parameters(run, stage_layouts(model, parallel)))


@lru_cache(maxsize=4096)
def _update_time(model: ModelConfig, parallel: ParallelConfig, weight_bytes: int, state_bytes: int, setting: Setting
                 ) -> UpdateTime:
    hardware, num_devices = setting.hardware, setting.num_devices
    network = Network(parallel, hardware, num_devices)
    copies = parallel.num_model_copies
    times = []
    for dense, experts in _dense_and_experts(model, parallel):
        owned = (dense / parallel.replicas_of_weights(num_devices)
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


def stage_costs(works: list[StageWork], *, overlaps: bool, p2p: float, last_p2p: float) -> Costs:
    """Costs for the simulator. Pairs of stages that meet in a plan are judged one by one.

    Args:
        works: Work of each stage.
        overlaps: Whether a pair of passes hides its all-to-alls.
        p2p: Seconds of a transfer between two stages.
        last_p2p: Seconds of one between the last two, which has more to carry where the MTP modules are in front of it.
    """
    stages = []
    for work in works:
        forward, inputs, weight = (work.alone[part] for part in WorkPart)
        weight_s = max(weight.alone, _LEAST_S)
        stages.append(StageCosts(
            forward=max(forward.alone, _LEAST_S), backward=max(inputs.alone, _LEAST_S) + weight_s, weight=weight_s))
    pairs: dict[tuple[int, int], Time] = {}
    known: dict[tuple[int, int], Time] = {}
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
    return Costs(tuple(stages), pairs, p2p, {} if last_p2p == p2p else {len(works) - 2: last_p2p})


def step_time(run: RunConfig, setting: Setting, *, with_transfers: bool = True) -> StepTime:
    """Predict a step of a run without phases, or of one phase of a run.

    Args:
        run: A run of one phase, as `run_cost.only_phase` makes it; valid on as many devices.
        setting: The machine.
        with_transfers: Find too what transfers between pipeline ranks cost, which takes a second simulation.
    """
    parallel = run.parallel
    table = WorkTable(run, setting)
    works = table.stages()
    microbatches = run.training.num_microbatches(parallel.data_parallel_size(setting.num_devices))
    if parallel.pipeline_model_parallel_size == 1:
        work = sum((works[0].alone[part] for part in WorkPart), Work()).times(microbatches)
        return StepTime(run, setting, microbatches, work.alone, 0.0, work, 0.0, 0.0,
                        _waited_for_update(run, setting, table, None))
    plan, costs = _plan_and_costs(run, setting, table, works, microbatches)
    simulation = simulate(plan, costs)
    busiest = min(range(plan.num_ranks), key=lambda rank: simulation.bubble[rank])
    busy, hidden = _busy(plan, busiest, works, costs, overlaps=setting.overlaps_pairs)
    pipeline, bubble, transfer = float(simulation.step_time), float(simulation.bubble[busiest]), 0.0
    if with_transfers:
        transfer = pipeline - pipeline_seconds(plan, dataclasses.replace(costs, p2p=0, p2p_of_boundary={}))
    return StepTime(run, setting, microbatches, pipeline, bubble, busy, hidden, min(transfer, bubble),
                    _waited_for_update(run, setting, table, simulation.timeline), simulation)


def _waited_for_update(run: RunConfig, setting: Setting, table: WorkTable, timeline: Timeline | None) -> UpdateTime:
    return update_time(run, setting).waiting_for(exposed_messages(run, setting, table, timeline))


def step_seconds(run: RunConfig, setting: Setting) -> float:
    """Compute `step_time(...).seconds` and nothing else, in less time."""
    table = WorkTable(run, setting)
    works = table.stages()
    microbatches = run.training.num_microbatches(run.parallel.data_parallel_size(setting.num_devices))
    if run.parallel.pipeline_model_parallel_size == 1:
        return (microbatches * sum(one.alone for one in works[0].alone.values())
                + _waited_for_update(run, setting, table, None).total)
    timeline = pipeline_timeline(*_plan_and_costs(run, setting, table, works, microbatches))
    return _end(timeline) + _waited_for_update(run, setting, table, timeline).total


def least_update(run: RunConfig, setting: Setting) -> float:
    """Seconds that the update of a step takes at least, whatever its passes hide."""
    update, parallel, on_gpu = update_time(run, setting), run.parallel, not setting.hardware.is_cpu
    return (update.optimizer + update.gradient_reduction * (not (on_gpu and parallel.overlap_grad_reduce))
            + update.weight_gathering * (not (on_gpu and parallel.overlap_param_gather)))


def _plan_and_costs(run: RunConfig, setting: Setting, table: WorkTable, works: list[StageWork], microbatches: int
                    ) -> tuple[Plan, Costs]:
    plan = known_plan(PlanSizes.of_run(run.parallel, microbatches))
    one = table.shape.local_tokens * run.model.hidden_size * table.shape.value_bytes
    across_the_last = stages_of(run.model, run.parallel)[-2].num_hidden_outputs
    p2p, last_p2p = (table.network.p2p_seconds(num * one) for num in (1, across_the_last))
    return plan, stage_costs(works, overlaps=setting.overlaps_pairs, p2p=p2p, last_p2p=last_p2p)


def pipeline_seconds(plan: Plan, costs: Costs) -> float:
    """Time at which the last rank is done, by the simulator's own clock."""
    return _end(pipeline_timeline(plan, costs))


def _end(timeline: Timeline) -> float:
    return float(max(spans[-1].end for spans in timeline))


def pipeline_timeline(plan: Plan, costs: Costs) -> Timeline:
    """Times of all actions, by the simulator's own clock."""
    known: dict[tuple[object, ...], Time] = {}

    def duration(rank: int, action: Action) -> Time:
        key = (rank, *(part for operation in action.operations for part in operation[:2]))
        if key not in known:
            known[key] = costs.duration(plan, rank, action)
        return known[key]

    return run_in_order(plan, duration, costs.p2p, delay_of_boundary=costs.p2p_of_boundary)


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
            parts = [getattr(works[first], source)[WorkPart.FORWARD], getattr(works[second], source)[WorkPart.INPUT],
                     getattr(works[second], source)[WorkPart.WEIGHT]]
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


_PARTS = {Kind.FORWARD: (WorkPart.FORWARD,), Kind.BACKWARD_INPUT: (WorkPart.INPUT,),
          Kind.BACKWARD_WEIGHT: (WorkPart.WEIGHT,), Kind.BACKWARD: (WorkPart.INPUT, WorkPart.WEIGHT)}
