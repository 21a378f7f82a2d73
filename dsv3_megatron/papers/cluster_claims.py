"""What the papers say of the cluster: its layout, exchanges of tokens, memory, the time of a step, device-hours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from functools import lru_cache

from dsv3_megatron.config.expert_dispatch import members_of_nodes
from dsv3_megatron.config.parallel import COMMUNICATION_SMS
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.papers.claim import COMPANION, REPORT, Claim, Relation
from dsv3_megatron.papers.training_claims import pretraining_tokens, v3_run
from dsv3_megatron.planning.machine.hardware import Hardware
from dsv3_megatron.planning.machine.hardware_tables import find_hardware
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.planning.memory.headroom import Headroom
from dsv3_megatron.planning.run_cost import RunCost, main_phase, only_phase, run_cost
from dsv3_megatron.planning.search import search
from dsv3_megatron.planning.time.dispatch_bytes import expected_destinations
from dsv3_megatron.planning.time.step_time import StepTime, step_time
from dsv3_megatron.planning.time.work import Setting

_DEVICES = 2048  # report, 3.1
_PRICE = 2.0  # report, table 1: dollars an hour
_POST_TRAINING_HOURS = 5e3  # report, table 1
_PLAN = f"dsv3 plan --preset dsv3-671b --hardware h800 --num-gpus {_DEVICES}"
_PRINT = "dsv3 train --preset dsv3-671b --print-model"
_HERE = "dsv3 report"
_DAY_S = 86400
_THOUSAND, _MILLION, _BILLION, _TRILLION = 1e3, 1e6, 1e9, 1e12
_ABOUT_COST = "A prediction, from tables that no training run was fitted to (docs/planning)."


def h800() -> Hardware:
    """The machine of the published run."""
    return find_hardware("h800")


@lru_cache(maxsize=1)
def _step() -> StepTime:
    run = v3_run()
    return step_time(only_phase(run, main_phase(run)), Setting(h800(), _DEVICES))


@lru_cache(maxsize=1)
def step_parts() -> dict[str, float]:
    """Seconds of a step that ranks spend in the mean, by what they do: F, B, W, F&B and the bubble.

    B is the backward for the input, alone or as a part of a whole backward; W the backward for the weights.
    """
    simulation = _step().simulation
    assert simulation is not None
    seconds: dict[str, float] = defaultdict(float)
    for spans in simulation.timeline:
        for span in spans:
            name = "&".join(str(operation.kind.name) for operation in span.action.operations)
            seconds[name] += float(span.end - span.start) / len(simulation.timeline)
    bubble = sum(map(float, simulation.bubble)) / len(simulation.bubble)
    return {"F": seconds["FORWARD"], "B": seconds["BACKWARD_INPUT"] + seconds["BACKWARD"],
            "W": seconds["BACKWARD_WEIGHT"], "F&B": seconds["FORWARD&BACKWARD"], "bubble": bubble}


@lru_cache(maxsize=1)
def _pretraining_cost() -> float:
    cost = run_cost(v3_run(), Setting(h800(), _DEVICES))
    return sum(phase.gpu_hours or 0.0 for phase in cost.phases if not phase.name.startswith("extension"))


@lru_cache(maxsize=1)
def _whole_cost() -> RunCost:
    def find(run: RunConfig, setting: Setting) -> tuple[RunConfig | None, str]:
        result = search(run, setting, num_best=1)
        if not result.ranked:
            return None, result.why_none()
        return result.ranked[0].layout.apply(run), result.ranked[0].layout.describe()

    return run_cost(v3_run(), Setting(h800(), _DEVICES), find_layout=find)


def _extension_hours() -> float:
    return sum(phase.gpu_hours or 0.0 for phase in _whole_cost().phases if phase.name.startswith("extension"))


def _fits() -> str:
    setting = Setting(h800(), _DEVICES)
    run = only_phase(v3_run(), main_phase(v3_run()))
    fullest = max(rank.peak_bytes for rank in estimate_memory(run, _DEVICES, **setting.memory_terms(run)))
    usable = Headroom.of(setting).usable_bytes
    if fullest <= usable:
        return "fits without TP"
    return f"fullest rank {fullest / _BILLION:.1f} GB of {usable / _BILLION:.1f} GB"


def _experts_of_a_rank() -> float:
    return v3_run().model.num_experts / v3_run().parallel.expert_model_parallel_size


def _nodes_of_experts() -> float:
    return float(members_of_nodes(v3_run().parallel.expert_model_parallel_size, 1, int(h800()["gpus_per_node"]))[0])


LAYOUT = (
    Claim("pipeline ranks", REPORT, "3.2", "16", lambda: float(v3_run().parallel.pipeline_model_parallel_size),
          command=_PRINT),
    Claim("expert-parallel ranks", REPORT, "3.2", "64", lambda: float(v3_run().parallel.expert_model_parallel_size),
          command=_PRINT),
    Claim("nodes that they lie on", REPORT, "3.2", "8", _nodes_of_experts, command=_PRINT),
    Claim("tensor-parallel ranks", REPORT, "3.2", "1", lambda: float(v3_run().parallel.tensor_model_parallel_size),
          command=_PRINT),
    Claim("experts of a GPU in a layer", COMPANION, "4.3", "4", _experts_of_a_rank, command=_PRINT),
    Claim("GPUs of a node", REPORT, "3.1", "8", lambda: h800()["gpus_per_node"], command=_HERE),
    Claim("SMs of a GPU", REPORT, "3.5.1", "132", lambda: h800()["num_sms"], command=_HERE),
    Claim("SMs for communication", REPORT, "3.2.2", "20", lambda: float(COMMUNICATION_SMS), command=_HERE,
          why="The default of --num-communication-sms. That they saturate both links needs GPUs."),
    Claim("memory: training without TP on 80 GB", REPORT, "3.2", "fits without TP", _fits, command=_PLAN,
          is_estimate=True, why="The report says that it fits, and prints no number of bytes."),
)


def _comm_us(bandwidth: float) -> float:
    """Microseconds in which 32 tokens go to nine experts each and come back, by this library's bytes of a row."""
    hidden = v3_run().model.hidden_size
    experts = v3_run().model.moe_router_topk + v3_run().model.num_shared_experts
    return (record_bytes(hidden) + 2 * hidden) * 32 * experts / bandwidth * 1e6


def _token_ms(bandwidth: float) -> float:
    return 2 * v3_run().model.num_layers * _comm_us(bandwidth) / 1e3


_IB, _NVL72 = 50e9, 900e9  # companion, 2.3.2
_BYTES_WHY = "The paper counts a byte for each of 7K values; a row here is 7,168 values and a scale for each 128."

DISPATCH = (
    Claim("nodes of a token, in the mean", REPORT, "3.2.2", "4 nodes",
          lambda: expected_destinations(v3_run().model, int(_nodes_of_experts())), relation=Relation.AT_MOST,
          command=_HERE,
          why="Where no expert is preferred."),
    Claim("NVLink's bandwidth over the network's", REPORT, "3.2.2", "3.2",
          lambda: h800()["nvlink_bandwidth"] / h800()["network_bandwidth"], command=_HERE,
          why="The report divides 160 by the card's 50 GB/s; the planner by the 40 GB/s that the companion measured."),
    Claim("NVLink's bandwidth over the network's, as achieved", COMPANION, "4.3", "4",
          lambda: h800()["nvlink_bandwidth"] / h800()["network_bandwidth"], command=_HERE),
    Claim("bytes of a dispatched token, over BF16's", COMPANION, "3.2", "50%",
          lambda: record_bytes(v3_run().model.hidden_size) / (2 * v3_run().model.hidden_size), 0.01, command=_PRINT,
          why="The scales, 4 bytes for 128 values, are counted here."),
    Claim("bandwidth of EP all-to-all, 16 to 128 GPUs", COMPANION, "figure 7", "40 GB/s",
          relation=Relation.AT_LEAST, why="It takes 16 GPUs with network cards. The planner takes DeepEP's numbers."),
    Claim("latency of 64 bytes: InfiniBand, RoCE, NVLink", COMPANION, "table 5", "3.7, 5.6, 3.33 µs",
          why="It takes the machines. The planner takes InfiniBand's and NVLink's from this table."),
    Claim("cost of network topologies", COMPANION, "table 3", "(not of this library)",
          why="Nothing here models switches and cables."),
    Claim("dispatch and combine in decoding, 32 tokens, InfiniBand", COMPANION, "2.3.2", "120.96 µs",
          lambda: _comm_us(_IB), command=_HERE, why=_BYTES_WHY),
    Claim("time of a token that InfiniBand allows", COMPANION, "2.3.2", "14.76 ms", lambda: _token_ms(_IB),
          command=_HERE, why=_BYTES_WHY),
    Claim("dispatch and combine on GB200 NVL72", COMPANION, "2.3.2", "6.72 µs", lambda: _comm_us(_NVL72),
          command=_HERE, why=_BYTES_WHY),
    Claim("time of a token that NVL72 allows", COMPANION, "2.3.2", "0.82 ms", lambda: _token_ms(_NVL72),
          command=_HERE, why=_BYTES_WHY),
)


def _planned(subject: str, place: str, said: str, gives: Callable[[], float], unit: float = 1.0, *,
             source: str = COMPANION, why: str = _ABOUT_COST, is_slow: bool = False, relation: Relation = Relation.IS
             ) -> Claim:
    return Claim(subject, source, place, said, gives, unit, relation, _PLAN, why, is_slow, True)


def _teraflops(*, is_causal: bool) -> float:
    return _step().model_flops_per_second(is_causal=is_causal)


TIME = (
    _planned("seconds of a step", "table 4", "19.926 s", lambda: _step().seconds),
    _planned("tokens of a day", "table 4", "272.80B", lambda: _step().tokens_per_second * _DAY_S, _BILLION),
    _planned("forward alone (1F)", "table 4", "1.13 s", lambda: step_parts()["F"],
             why="Mean over the pipeline ranks; the paper does not say of which rank it is."),
    _planned("backward for the input alone (1B)", "table 4", "1.99 s", lambda: step_parts()["B"],
             why="Whole backwards that run alone are counted here."),
    _planned("backward for the weights alone (1W)", "table 4", "0.48 s", lambda: step_parts()["W"]),
    _planned("overlapped forward and backward (1F1B)", "table 4", "13.95 s", lambda: step_parts()["F&B"]),
    _planned("bubble", "table 4", "2.06 s", lambda: step_parts()["bubble"],
             why="The planner balances stages by operations; the report does not give its split of layers."),
    _planned("optimizer", "table 4", "0.29 s", lambda: _step().update.total),
    _planned("operations of a GPU, causal", "table 4", "385 TFLOP/s", lambda: _teraflops(is_causal=True), _TRILLION),
    _planned("operations of a GPU, non-causal", "table 4", "432 TFLOP/s", lambda: _teraflops(is_causal=False),
             _TRILLION),
    _planned("MFU, causal", "table 4", "38.94%", lambda: _step().mfu(), 0.01),
    _planned("MFU, non-causal", "table 4", "43.73%", lambda: _step().mfu(is_causal=False), 0.01),
    Claim("MFU that the paper's own step time makes, causal", COMPANION, "table 4", "38.94%",
          lambda: (_step().mfu() * _step().seconds / 19.926), 0.01, command=_PLAN,
          why="This library's operations of a token and peak, with the step of 19.926 s."),
)

COST = (
    _planned("GPU-hours for 1T tokens", "1", "180K", lambda: _step().gpu_hours_per_trillion_tokens, _THOUSAND,
             source=REPORT),
    _planned("days for 1T tokens on 2048 GPUs", "1", "3.7 days",
             lambda: _step().gpu_hours_per_trillion_tokens / _DEVICES / 24, source=REPORT),
    _planned("GPU-hours of pre-training", "table 1", "2664K", _pretraining_cost, _THOUSAND, source=REPORT),
    _planned("days of pre-training (less than two months)", "1", "61 days", lambda: _pretraining_cost() / _DEVICES / 24,
             source=REPORT, relation=Relation.AT_MOST),
    _planned("price of pre-training at $2", "table 1", "$5.328M", lambda: _pretraining_cost() * _PRICE, _MILLION,
             source=REPORT),
    Claim("GPU-hours of pre-training, by the report's own rate", REPORT, "table 1", "2664K",
          lambda: 180e3 * pretraining_tokens() / _TRILLION, _THOUSAND, command=_HERE,
          why="180K GPU-hours for 1T tokens, times the recipe's tokens."),
    _planned("GPU-hours of the context extension", "table 1", "119K", _extension_hours, _THOUSAND, source=REPORT,
             is_slow=True, why="Its layout is not published; ours shares a sequence among 8 and 32 ranks."),
    Claim("GPU-hours of post-training", REPORT, "table 1", "5K",
          why="The report gives no lengths, batches or steps. Fine-tuning on 1.5M instances twice, of 2,048 tokens "
          "each (assumed), is 1.1K at pre-training's rate; what is left is about 500 steps of GRPO with 8,192 answers "
          "of 1,024 tokens, with drafts (docs/planning)."),
    _planned("GPU-hours in all", "table 1", "2788K",
             lambda: _pretraining_cost() + _extension_hours() + _POST_TRAINING_HOURS, _THOUSAND, source=REPORT,
             is_slow=True, why="The prediction of the first two, and the report's own 5K for post-training."),
)
