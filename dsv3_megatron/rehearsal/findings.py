"""What a rehearsal found, as text and as plain values for JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.planning.memory.estimate import RankMemory
from dsv3_megatron.rehearsal.collective_calls import RankCall, calls_of_json
from dsv3_megatron.rehearsal.message_comparison import Mismatch, compare_calls, name_group
from dsv3_megatron.rehearsal.rehearsed_rank import RankResult

NOT_SEEN = ("values, and so what NaN or a real router would do; time; what kernels do inside, and whether they "
            "compile; workspaces, fragmentation and NCCL's buffers; other ranks than those rehearsed")
# A peak further from the planner's than this part of it and so many bytes: one has something that the other has not.
TOLERANCE, TOLERANCE_BYTES = 0.05, 1 << 20
_NUM_LINES = 12
_COMPONENTS = {"parameters": "parameter_bytes", "gradients": "gradient_bytes", "optimizer": "optimizer_bytes",
               "FP8 weights": "fp8_weight_bytes"}


@dataclass(frozen=True)
class Rehearsal:
    """Ranks of a run, rehearsed.

    Attributes:
        run: The run that was rehearsed, of one phase and with the micro-batches of the rehearsal.
        world_size: Processes of the run.
        asked_microbatches: Micro-batches of a step of the run as it was asked for.
        device_bytes: Memory of a GPU, in bytes.
        ranks: What each rank did.
        planned: The planner's estimate for each rank that was rehearsed.
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
    lines = [f"{run.preset} on {rehearsal.world_size} GPUs, PP{parallel.pipeline_model_parallel_size} "
             f"EP{parallel.expert_model_parallel_size} TP{parallel.tensor_model_parallel_size}, "
             f"{parallel.schedule}: {len(rehearsal.ranks)} ranks rehearsed, a step of {rehearsal.num_microbatches} "
             f"micro-batches (the run's has {rehearsal.asked_microbatches})"]
    for rank in rehearsal.ranks:
        lines += ["", *_rank_lines(rehearsal, rank)]
    found = rehearsal.findings()
    lines += ["", f"Found: {len(found)}" if found else "Found: nothing"]
    lines += [f"  {number}. {text}" for number, text in enumerate(found, 1)]
    return "\n".join([*lines, "", f"Not seen in a rehearsal: {NOT_SEEN}."])


def _rank_lines(rehearsal: Rehearsal, rank: RankResult) -> list[str]:
    head = (f"rank {rank.rank}: pipeline rank {rank.pipeline_rank}, expert rank {rank.expert_rank} "
            f"({rank.seconds:.0f} s)")
    if rank.failure is not None:
        return [head, "  ended in an error; see below"]
    planned = rehearsal.planned[rank.rank]
    lines = [head, f"  peak {_gib(rank.step.peak)}, planner {_gib(planned.peak_bytes)} "
                   f"({rehearsal.deviation(rank):+.1%}); {_gib(rank.step.allocated)} in the allocator's blocks; at "
                   f"{rank.step.at}"]
    lines += [f"    {name:<14} {_gib(size):>12}  planner {_gib(other):>12}"
              for name, size, other in memory_rows(rank, planned)]
    lines += ["  largest at the peak:"] + [
        f"    {_gib(size):>12}  {line}  {operation}" for line, operation, kind, size in rank.step.lines[:_NUM_LINES]
        if kind == "passes"]
    waits = sum(count for _, _, count in rank.waits)
    lines += [f"  the host waits {waits} times a step:"] + [
        f"    {count:>6}  {text}  {line}" for text, line, count in rank.waits[:_NUM_LINES]]
    lines.append(f"  kernels started: at least {sum(rank.launches.values())}, most by "
                 + ", ".join(f"{name} {count}" for name, count in list(rank.launches.items())[:5]))
    lines.append(f"  groups: {rank.group_calls} calls of new_group, in {rank.groups[0]} of them, "
                 f"{rank.groups[1]} of these alone")
    return lines + ["  messages a step:"] + [
        f"    {count:>6}  {operation}, {dtype}, {size / 1e6:.3f} MB each, {group}"
        for (operation, dtype, group), (count, size) in message_rows(rank).items()]


def memory_rows(rank: RankResult, planned: RankMemory) -> list[tuple[str, int, int]]:
    """Components of a rank's peak: name, bytes seen, bytes planned. What passes make and small buffers are one."""
    rows = [(name, rank.step.components.get(name, 0), getattr(planned, field)) for name, field in _COMPONENTS.items()]
    rest = sum(size for name, size in rank.step.components.items() if name not in _COMPONENTS)
    return [*rows, ("passes", rest, planned.peak_bytes - sum(size for _, _, size in rows))]


def message_rows(rank: RankResult) -> dict[tuple[str, str, str], tuple[int, float]]:
    """Messages of a step by operation, dtype and group: their number, and bytes of each on average."""
    count: Counter[tuple[str, str, str]] = Counter()
    size: Counter[tuple[str, str, str]] = Counter()
    for call in _step_calls(rank):
        key = (call.operation, call.dtype, name_group(call.group))
        count[key] += 1
        size[key] += call.num_bytes
    return {key: (number, size[key] / number) for key, number in count.most_common()}


def _step_calls(rank: RankResult) -> Sequence[RankCall]:
    return [call for call in calls_of_json(rank.calls) if call.is_of_step]


def as_json(rehearsal: Rehearsal) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "preset": rehearsal.run.preset, "world_size": rehearsal.world_size,
        "num_microbatches": rehearsal.num_microbatches, "run_microbatches": rehearsal.asked_microbatches,
        "device_bytes": rehearsal.device_bytes, "ranks": [_rank_json(rehearsal, rank) for rank in rehearsal.ranks],
        "found": rehearsal.findings(), "not_seen": NOT_SEEN}


def _rank_json(rehearsal: Rehearsal, rank: RankResult) -> Mapping[str, Any]:
    planned = rehearsal.planned[rank.rank]
    return {
        "rank": rank.rank, "pipeline_rank": rank.pipeline_rank, "expert_rank": rank.expert_rank,
        "seconds": rank.seconds, "failure": rank.failure, "built_bytes": rank.built_bytes,
        "building_peak_bytes": rank.building.peak, "peak_bytes": rank.step.peak,
        "allocated_bytes": rank.step.allocated, "peak_at": rank.step.at, "planned_peak_bytes": planned.peak_bytes,
        "components": [{"name": name, "bytes": size, "planned_bytes": other}
                       for name, size, other in memory_rows(rank, planned)],
        "lines": [{"line": line, "operation": operation, "component": kind, "bytes": size}
                  for line, operation, kind, size in rank.step.lines],
        "waits": [{"what": text, "line": line, "count": count} for text, line, count in rank.waits],
        "copies": [{"what": text, "line": line, "count": count} for text, line, count in rank.copies],
        "launches": rank.launches, "faults": [{"what": text, "line": line, "count": count}
                                              for text, line, count in rank.faults],
        "new_group_calls": rank.group_calls, "groups": rank.groups[0], "groups_alone": rank.groups[1],
        "messages": [{"operation": operation, "dtype": dtype, "group": group, "count": count, "mean_bytes": size}
                     for (operation, dtype, group), (count, size) in message_rows(rank).items()]}
