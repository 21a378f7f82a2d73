"""A plan as text, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.rank_state import checkpoint_bytes
from dsv3_megatron.planning.goodput.goodput_report import goodput_json, goodput_text
from dsv3_megatron.planning.goodput.run_goodput import RunGoodput
from dsv3_megatron.planning.machine.hardware import UNVERIFIED, Hardware
from dsv3_megatron.planning.memory.estimate import RankMemory
from dsv3_megatron.planning.memory.headroom import Headroom, lacking_memory
from dsv3_megatron.planning.memory.settings import is_engine
from dsv3_megatron.planning.policy_cost import PolicyStep, policy_json, policy_text
from dsv3_megatron.planning.run_cost import RunCost
from dsv3_megatron.planning.search import MEMORY, RULE, SLOWER, SearchResult
from dsv3_megatron.planning.time.dispatch_bytes import bytes_of_straddling_groups
from dsv3_megatron.planning.time.network import Network
from dsv3_megatron.planning.time.step_time import StepTime
from dsv3_megatron.reports.model_table import format_bytes

_KIND_WORDS = {RULE: "break a rule", MEMORY: "need more memory", SLOWER: "are slower than the last one above"}
_HIDDEN = ("hidden_all_to_all", "hidden_update")
# Parts of a step, components of memory and resources, in the words of Megatron-LM's users; JSON has the plain names.
_STEP_WORDS = {
    "products": "GEMMs", "attention": "core attention", "element_wise": "element-wise kernels",
    "between_kernels": "gaps between kernels", "tensor_parallel": "TP collectives",
    "exposed_all_to_all": "exposed expert all-to-all", "exposed_p2p": "exposed pipeline P2P",
    "context_parallel": "exposed context-parallel messages",
    "bubble": "pipeline bubble", "gradient_reduction": "gradient reduce-scatter (DP)", "optimizer": "optimizer step",
    "weight_gathering": "parameter all-gather (DP)", "hidden_all_to_all": "hidden expert all-to-all",
    "hidden_update": "hidden DP collectives",
}
_MEMORY_WORDS = {
    "parameter": "params", "gradient": "main grads", "optimizer": "optimizer", "activation": "activations",
    "deferred": "delayed wgrad", "working": "workspace", "communication": "P2P buffers", "buffer": "buffers",
    "fp8_weight": "FP8 params", "host": "CPU",
}
_RESOURCE_WORDS = {
    "stream_busy_share": "busy share of the compute stream", "routed_rows_deviation": "deviation of tokens per expert",
    "communication_sms": "SMs that communication takes", "memory_bandwidth": "memory bandwidth",
    "bf16_best_share": "best share of the BF16 peak", "fp8_best_share": "best share of the FP8 peak",
    "bf16_flops": "BF16 peak", "fp8_flops": "FP8 peak", "fp32_flops": "FP32 peak",
    "nvlink_bandwidth": "NVLink bandwidth", "network_bandwidth": "network bandwidth",
    "all_to_all_nvlink_bandwidth": "all-to-all bandwidth on NVLink",
    "all_to_all_network_bandwidth": "all-to-all bandwidth on the network",
    "flex_communication_sms": "SMs that the flex dispatcher takes",
    "flex_all_to_all_nvlink_bandwidth": "the flex dispatcher's bandwidth on NVLink",
    "flex_all_to_all_network_bandwidth": "the flex dispatcher's bandwidth on the network",
    "block_forward_share": "rate of attention to blocks, forward",
    "block_backward_share": "rate of attention to blocks, backward",
    "nvlink_latency": "NVLink latency", "network_latency": "network latency",
    "context_bytes": "memory of the CUDA context",
    "nccl_bytes": "memory of NCCL's buffers", "fragmentation_share": "share of memory lost to fragmentation",
}


def _resource_words(name: str) -> str:
    kind, colon, which = name.partition(":")
    if colon:
        return f"bandwidth of {which.replace('_', ' ')}" if kind == "movement" else f"rate of attention {which}"
    return _RESOURCE_WORDS.get(name, name.replace("_", " "))


@dataclass(frozen=True)
class PlanReport:
    """Everything that is known of a run before it starts.

    Attributes:
        run: The run of one phase that the step is of.
        phase: Name of that phase.
        step: Predicted time of a step in that phase.
        memory: Estimated memory of each pipeline rank.
        remedies: What would lower the worst rank's memory; empty if it fits.
        cost: Cost of the whole run.
        sensitivity: Change of the step time with 10% more of a resource.
        search: What a search of layouts found, if one was asked for.
        goodput: The run with failures, if something was said of them.
        policy: A step of GRPO, rollout and all, if the run is of that kind; `step` is the training in it.
    """

    run: RunConfig
    phase: str
    step: StepTime
    memory: tuple[RankMemory, ...]
    remedies: tuple[str, ...]
    cost: RunCost
    sensitivity: Mapping[str, float]
    search: SearchResult | None = None
    goodput: RunGoodput | None = None
    policy: PolicyStep | None = None

    @property
    def hardware(self) -> Hardware:
        """The machine that the step is on."""
        return self.step.setting.hardware

    @property
    def fits(self) -> bool:
        """Whether the fullest rank's memory is on its device."""
        return not lacking_memory(self.memory, self.step.setting)

    @property
    def headroom(self) -> Headroom:
        """What a device leaves to the run."""
        return Headroom.of(self.step.setting)

    @property
    def peak_bytes(self) -> int:
        """Peak memory, in bytes, of the rank that needs most."""
        return max(rank.peak_bytes for rank in self.memory)

    def unverified(self) -> dict[str, str]:
        """Figures of the machine that no source confirms, and what they were taken from."""
        figures = {**self.hardware.figures, **{f"movement:{kind}": figure
                                               for kind, figure in self.hardware.movement.items()}}
        return {name: figure.source.removeprefix(UNVERIFIED) for name, figure in figures.items()
                if figure.source.startswith(UNVERIFIED)}


# -- JSON --------------------------------------------------------------------------------------------------------


def as_json(report: PlanReport) -> dict[str, Any]:
    """Plain values; seconds, bytes, device-hours."""
    step, cost = report.step, report.cost
    found: dict[str, Any] = {
        "preset": report.run.name, "phase": report.phase, "hardware": report.hardware.name,
        "num_gpus": step.setting.num_devices, "layout": _layout_words(report.run),
        "assumed": _assumptions(report),
        "fp8_scales": report.hardware.fp8_scales if report.run.fp8.is_enabled else None,
        "num_microbatches": step.num_microbatches, "tokens_per_step": step.tokens,
        "gpu_hours_per_trillion_tokens": step.gpu_hours_per_trillion_tokens, "step_time_s": step.seconds,
        "tokens_per_second": step.tokens_per_second, "model_flops_per_second": step.model_flops_per_second(),
        "mfu_causal": step.mfu(), "mfu_non_causal": step.mfu(is_causal=False),
        "mfu_with_mtp": step.mfu(with_mtp=True),
        "peak_memory_bytes": [rank.peak_bytes for rank in report.memory], "fits": report.fits,
        "memory_visible_bytes": report.headroom.visible_bytes, "memory_headroom_bytes": dict(report.headroom.parts),
        "memory_usable_bytes": report.headroom.usable_bytes, "checkpoint_bytes": checkpoint_bytes(report.run),
        "breakdown": step.breakdown(),
        "memory": [_memory_json(rank) for rank in report.memory], "memory_remedies": list(report.remedies),
        "phases": [{
            "name": phase.name, "num_steps": phase.num_steps, "num_tokens": phase.num_tokens, "days": phase.days,
            "gpu_hours": phase.gpu_hours, "price": cost.price(phase.gpu_hours),
            "step_time_s": phase.last_step.seconds if phase.last_step else None,
            "layout": _layout_words(phase.last_step.run) if phase.last_step else None, "note": phase.note,
        } for phase in cost.phases],
        "total": {"days": cost.days, "gpu_hours": cost.gpu_hours, "num_tokens": cost.num_tokens,
                  "price": cost.price(cost.gpu_hours)},
        "sensitivity": dict(report.sensitivity), "unverified": report.unverified(),
    }
    if report.policy is not None:
        found["policy"] = policy_json(report.policy)
    if report.goodput is not None:
        found["goodput"] = goodput_json(report.goodput, cost.price_per_gpu_hour)
    if report.search is not None:
        found["search"] = search_json(report.search)
    return found


def search_json(result: SearchResult) -> dict[str, Any]:
    """A search's ranking, and each rejected layout with its reason."""
    return {
        "num_layouts": result.num_layouts, "num_simulated": result.num_simulated, "seconds": result.seconds,
        "ranked": [{
            "layout": found.layout.describe(), "flags": found.flags, **dataclasses.asdict(found.layout),
            "step_time_s": found.step.seconds,
            "gpu_hours_per_trillion_tokens": found.step.gpu_hours_per_trillion_tokens, "mfu_causal": found.step.mfu(),
            "peak_memory_bytes": found.peak_bytes} for found in result.ranked],
        "rejected": [dataclasses.asdict(rejected) for rejected in result.rejected],
    }


def _components(rank: RankMemory) -> dict[str, int]:
    """Bytes on the device by component, and those on the host."""
    return {field.name.removesuffix("_bytes"): getattr(rank, field.name) for field in dataclasses.fields(rank)
            if field.name.endswith("_bytes")}


def _memory_json(rank: RankMemory) -> dict[str, Any]:
    return {"pipeline_rank": rank.pipeline_rank, "stages": list(rank.stages), "peak": rank.peak_bytes,
            **_components(rank)}


# -- text --------------------------------------------------------------------------------------------------------


def as_text(report: PlanReport) -> str:
    """Write a report as text for a terminal."""
    parts = [_head(report), _breakdown(report), _memory(report), _phases(report), _sensitivity(report)]
    if report.policy is not None:
        parts.insert(1, policy_text(report.policy))
    if report.goodput is not None:
        parts.insert(4 + (report.policy is not None), goodput_text(report.goodput, report.cost.price_per_gpu_hour))
    if report.search is not None:
        parts.insert(0, search_text(report.search))
    if report.unverified():
        parts.append("not confirmed by a source: " + ", ".join(map(_resource_words, report.unverified())))
    return "\n\n".join(parts)


def _layout_words(run: RunConfig) -> str:
    parallel = run.parallel
    words = [f"TP{parallel.tensor_model_parallel_size}", f"PP{parallel.pipeline_model_parallel_size}",
             f"EP{parallel.expert_model_parallel_size}"]
    if parallel.expert_tensor_parallel_size > 1:
        words.append(f"ETP{parallel.expert_tensor_parallel_size}")
    if parallel.pipeline_model_parallel_size > 1:
        stages = parallel.num_virtual_stages_per_pipeline_rank
        words.append(parallel.schedule + (f" V{stages}" if stages > 1 else ""))
    return (f"{' '.join(words)}, micro-batch size {run.training.micro_batch_size}, FP8 {run.fp8.fp8}, "
            f"recompute {run.training.recompute_granularity or 'none'}")


def _assumptions(report: PlanReport) -> str:
    """Which modules and which dispatch the numbers are of: the run's own flags decide about the one, the command's
    about the other."""
    setting, modules = report.step.setting, "local modules"
    if not setting.hardware.is_cpu:
        modules = ("Transformer Engine's modules (--transformer-impl local for this library's)" if is_engine(report.run)
                   else "this library's modules (--transformer-impl transformer_engine for Transformer Engine's)")
    if report.run.parallel.expert_model_parallel_size == 1:
        return modules
    return f"{modules}; {_dispatch_words(report)}"


def _dispatch_words(report: PlanReport) -> str:
    """How tokens get to their experts, by the run's flag, and what groups that straddle nodes cost."""
    run, network = report.run, Network(report.run.parallel, report.hardware, report.step.setting.num_devices)
    words = {"node": "tokens cross the network once for each node (--moe-token-dispatcher-type node)",
             "alltoall": "a row for each expert is sent (--moe-token-dispatcher-type alltoall)",
             "flex": f"tokens are sent by {run.parallel.moe_flex_dispatcher_backend}, taken to send them once for each "
                     "node (--moe-token-dispatcher-type flex)"}[network.dispatcher]
    beyond = bytes_of_straddling_groups(run.model, network.expert_nodes[0], 1.0)
    if beyond and network.dispatcher != "alltoall":
        words += (f"; the router's {run.model.moe_router_num_groups} groups are not whole on {network.expert_nodes[0]} "
                  f"nodes, so that a token goes to {beyond:.2f} nodes more")
    return words


def _head(report: PlanReport) -> str:
    step, training = report.step, report.run.training
    return "\n".join([
        f"{report.run.name} on {step.setting.num_devices} x {report.hardware.name}, phase {report.phase}: "
        f"{training.global_batch_size} sequences of {training.seq_length} tokens a step",
        f"  {_layout_words(report.run)}, {step.num_microbatches} micro-batches",
        f"  assumed: {_assumptions(report)}",
        *([f"  FP8 scales: {report.hardware.fp8_scales}"] if report.run.fp8.is_enabled and report.hardware.fp8_scales
          else []),
        f"  step {_seconds(step.seconds)}   {_count(step.tokens_per_second)} tokens/s   "
        f"{_count(step.gpu_hours_per_trillion_tokens)} GPU-hours per 1T tokens",
        f"  {step.model_flops_per_second() / 1e12:.4g} TFLOP/s a device   MFU {step.mfu():.1%} causal, "
        f"{step.mfu(is_causal=False):.1%} non-causal, {step.mfu(with_mtp=True):.1%} causal with MTP"])


def _breakdown(report: PlanReport) -> str:
    lines = ["where the step goes (pipeline rank that waits least)"]
    for name, seconds in report.step.breakdown().items():
        if name not in _HIDDEN:
            lines.append(f"  {_STEP_WORDS[name]:32} {_seconds(seconds):>10} {seconds / report.step.seconds:6.1%}")
    lines += [f"  and beside compute: {_STEP_WORDS[name]} {_seconds(report.step.breakdown()[name])}"
              for name in _HIDDEN]
    return "\n".join(lines)


def _memory(report: PlanReport) -> str:
    names = [_MEMORY_WORDS[name] for name in _components(report.memory[0])]
    imbalance = report.step.setting.memory_terms(report.run)["imbalance"]
    lines = [f"memory by pipeline rank, GB: {_verdict(report)}",
             f"  a device has {report.headroom.describe()}; routed rows of a rank x {imbalance:.2f}",
             "  " + "rank".rjust(4) + "".join(name.rjust(15) for name in ("peak", *names))]
    for rank in report.memory:
        sizes = (rank.peak_bytes, *_components(rank).values())
        lines.append("  " + str(rank.pipeline_rank).rjust(4) + "".join(f"{size / 1e9:15.2f}" for size in sizes))
    worst = max(report.memory, key=lambda rank: rank.peak_bytes)
    lines.append(f"  fullest: rank {worst.pipeline_rank}, {worst.peak_bytes / 1e9:.2f} GB"
                 + ("; CPU is host memory" if worst.host_bytes else ""))
    lines += [f"  {remedy}" for remedy in report.remedies]
    size, num_processes = checkpoint_bytes(report.run), report.step.setting.num_devices
    lines.append(f"a checkpoint takes {format_bytes(size)} on disk; with --async-save its copy takes about "
                 f"{format_bytes(size // num_processes)} of host memory for each process")
    return "\n".join(lines)


def _verdict(report: PlanReport) -> str:
    if report.fits:
        return "fits"
    return f"DOES NOT FIT, {(report.peak_bytes - report.headroom.usable_bytes) / 1e9:.1f} GB too much"


def _phases(report: PlanReport) -> str:
    cost = report.cost
    lines = ["the run", f"  {'phase':16} {'steps':>9} {'tokens':>9} {'s/step':>9} {'days':>8} {'GPU-hours':>11} "
                        f"{'price':>12}"]
    for phase in cost.phases:
        if phase.seconds is None:
            lines.append(f"  {phase.name:16} {phase.num_steps:9.0f} {_count(phase.num_tokens):>9} cannot be done")
        else:
            assert phase.last_step is not None
            lines.append(f"  {phase.name:16} {phase.num_steps:9.0f} {_count(phase.num_tokens):>9} "
                         f"{phase.last_step.seconds:9.2f} {phase.days:8.2f} {_count(phase.gpu_hours):>11} "
                         f"{_price(cost.price(phase.gpu_hours)):>12}")
        if phase.note:
            lines.append(f"  {'':16} {phase.note}")
    lines.append(f"  {'total':16} {'':9} {_count(cost.num_tokens):>9} {'':9} {cost.days:8.2f} "
                 f"{_count(cost.gpu_hours):>11} {_price(cost.price(cost.gpu_hours)):>12}")
    return "\n".join(lines)


def _sensitivity(report: PlanReport) -> str:
    lines = ["what 10% more of each does to the step time"]
    lines += [f"  {_resource_words(name):44} {change:+7.2%}" for name, change in report.sensitivity.items()
              if abs(change) >= 5e-5]
    return "\n".join(lines)


def search_text(result: SearchResult) -> str:
    """The ranking, and the rejected layouts by reason."""
    lines = [f"search: {result.num_layouts} layouts, {result.num_simulated} simulated, {result.seconds:.1f} s",
             f"  {'':3} {'step':>9} {'GPU-h/1T':>10} {'MFU':>6} {'GB':>6}"]
    if result.ranked:
        lines[0] += "; take a place's flags in place of the run's own"
    for place, found in enumerate(result.ranked, start=1):
        lines.append(f"  {place:3} {_seconds(found.step.seconds):>9} "
                     f"{_count(found.step.gpu_hours_per_trillion_tokens):>10} {found.step.mfu():6.1%} "
                     f"{found.peak_bytes / 1e9:6.1f}  {found.layout.describe()}")
        lines.append(f"      {found.flags}")
    if not result.ranked:
        lines.append(f"  none works: {result.why_none()}")
    for kind, count in result.rejected_by_kind().items():
        lines.append(f"  {count} {_KIND_WORDS[kind]}, for example")
        # One layout says more than a group of them.
        examples = sorted((r for r in result.rejected if r.kind == kind), key=lambda r: r.count > 1)
        for rejected in examples[: 2]:
            where = "" if rejected.reason.startswith(rejected.layout) else f"{rejected.layout}: "
            lines.append(f"    {where}{rejected.reason}")
    return "\n".join(lines)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"


def _count(value: float | None) -> str:
    if value is None:
        return "-"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _price(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


# -- picture -----------------------------------------------------------------------------------------------------


def plot(report: PlanReport, path: str) -> None:
    """Draw a report as a PNG page: parts of a step, memory by rank, phases, and what more of each resource buys."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ((step, memory), (phases, sensitivity)) = plt.subplots(2, 2, figsize=(13, 9), constrained_layout=True)
    figure.suptitle(f"{report.run.name} on {report.step.setting.num_devices} x {report.hardware.name}: "
                    f"{report.step.seconds:.3g} s a step, "
                    f"{report.step.gpu_hours_per_trillion_tokens / 1e3:.4g}K GPU-hours per 1T tokens\n"
                    f"{_layout_words(report.run)}")
    parts = {_STEP_WORDS[name]: seconds for name, seconds in report.step.breakdown().items() if seconds > 0}
    step.barh(list(parts), list(parts.values()),
              color=["tab:gray" if name.startswith("hidden") else "tab:blue" for name in parts])
    step.invert_yaxis()
    step.set(title="a step (gray: beside compute)", xlabel="s")
    ranks = [str(rank.pipeline_rank) for rank in report.memory]
    below = [0.0] * len(ranks)
    for name in (name for name in _components(report.memory[0]) if name != "host"):
        sizes = [_components(rank)[name] / 1e9 for rank in report.memory]
        memory.bar(ranks, sizes, bottom=below, label=_MEMORY_WORDS[name])
        below = [low + size for low, size in zip(below, sizes, strict=True)]
    memory.axhline(report.headroom.visible_bytes / 1e9, color="black", linestyle="--", label="device")
    memory.axhline(report.headroom.usable_bytes / 1e9, color="tab:red", linestyle="--", label="left to the run")
    memory.set(xlabel="pipeline rank", ylabel="GB")
    memory.set_title(f"memory by pipeline rank: {_verdict(report)}", color="black" if report.fits else "tab:red")
    memory.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    costs = [(phase.name, phase.gpu_hours) for phase in report.cost.phases if phase.gpu_hours is not None]
    phases.bar([name for name, _ in costs], [hours / 1e3 for _, hours in costs])
    phases.tick_params(axis="x", rotation=20)
    phases.set(title=f"the run: {report.cost.gpu_hours / 1e3:.4g}K GPU-hours", ylabel="1000 GPU-hours")
    changes = dict(list(report.sensitivity.items())[:12])
    sensitivity.barh([_resource_words(name) for name in changes], [100 * change for change in changes.values()])
    sensitivity.invert_yaxis()
    sensitivity.set(title="10% more of it: change of the step time", xlabel="%")
    figure.savefig(path, dpi=110)
    plt.close(figure)
