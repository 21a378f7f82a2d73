"""This CPU as a machine: the operations of a run's layers, each alone, in as many processes at once as the run has.

No training step is timed. Products have the run's shapes, and their operands are out of cache, as a step's mostly are.
In a round operations follow one another, each called once before the next, as in a step: called over and over the
element-wise ones took half as long. The medians of the rounds count.

Started by `calibrate.measure_cpu`, or by a benchmark that takes rounds and training steps in turns.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import moe_utils

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.router import select_experts
from dsv3_megatron.ops.attention import causal_attention
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy
from dsv3_megatron.ops.rms_norm import rms_norm
from dsv3_megatron.ops.rope import apply_rope
from dsv3_megatron.ops.router_scores import router_scores
from dsv3_megatron.ops.swiglu import swiglu
from dsv3_megatron.parallel.layout import stage_layouts
from dsv3_megatron.planning.machine.hardware import AttentionPoint, Figure, Hardware, ProductPoint, measured_product
from dsv3_megatron.planning.machine.narrow_pass import narrow_pass
from dsv3_megatron.planning.machine.operand_pools import OperandPools
from dsv3_megatron.planning.time.layer_operations import stage_operations
from dsv3_megatron.planning.time.operations import Collective, CoreAttention, Product, Shape, TokenExchange, WorkItem
from dsv3_megatron.process.cores import usable_cores

_SOURCE = "measured on this machine"
# Calls of an operation in a round; seconds that the timing of a transfer lasts at least.
_PASSES = 3
_LEAST_S = 0.02
_OPTIMIZER_NUMEL = 1 << 23
# Of what another operation's time contains.
_CONTAINED = 1e9

Call = Callable[[], object]
# "wall" is what a run takes on this machine as it is; "cpu" counts the process's own work, whatever else runs.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass
class Case:
    """One operation that is timed.

    Attributes:
        key: Names it in the results.
        call: Function that does the operation once.
        is_transfer: All processes do the operation at once.
        repeats: Times that a transfer is done for one timing.
        seconds: Seconds of one call, by clock a value a round: the mean over the processes; "wall", of a process as
            slow as the round's slowest.
    """

    key: tuple[object, ...]
    call: Call
    is_transfer: bool = False
    repeats: int = 1
    seconds: dict[str, list[float]] = field(default_factory=lambda: {clock: [] for clock in CLOCKS})


class MicroBenchmarks:
    """All operations of a run, ready to be timed; every process of the run has one.

    Args:
        run: A run of one phase, valid on `num_processes`; precision fp32.
        num_processes: Processes that take part; more than 1 needs a process group.
        groups: Process groups of the run; None: what modules take beside their operations counts as nothing.
    """

    def __init__(self, run: RunConfig, num_processes: int = 1, *, groups: ProcessGroupCollection | None = None) -> None:
        self.run, self.num_processes = run, num_processes
        self.shape = Shape.of(run, is_cpu=True)
        self.cases: list[Case] = []
        operations = [operation for stage in stage_layouts(run.model, run.parallel)
                      for group in stage_operations(run, stage, self.shape) for operation in group]
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._add_products(operations)
            self._add_attention(operations)
            self._add_head()
            self._add_movement()
            self._add_machine()
            if num_processes > 1:
                self._add_communication(operations)
            if groups is not None:
                self._add(narrow_pass(run, groups), "narrow_pass", is_transfer=True)
        # Of a rank's micro-batch, on average over the stages: those with an overhead, and exchanges.
        ranks = run.parallel.pipeline_model_parallel_size
        self.num_exchanges = sum(isinstance(operation, TokenExchange) for operation in operations) / ranks
        self.num_kernels = sum(not isinstance(operation, TokenExchange | Collective)
                               for operation in operations) / ranks
        for case in self.cases:
            self._choose_repeats(case)

    def round(self) -> None:
        """Time every operation: each once after the other, several times over; transfers as often as fills a time."""
        found = {case.key: dict.fromkeys(CLOCKS, 0.0) for case in self.cases}
        self._wait()
        for _ in range(_PASSES):
            for case in self.cases:
                if not case.is_transfer:
                    for clock, seconds in _time(case.call).items():
                        found[case.key][clock] += seconds / _PASSES
        slowest = self._slowest(sum(seconds["wall"] for seconds in found.values()))
        for case in self.cases:
            if case.is_transfer:
                self._wait()
                found[case.key] = {clock: seconds / case.repeats
                                   for clock, seconds in _time(case.call, case.repeats).items()}
        for case in self.cases:
            for clock, seconds in self._mean(found[case.key]).items():
                waits = clock == "wall" and not case.is_transfer
                case.seconds[clock].append(seconds * slowest if waits else seconds)

    # -- timing ------------------------------------------------------------------------------------------------

    def _wait(self) -> None:
        if self.num_processes > 1:
            torch.distributed.barrier()

    def _mean(self, seconds: dict[str, float]) -> dict[str, float]:
        """Mean over the processes, by clock."""
        if self.num_processes == 1:
            return seconds
        total = torch.tensor(list(seconds.values()), dtype=torch.float64)
        torch.distributed.all_reduce(total)
        return dict(zip(seconds, (total / self.num_processes).tolist(), strict=True))

    def _slowest(self, seconds: float) -> float:
        """The slowest process's time of the same work over the mean: the others wait for it, at the latest for the sum
        of the gradients."""
        if self.num_processes == 1:
            return 1.0
        longest = torch.tensor(seconds, dtype=torch.float64)
        torch.distributed.all_reduce(longest, op=torch.distributed.ReduceOp.MAX)
        return float(longest) / self._mean({"wall": seconds})["wall"]

    def _choose_repeats(self, case: Case) -> None:
        """All processes choose the same."""
        self._wait()
        _time(case.call)  # the first call allocates
        if case.is_transfer:
            case.repeats = max(1, min(2000, round(_LEAST_S / max(1e-7, self._mean(_time(case.call))["wall"]))))

    # -- cases -------------------------------------------------------------------------------------------------

    def _add(self, call: Call, *key: object, is_transfer: bool = False) -> None:
        self.cases.append(Case(key, call, is_transfer))

    def _add_products(self, operations: list[WorkItem]) -> None:
        model, tp = self.run.model, self.shape.tp
        head = {self.shape.tokens, model.vocab_size // tp, model.hidden_size}
        found: dict[tuple[object, ...], tuple[str, int, int, int, int]] = {}
        for product in dict.fromkeys(operation for operation in operations if isinstance(operation, Product)):
            rows, columns, inner = max(1, round(product.rows)), product.columns, max(1, round(product.inner))
            key = ("product", product.purpose, product.groups, rows, columns, inner)
            if {rows, columns, inner} == head:
                continue
            found[key] = (product.purpose, product.groups, rows, columns, inner)
        if found:
            pools = OperandPools(max(groups * max(rows * inner, inner * columns, rows * columns)
                               for _, groups, rows, columns, inner in found.values()))
            for name, (purpose, *sizes) in found.items():
                self._add(pools.product(purpose, *sizes), *name)

    def _add_attention(self, operations: list[WorkItem]) -> None:
        model, heads = self.run.model, self.run.model.num_attention_heads // self.shape.tp
        first = next((operation for operation in operations if isinstance(operation, CoreAttention)), None)
        if first is None:
            return
        seq, batch = self.shape.seq_length, self.shape.micro_batch_size
        q, k = (torch.randn(seq, batch, heads, model.qk_head_dim, requires_grad=True) for _ in range(2))
        v = torch.randn(seq, batch, heads, model.v_head_dim, requires_grad=True)

        def attend() -> torch.Tensor:
            return causal_attention(q, k, v, softmax_scale=model.qk_head_dim ** -0.5)

        self._add(attend, "attention", False)
        self._add(_backward_of(attend, (q, k, v)), "attention", True)

    def _add_head(self) -> None:
        model, tokens = self.run.model, self.shape.tokens
        hidden = torch.randn(tokens, model.hidden_size, requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(model.vocab_size // self.shape.tp, model.hidden_size) * 0.02)
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
        targets = torch.randint(0, weight.shape[0], (tokens,))

        def lose() -> torch.Tensor:
            return linear_cross_entropy(hidden, weight, targets, accumulate_into_main_grad=True)

        self._add(lose, "head", False)
        self._add(_backward_of(lose, (hidden, weight)), "head", True)

    def _add_movement(self) -> None:
        model, shape = self.run.model, self.shape
        tokens, hidden, heads = round(shape.local_tokens), model.hidden_size, model.num_attention_heads // shape.tp
        x = torch.randn(tokens, hidden, requires_grad=True)
        weight = torch.nn.Parameter(torch.ones(hidden))
        self._add(lambda: rms_norm(x, weight), "movement", "norm", 2 * x.numel() * 4)
        self._add(_backward_of(lambda: rms_norm(x, weight), (x, weight)), "movement", "norm_backward",
                  3 * x.numel() * 4)
        width = max(1, model.num_shared_experts) * model.moe_ffn_hidden_size
        wide = torch.randn(tokens, 2 * width, requires_grad=True)
        self._add(lambda: swiglu(wide), "movement", "swiglu", 3 * tokens * width * 4)
        self._add(_backward_of(lambda: swiglu(wide), (wide,)), "movement", "swiglu_backward", 5 * tokens * width * 4)
        self._add(lambda: x.detach() + x.detach(), "movement", "add", 3 * x.numel() * 4)
        self._add_heads(heads)
        rows = tokens * model.moe_router_topk
        ids = torch.rand(tokens, model.num_experts).topk(model.moe_router_topk, dim=1).indices
        chosen = torch.zeros(tokens, model.num_experts, dtype=torch.bool).scatter_(1, ids, True)

        def permute_and_back() -> torch.Tensor:
            sent, _, places = moe_utils.permute(x, chosen, num_out_tokens=rows)[:3]
            return moe_utils.unpermute(sent, places, x.shape, routing_map=chosen)

        self._add(permute_and_back, "movement", "permute", 4 * rows * hidden * 4, "forward")
        self._add(_backward_of(permute_and_back, (x,)), "movement", "permute", 4 * rows * hidden * 4, "backward")
        self._add_routing(tokens)

    def _add_heads(self, heads: int) -> None:
        """Queries turned; keys put together; values cut off: forward and backward."""
        model, shape = self.run.model, self.shape
        seq, batch, nope, rope, width = (shape.seq_length, shape.micro_batch_size, model.qk_nope_head_dim,
                                         model.qk_rope_head_dim, model.v_head_dim)
        query = torch.randn(seq, batch, heads, nope + rope, requires_grad=True)
        both = torch.randn(seq, batch, heads, nope + width, requires_grad=True)
        shared = torch.randn(seq, batch, rope, requires_grad=True)
        angles = torch.rand(seq, rope // 2)
        cos, sin = angles.cos(), angles.sin()

        def assemble() -> torch.Tensor:
            turned = apply_rope(query, cos, sin)
            key_nope, value = both.split([nope, width], dim=-1)
            key = torch.cat([key_nope, shared.unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1)
            return torch.cat([turned.flatten(), key.flatten(), value.flatten()])

        moved = 4 * seq * batch * heads * (2 * rope + (nope + rope) + nope + 2 * width)
        forward, backward = assemble, _backward_of(assemble, (query, both, shared))
        self._add(forward, "movement", "copy", moved, "forward")
        self._add(backward, "movement", "copy", moved, "backward")

    def _add_routing(self, tokens: int) -> None:
        model = self.run.model
        logits = torch.randn(tokens, model.num_experts, requires_grad=True)
        bias = torch.zeros(model.num_experts)

        def route() -> torch.Tensor:
            gates, ids = select_experts(
                router_scores(logits.float(), model.moe_router_score_function), bias, top_k=model.moe_router_topk,
                num_groups=model.moe_router_num_groups, group_top_k=model.moe_router_group_topk,
                route_scale=model.moe_router_topk_scaling_factor)
            chosen = torch.zeros(tokens, model.num_experts, dtype=torch.bool).scatter_(1, ids, True)
            chosen.sum(0)
            return torch.zeros_like(logits).scatter(1, ids, gates)

        def both_ways() -> None:
            torch.autograd.grad(route().sum(), logits)

        self._add(both_ways, "movement", "routing", 8 * tokens * model.num_experts)

    def _add_machine(self) -> None:
        a = torch.randn(768, 768)
        b = torch.randn(768, 768)
        self._add(lambda: torch.mm(a, b), "peak")
        large = torch.empty(_OPTIMIZER_NUMEL * 2)
        copied = torch.empty_like(large)
        self._add(lambda: copied.copy_(large), "bandwidth")
        weight = torch.nn.Parameter(torch.randn(_OPTIMIZER_NUMEL))
        weight.grad = torch.randn(_OPTIMIZER_NUMEL)
        optimizer = torch.optim.AdamW([weight], lr=1e-6, fused=True)

        def update() -> None:
            assert weight.grad is not None
            weight.grad.mul_(1.0)
            weight.grad.norm()
            optimizer.step()
            weight.grad.mul_(1.0)

        self._add(update, "optimizer")

    def _add_communication(self, operations: list[WorkItem]) -> None:
        size = self.num_processes
        model = self.run.model
        has_exchange = any(isinstance(operation, TokenExchange) for operation in operations)
        rows = max(size, round(self.shape.local_tokens) * model.moe_router_topk // size * size)
        sent = torch.randn(rows if has_exchange else size, model.hidden_size)
        received = torch.empty_like(sent)
        self._add(lambda: torch.distributed.all_to_all_single(received, sent), "all_to_all", sent.numel() * 4,
                  is_transfer=True)
        small, small_out = torch.randn(size), torch.empty(size)
        self._add(lambda: torch.distributed.all_to_all_single(small_out, small), "latency", is_transfer=True)
        numel = 1 << 21
        whole, part = torch.randn(numel), torch.randn(numel // size)

        def reduce_and_gather() -> None:
            torch.distributed.reduce_scatter_tensor(part, whole)
            torch.distributed.all_gather_into_tensor(whole, part)

        self._add(reduce_and_gather, "collective", 2 * numel * 4, is_transfer=True)

    def hardware(self, clock: str = "wall") -> Hardware:
        """The machine by the medians of the rounds so far, as seen by one process.

        Where processes share cores, a step lasts at least as long as the cores need for the work of all: one that waits
        leaves its core to another, which a single operation's wall clock does not show.

        Args:
            clock: Name of the clock to take times of, one of CLOCKS.
        """
        medians = {case.key: statistics.median(case.seconds[clock]) for case in self.cases}
        crowd = self.num_processes / usable_cores()
        if clock == "wall" and crowd > 1:
            medians = {case.key: max(medians[case.key], crowd * statistics.median(case.seconds["cpu"]))
                       for case in self.cases}
        return _Machine(self, medians).hardware()


class _Machine:
    """What the medians say.

    Args:
        benchmarks: The benchmarks that were run.
        medians: Seconds by key.
    """

    def __init__(self, benchmarks: MicroBenchmarks, medians: dict[tuple[object, ...], float]) -> None:
        self.run, self.shape, self.num_processes = benchmarks.run, benchmarks.shape, benchmarks.num_processes
        self.num_exchanges, self.num_kernels = benchmarks.num_exchanges, benchmarks.num_kernels
        self.medians = medians

    def _of(self, *kind: object) -> Iterator[tuple[tuple[object, ...], float]]:
        return ((key, seconds) for key, seconds in self.medians.items() if key[: len(kind)] == kind)

    def hardware(self) -> Hardware:
        """Make a machine of the measurements."""
        size = self.num_processes

        def seconds(*kind: object) -> float:
            return sum(taken for _, taken in self._of(*kind))

        bandwidth = 2 * 4 * _OPTIMIZER_NUMEL * 2 / seconds("bandwidth")
        figures = {
            "is_cpu": 1.0, "fp32_flops": 2 * 768 ** 3 / seconds("peak"), "fp32_best_share": 1.0,
            "memory_bandwidth": bandwidth, "memory_bytes": _host_memory() / size, "gpus_per_node": float(1 << 20),
            "stream_busy_share": 1.0, "routed_rows_deviation": 0.0, "nvlink_latency": 0.0, "network_latency": 0.0,
            "nvlink_bandwidth": bandwidth, "network_bandwidth": bandwidth,
            "all_to_all_nvlink_bandwidth": bandwidth, "all_to_all_network_bandwidth": bandwidth}
        beside = seconds("narrow_pass")
        if size > 1:
            latency = seconds("latency")
            exchanged = next(key for key, _ in self._of("all_to_all"))
            collective = next(key for key, _ in self._of("collective"))
            sent = float(str(exchanged[1])) * (1 - 1 / size) / max(1e-9, seconds("all_to_all") - latency)
            reduced = float(str(collective[1])) * (1 - 1 / size) / seconds("collective")
            beside -= self.num_exchanges * latency
            figures |= {"nvlink_latency": latency, "network_latency": latency,
                        "all_to_all_nvlink_bandwidth": sent, "all_to_all_network_bandwidth": sent,
                        "nvlink_bandwidth": reduced, "network_bandwidth": reduced}
        figures["operation_overhead"] = max(0.0, beside) / self.num_kernels
        named = {name: Figure(value, _SOURCE) for name, value in figures.items()}
        return Hardware("cpu", named, tuple(self._products(named)), tuple(self._attention(named)),
                        self._movement(bandwidth), f"{_SOURCE}, {size} processes at once")

    def _products(self, figures: dict[str, Figure]) -> Iterator[ProductPoint]:
        for (_, purpose, *sizes), seconds in self._of("product"):
            groups, rows, columns, inner = (int(str(size)) for size in sizes)
            yield measured_product(figures, "fp32", str(purpose), groups, rows, columns, inner, seconds)
        model, tokens = self.run.model, self.shape.tokens
        vocab, hidden = model.vocab_size // self.shape.tp, model.hidden_size
        forward, backward = self.medians["head", False], self.medians["head", True]
        yield measured_product(figures, "fp32", "fprop", 1, tokens, vocab, hidden, forward)
        yield measured_product(figures, "fp32", "dgrad", 1, tokens, hidden, vocab, backward / 2)
        yield measured_product(figures, "fp32", "wgrad", 1, vocab, hidden, tokens, backward / 2)

    def _attention(self, figures: dict[str, Figure]) -> Iterator[AttentionPoint]:
        model, heads = self.run.model, self.run.model.num_attention_heads // self.shape.tp
        pairs = self.shape.tokens * self.shape.seq_length / 2 * heads
        for is_backward in (False, True):
            widths = (3 * model.qk_head_dim + 2 * model.v_head_dim if is_backward
                      else model.qk_head_dim + model.v_head_dim)
            rate = 2 * pairs * widths / self.medians["attention", is_backward]
            yield AttentionPoint(is_backward, self.shape.seq_length, rate / figures["fp32_flops"].value)

    def _movement(self, bandwidth: float) -> dict[str, Figure]:
        sums: dict[str, tuple[float, float]] = {}
        for key, seconds in self._of("movement"):
            kind, moved = str(key[1]), float(str(key[2]))
            before = sums.get(kind, (0.0, 0.0))
            sums[kind] = before[0] + moved, before[1] + seconds
        shares = {kind: Figure(moved / seconds / bandwidth, _SOURCE) for kind, (moved, seconds) in sums.items()}
        # As `step_time.update_time` counts: AdamW in fp32 reads and writes 28 bytes a parameter, gradients are passed
        # over three times and read once for their norm.
        update = self.medians["optimizer",]
        shares["optimizer"] = Figure((28 + 16) * _OPTIMIZER_NUMEL / update / bandwidth, _SOURCE)
        for kind in ("loss", "attention_backward"):
            shares[kind] = Figure(_CONTAINED, "in the time of the head, or of attention")
        for kind in ("cast", "cast_wide", "cast_transposed", "requantize_transposed", "permute_narrow"):
            shares[kind] = Figure(shares["copy"].value, "unverified: as copy; FP8 on a CPU is not measured")
        return shares


def _time(call: Call, repeats: int = 1) -> dict[str, float]:
    """Seconds of all repeats, by clock."""
    started = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(repeats):
        call()
    return {name: clock() - started[name] for name, clock in CLOCKS.items()}


def _backward_of(forward: Callable[[], torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Call:
    """The backward alone, of one forward."""
    out = forward()
    gradient = torch.ones_like(out)

    def call() -> None:
        # Weights whose gradient goes to `main_grad` have none for autograd.
        torch.autograd.grad(out, inputs, gradient, retain_graph=True, allow_unused=True)

    return call


def _host_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
