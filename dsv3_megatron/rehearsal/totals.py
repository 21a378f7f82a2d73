"""What a rehearsed rank does in a step, in few numbers: to be compared before and after a change of the library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3_megatron.config.pipeline import RULES
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.metrics.rank_state import stages_of
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.rehearsal.collective_calls import RankCall, calls_of_json
from dsv3_megatron.rehearsal.rank_results import FIRST_STEP, PhaseWork, RankResult

# Waits by what for and line: their number.
WaitCounts = dict[tuple[str, str], int]


def moe_passes(run: RunConfig, pipeline_rank: int, num_microbatches: int) -> int:
    """Forward passes of a micro-batch through an MoE layer that a rank has in a step, MTP modules' included."""
    model, stages = run.model, stages_of(run.model, run.parallel)
    held = [stages[place.stage] for place in placement(run.parallel)[pipeline_rank]]
    layers = sum(sum(layer >= model.num_dense_layers for layer in stage.layer_ids)
                 + len(stage.mtp_layer_ids) for stage in held) if model.num_moe_layers else 0
    return layers * num_microbatches // RULES[run.parallel.schedule].copies


def work_of_step(rank: RankResult) -> PhaseWork:
    """What a rank does in the last step that it took."""
    return rank.work.get(rank.step_phase, PhaseWork())


def made_once(rank: RankResult) -> WaitCounts:
    """Waits of the first step that the next one has not, by what for and line; empty if there was one step."""
    if rank.step_phase == FIRST_STEP or rank.failed_in is not None:
        return {}
    counts = Counter({(what, line): count for what, line, count in rank.work[FIRST_STEP].waits})
    counts.subtract({(what, line): count for what, line, count in work_of_step(rank).waits})
    return {key: count for key, count in counts.most_common() if count > 0}


def calls_in(rank: RankResult, phase: str) -> Sequence[RankCall]:
    """Messages of a phase, in order."""
    return [call for call in calls_of_json(rank.calls) if call.phase == phase]


def totals(rank: RankResult) -> Mapping[str, Any]:
    """Numbers of a rank's step: host waits, copies, kernels, messages, and bytes that it gives to other ranks."""
    work, calls = work_of_step(rank), calls_in(rank, rank.step_phase)
    by_kind: dict[str, dict[str, int]] = {}
    for call in calls:
        row = by_kind.setdefault(f"{call.operation} over {len(call.ranks)}", {"count": 0, "bytes": 0})
        row["count"] += 1
        row["bytes"] += call.num_bytes
    return {
        "host_waits": sum(count for _, _, count in work.waits), "copies": sum(count for _, _, count in work.copies),
        "launches": sum(work.launches.values()), "messages": len(calls),
        "message_bytes": sum(call.num_bytes for call in calls), "messages_by_kind": by_kind}
