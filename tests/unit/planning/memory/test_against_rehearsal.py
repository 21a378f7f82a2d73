"""The estimate is within 2% of what a rehearsed rank holds: dsv3-16b at its widths with few layers, all on one node.

Each case is another rank of one rehearsal, so that they share a process's imports. A case takes two to four seconds.
`python -m tools.bench.bench_rehearsal` compares the presets at their full size.
"""

from __future__ import annotations

import pytest

from dsv3_megatron.config.load import parse_command
from dsv3_megatron.planning.memory.estimate import estimate_memory
from dsv3_megatron.rehearsal.rank_processes import rehearse_ranks
from dsv3_megatron.rehearsal.rank_results import RankResult, RankTask
from dsv3_megatron.rehearsal.rehearsed_run import rehearsed_run

TOLERANCE = 0.02
WORLD_SIZE = 32
# The first layer is dense.
FLAGS = ("--preset", "dsv3-16b", "--num-layers", "4", "--pipeline-model-parallel-size", "2", "--global-batch-size",
         "64", "--transformer-impl", "local")
FP8 = ("--fp8", "blockwise")
SELECTIVE = ("--recompute-granularity", "selective")
# Ranks below 16 are on the first pipeline rank, the others on the last.
CASES = {
    0: ("--pipeline-schedule", "1f1b"),
    16: ("--pipeline-schedule", "1f1b"),
    1: ("--pipeline-schedule", "1f1b", *FP8, *SELECTIVE),
    17: ("--pipeline-schedule", "dualpipe", *SELECTIVE),
    2: ("--pipeline-schedule", "dualpipe", *FP8),
    3: ("--pipeline-schedule", "dualpipev"),
    18: ("--pipeline-schedule", "dualpipev", *FP8),
    4: ("--pipeline-schedule", "1f1b", "--context-parallel-size", "2", *FP8, *SELECTIVE),
    19: ("--pipeline-schedule", "dualpipev", "--context-parallel-size", "2", "--cp-comm-type", "a2a"),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsed() -> dict[int, RankResult]:
    tasks = [RankTask((*FLAGS, *flags), rank, WORLD_SIZE) for rank, flags in CASES.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)  # a GPU's kernels are started, not interpreted
        return {result.rank: result for result in rehearse_ranks(tasks, num_processes=1)}


@pytest.mark.parametrize("rank", CASES)
def test_a_rank_holds_what_is_estimated(rank: int, rehearsed: dict[int, RankResult]) -> None:
    result = rehearsed[rank]
    assert result.failure is None, result.failure
    run = rehearsed_run(parse_command((*FLAGS, *CASES[rank])).run, WORLD_SIZE)
    estimated = estimate_memory(run, WORLD_SIZE)[result.pipeline_rank]
    assert result.pipeline_rank == rank // 16
    assert estimated.peak_bytes == pytest.approx(result.step.peak, rel=TOLERANCE)
    # What passes hold alone: states are the same to the byte, and would hide a part of an error.
    states = estimated.parameter_bytes + estimated.gradient_bytes + estimated.optimizer_bytes
    assert estimated.peak_bytes - states == pytest.approx(result.step.peak - states, rel=2 * TOLERANCE)
    for name, size in (("parameters", estimated.parameter_bytes), ("gradients", estimated.gradient_bytes),
                       ("FP8 weights", estimated.fp8_weight_bytes)):
        assert result.step.components.get(name, 0) == size
