"""Few numbers of a rank's step, by hand."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.rehearsal.collective_calls import RankCall, calls_as_json
from dsv3_megatron.rehearsal.rank_results import FIRST_STEP, STEP, Memory, PhaseWork, RankResult
from dsv3_megatron.rehearsal.totals import made_once, moe_passes, totals

CALLS = [RankCall("all_reduce", (0, 1), 0, "float32", ((8,),), None, 32, "a.py:1", FIRST_STEP),
         RankCall("all_reduce", (0, 1), 0, "float32", ((8,),), None, 32, "a.py:1", STEP),
         RankCall("all_reduce", (0, 1), 1, "int64", ((8,),), None, 64, "a.py:2", STEP)]
FIRST = PhaseWork([("a number is read", "a.py:3", 5), ("bincount", "a.py:4", 2)], [], {"mm": 9})
SECOND = PhaseWork([("a number is read", "a.py:3", 3), ("bincount", "a.py:4", 2)], [("host to device", "a.py:5", 4)],
              {"mm": 7, "add": 1})


def result(**changes: object) -> RankResult:
    given = {"peaks": {FIRST_STEP: Memory(2), STEP: Memory(1)}, "work": {FIRST_STEP: FIRST, STEP: SECOND},
             "calls": calls_as_json(CALLS)}
    return RankResult(0, **{**given, **changes})  # type: ignore[arg-type]


def test_totals_are_those_of_the_last_step() -> None:
    assert totals(result()) == {
        "host_waits": 5, "copies": 4, "launches": 8, "messages": 2, "message_bytes": 96,
        "messages_by_kind": {"all_reduce over 2": {"count": 2, "bytes": 96}}}
    assert result().step.peak == 1


def test_what_the_first_step_alone_does_is_made_once() -> None:
    assert made_once(result()) == {("a number is read", "a.py:3"): 2}


def test_of_one_step_nothing_is_known_to_be_made_once() -> None:
    only = result(peaks={FIRST_STEP: Memory(2)}, work={FIRST_STEP: FIRST})
    assert made_once(only) == {} and totals(only)["host_waits"] == 7


def test_a_second_step_that_failed_takes_nothing_from_the_first() -> None:
    assert made_once(result(failure="an error", failed_in=STEP)) == {}


@pytest.mark.parametrize(("schedule", "stages", "wanted"), [
    ("1f1b", 4, [10, 20, 20, 20]), ("dualpipe", 4, [15, 20, 20, 15])])
def test_passes_through_moe_layers_are_layers_times_their_micro_batches(schedule: str, stages: int, wanted: list[int]
                                                                         ) -> None:
    """Eight layers, the first one dense; an MTP module; ten micro-batches: of DualPipe, five from each end."""
    run = preset("tiny").override(
        num_layers=7, num_dense_layers=1, pipeline_model_parallel_size=stages, pipeline_schedule=schedule,
        global_batch_size=10, micro_batch_size=1)
    ranks = estimate_memory(run, stages)
    assert [moe_passes(run, rank.pipeline_rank, 10) for rank in ranks] == wanted
