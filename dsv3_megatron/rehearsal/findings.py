"""What a rehearsal found, as text and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.memory.estimate import RankMemory
from dsv3_megatron.rehearsal.collective_calls import calls_of_json
from dsv3_megatron.rehearsal.live_memory import (
    ACTIVATIONS,
    BUFFERS,
    COMMUNICATION,
    FP8_WEIGHTS,
    GRADIENTS,
    OPTIMIZER,
    PARAMETERS,
    WORKING,
)
from dsv3_megatron.rehearsal.message_comparison import Mismatch, compare_calls, name_group
from dsv3_megatron.rehearsal.rank_results import FIRST_STEP, RESUMING, SAVING, STEP, RankResult
from dsv3_megatron.rehearsal.totals import calls_in, made_once, moe_passes, totals, work_of_step

NOT_SEEN = ("values, and so what NaN or a real router would do; time; what kernels do inside, and whether they "
            "compile; workspaces but FlashAttention 2's, fragmentation and NCCL's buffers; other ranks than those "
            "rehearsed")
# A peak further from the planner's than this part of it and so many bytes: one has something that the other has not.
TOLERANCE, TOLERANCE_BYTES = 0.02, 1 << 20
_NUM_LINES = 12
# More ranks than these are a line each, and one of them, the fullest, in full.
_NUM_IN_FULL = 4
_STATE = (PARAMETERS, GRADIENTS, OPTIMIZER, BUFFERS)
# Attributes of the planner's estimate that a component is the sum of.
_PLANNED = {
    PARAMETERS: ("parameter_bytes",), GRADIENTS: ("gradient_bytes",), OPTIMIZER: ("optimizer_bytes",),
    BUFFERS: ("buffer_bytes",), FP8_WEIGHTS: ("fp8_weight_bytes",),
    ACTIVATIONS: ("activation_bytes", "deferred_bytes"), WORKING: ("working_bytes",),
    COMMUNICATION: ("communication_bytes",)}


@dataclass(frozen=True)
class Rehearsal:
    """Ranks of a run, rehearsed.

    Attributes:
        run: The run that was rehearsed, of one phase and with the micro-batches of the rehearsal.
        world_size: Processes of the run.
        asked_microbatches: Micro-batches of a step of the run as it was asked for.
        device_bytes: Memory of a GPU, in bytes.
        ranks: What each rank did.
        planned: The planner's estimate for each rank that was rehearsed; none for a run that it does not know.
    """

    run: RunConfig
    world_size: int
    asked_microbatches: int
    device_bytes: int
    ranks: tuple[RankResult, ...]
    planned: Mapping[int, RankMemory]

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of the step that was rehearsed."""
        return self.run.training.num_microbatches(self.run.parallel.data_parallel_size(self.world_size))

    def mismatches(self) -> list[Mismatch]:
        """What ranks that share a group do not agree about; ranks that failed are left out."""
        return compare_calls({rank.rank: calls_of_json(rank.calls) for rank in self.ranks if rank.failure is None})

    def deviation(self, rank: RankResult) -> float:
        """A rank's peak beyond the planner's, as a part of it."""
        return rank.step.peak / self.planned[rank.rank].peak_bytes - 1

    def is_off(self, rank: RankResult) -> bool:
        """Whether a rank's peak is too far from the planner's for both to be right."""
        if rank.rank not in self.planned:
            return False
        planned = self.planned[rank.rank].peak_bytes
        return abs(rank.step.peak - planned) > TOLERANCE * planned + TOLERANCE_BYTES

    def findings(self) -> list[str]:
        """What is wrong, a line each; none: nothing that a rehearsal sees."""
        found = []
        for rank in self.ranks:
            if rank.failure is not None:
                found.append(f"rank {rank.rank} ends in an error: {rank.failure}")
            found += [f"rank {rank.rank}: {text}\n      at {line}" + (f", {count} times" if count > 1 else "")
                      for text, line, count in rank.faults]
            if rank.failure is None and self.is_off(rank):
                found.append(f"rank {rank.rank}: the peak is {self.deviation(rank):+.1%} from the planner's: one of "
                             "the two has something that the other has not; see its lines")
            if rank.step.allocated > self.device_bytes:
                found.append(f"rank {rank.rank}: {_gib(rank.step.allocated)} do not fit into a GPU of "
                             f"{_gib(self.device_bytes)}; dsv3 plan names remedies")
        return found + [mismatch.describe() for mismatch in self.mismatches()]


def _gib(size: float) -> str:
    """Bytes in the unit that fits."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.2f} MiB"


def as_text(rehearsal: Rehearsal) -> str:
    """The report for a terminal."""
    run, parallel = rehearsal.run, rehearsal.run.parallel
    lines = [f"{run.name} on {rehearsal.world_size} GPUs, PP{parallel.pipeline_model_parallel_size} "
             f"EP{parallel.expert_model_parallel_size} TP{parallel.tensor_model_parallel_size}, "
             f"{parallel.schedule}: {len(rehearsal.ranks)} ranks rehearsed, a step of {rehearsal.num_microbatches} "
             f"micro-batches (the run's has {rehearsal.asked_microbatches})"]
    in_full = rehearsal.ranks
    if len(rehearsal.ranks) > _NUM_IN_FULL:
        lines += ["", *_table(rehearsal)]
        in_full = (max(rehearsal.ranks, key=lambda rank: rank.step.peak),)
    for rank in in_full:
        lines += ["", *_rank_lines(rehearsal, rank)]
    found = rehearsal.findings()
    lines += ["", f"Found: {len(found)}" if found else "Found: nothing"]
    lines += [f"  {number}. {text}" for number, text in enumerate(found, 1)]
    return "\n".join([*lines, "", f"Not seen in a rehearsal: {NOT_SEEN}."])


def _table(rehearsal: Rehearsal) -> list[str]:
    """A line for each rank."""
    lines = [f"{'rank':>6} {'pipeline':>8} {'expert':>6} {'peak':>12} {'planner':>12} {'off':>7} {'waits':>6} "
             f"{'launches':>8} {'messages':>8} {'CPU s':>6}"]
    for rank in rehearsal.ranks:
        sums = totals(rank)
        lines.append(
            f"{rank.rank:>6} {rank.pipeline_rank:>8} {rank.expert_rank:>6} {_gib(rank.step.peak):>12} "
            f"{_planned_peak(rehearsal, rank):>20} "
            f"{sums['host_waits']:>6} {sums['launches']:>8} {sums['messages']:>8} {rank.cpu_seconds:>6.0f}"
            + ("" if rank.failure is None else f"  failed in {rank.failed_in}"))
    return lines


def _rank_lines(rehearsal: Rehearsal, rank: RankResult) -> list[str]:
    lines = [f"rank {rank.rank}: pipeline rank {rank.pipeline_rank}, expert rank {rank.expert_rank} "
             f"({rank.seconds:.0f} s, {rank.cpu_seconds:.0f} s of CPU)"]
    if rank.failure is not None:
        lines.append(f"  ended in an error in {rank.failed_in or 'its process'}, see below; so far:")
    if not rank.peaks:
        return lines
    planned = rehearsal.planned.get(rank.rank)
    if rank.step.peak:
        beside = ("no estimate of the planner's, which does not know split sequences yet" if planned is None else
                  f"planner {_gib(planned.peak_bytes)} ({rehearsal.deviation(rank):+.1%})")
        lines += [f"  peak {_gib(rank.step.peak)}, {beside}; {_gib(rank.step.allocated)} in the allocator's blocks; at "
                  f"{rank.step.at}"]
        lines += [f"    {name:<14} {_gib(size):>12}" + ("" if planned is None else f"  planner {_gib(other):>12}")
                  for name, size, other in memory_rows(rank, planned)]
        lines += ["  largest at the peak, beside the run's state:"] + [
            f"    {_gib(size):>12}  {line}  {operation}" for line, operation, kind, size
            in [line for line in rank.step.lines if line[2] not in _STATE][:_NUM_LINES]]
    lines += [f"  peak of {phase}: {_gib(peak.peak)} at {peak.at}" for phase, peak in rank.peaks.items()
              if phase not in (STEP, FIRST_STEP)]
    if rank.saved_bytes is not None:
        lines.append(f"  writes {_gib(rank.saved_bytes)} into a checkpoint")
    return lines + _work_lines(rehearsal, rank)


def _work_lines(rehearsal: Rehearsal, rank: RankResult) -> list[str]:
    """What a rank does in a step: totals, waits, kernels, groups, messages."""
    work, sums = work_of_step(rank), totals(rank)
    passes = moe_passes(rehearsal.run, rank.pipeline_rank, rehearsal.num_microbatches)
    which = "a step" if rank.step_phase == STEP else "the first step, with what is made once,"
    lines = [f"  {which}: {sums['host_waits']} host waits, {sums['copies']} copies without waiting, at least "
             f"{sums['launches']} launches, {sums['messages']} messages of {_gib(sums['message_bytes'])}; "
             f"{passes} passes through an MoE layer", "  waits:"]
    for text, line, count in work.waits[:_NUM_LINES]:
        each = f", {count // passes} a micro-batch and MoE layer" if passes and not count % passes else ""
        lines.append(f"    {count:>6}  {text}  {line}{each}")
    if once := made_once(rank):
        lines.append(f"  in the first step alone, {sum(once.values())} waits more:")
        lines += [f"    {count:>6}  {text}  {line}" for (text, line), count in list(once.items())[:_NUM_LINES]]
    if work.assumed:
        lines.append("  numbers that the host read and a rehearsal does not know, taken for ones:")
        lines += [f"    {count:>6}  {text}  {line}" for text, line, count in work.assumed[:_NUM_LINES]]
    lines.append("  kernels, most by " + ", ".join(f"{name} {count}" for name, count
                                                   in list(work.launches.items())[:5]))
    lines.append(f"  groups: {rank.group_calls} calls of new_group, in {rank.groups[0]} of them, "
                 f"{rank.groups[1]} of these alone")
    for phase in (rank.step_phase, SAVING, RESUMING):
        if rows := message_rows(rank, phase):
            lines += [f"  messages, {phase}:"] + [
                f"    {count:>6}  {operation}, {dtype}, {size / 1e6:.3f} MB each, {group}, at {line}"
                for (operation, dtype, group, line), (count, size) in rows.items()]
    return lines


def _planned_peak(rehearsal: Rehearsal, rank: RankResult) -> str:
    """The planner's peak of a rank, and how far it is off."""
    if rank.rank not in rehearsal.planned:
        return "none"
    return f"{_gib(rehearsal.planned[rank.rank].peak_bytes):>12} {rehearsal.deviation(rank):>+7.1%}"


def memory_rows(rank: RankResult, planned: RankMemory | None) -> list[tuple[str, int, int]]:
    """Components of a rank's peak: name, bytes seen, bytes planned; 0 where nothing is.

    Without a pipeline nothing says when a pass begins: what passes keep and what they work with are one row.
    """
    rows = [(name, rank.step.components.get(name, 0), sum(getattr(planned, part, 0) for part in parts))
            for name, parts in _PLANNED.items()]
    if rank.step.components.get(ACTIVATIONS):
        return rows
    merged = [sum(column) for column in zip(*(row[1:] for row in rows if row[0] in (ACTIVATIONS, WORKING)),
                                            strict=True)]
    return [row for row in rows if row[0] not in (ACTIVATIONS, WORKING)] + [
        ("passes", merged[0], merged[1])]


def message_rows(rank: RankResult, phase: str) -> dict[tuple[str, str, str, str], tuple[int, float]]:
    """Messages of a phase by operation, dtype, group and line: their number, and bytes of each on average."""
    count: Counter[tuple[str, str, str, str]] = Counter()
    size: Counter[tuple[str, str, str, str]] = Counter()
    for call in calls_in(rank, phase):
        key = (call.operation, call.dtype, name_group(call.group), call.line)
        count[key] += 1
        size[key] += call.num_bytes
    return {key: (number, size[key] / number) for key, number in count.most_common()}


def as_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "preset": rehearsal.run.name, "world_size": rehearsal.world_size,
        "num_microbatches": rehearsal.num_microbatches, "run_microbatches": rehearsal.asked_microbatches,
        "device_bytes": rehearsal.device_bytes, "ranks": [_rank_json(rehearsal, rank) for rank in rehearsal.ranks],
        "found": rehearsal.findings(), "not_seen": NOT_SEEN}


def _rank_json(rehearsal: Rehearsal, rank: RankResult) -> Mapping[str, Any]:
    planned, work = rehearsal.planned.get(rank.rank), work_of_step(rank)
    return {
        "rank": rank.rank, "pipeline_rank": rank.pipeline_rank, "expert_rank": rank.expert_rank,
        "seconds": rank.seconds, "cpu_seconds": rank.cpu_seconds, "failure": rank.failure,
        "failed_in": rank.failed_in, "built_bytes": rank.built_bytes, "saved_bytes": rank.saved_bytes,
        "is_first_step": rank.step_phase == FIRST_STEP, "totals": totals(rank),
        "moe_passes": moe_passes(rehearsal.run, rank.pipeline_rank, rehearsal.num_microbatches),
        "peak_bytes_by_phase": {phase: peak.peak for phase, peak in rank.peaks.items()},
        "peak_bytes": rank.step.peak, "allocated_bytes": rank.step.allocated, "peak_at": rank.step.at,
        "planned_peak_bytes": None if planned is None else planned.peak_bytes,
        "components": [{"name": name, "bytes": size, "planned_bytes": None if planned is None else other}
                       for name, size, other in memory_rows(rank, planned)],
        "lines": [{"line": line, "operation": operation, "component": kind, "bytes": size}
                  for line, operation, kind, size in rank.step.lines],
        "waits": _counted(work.waits), "copies": _counted(work.copies), "launches": work.launches,
        "assumed": _counted(work.assumed),
        "made_once": _counted([(what, line, count) for (what, line), count in made_once(rank).items()]),
        "faults": _counted(rank.faults), "new_group_calls": rank.group_calls, "groups": rank.groups[0],
        "groups_alone": rank.groups[1],
        "messages": [{"phase": phase, "operation": operation, "dtype": dtype, "group": group, "line": line,
                      "count": count, "mean_bytes": size} for phase in (rank.step_phase, SAVING, RESUMING)
                     for (operation, dtype, group, line), (count, size) in message_rows(rank, phase).items()]}


def _counted(rows: Sequence[tuple[str, str, int]]) -> list[dict[str, Any]]:
    return [{"what": what, "line": line, "count": count} for what, line, count in rows]
