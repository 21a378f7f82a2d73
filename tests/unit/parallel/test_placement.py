"""Which stages a pipeline rank holds: the published drawings, and that every stage of each copy is held once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.parallel.placement import place_stages, placement


@pytest.mark.parametrize(("schedule", "ranks", "stages", "expected"), [
    ("1f1b", 3, 1, [[(0, 0)], [(0, 1)], [(0, 2)]]),
    ("zb1p", 2, 1, [[(0, 0)], [(0, 1)]]),
    ("1f1b", 2, 2, [[(0, 0), (0, 2)], [(0, 1), (0, 3)]]),
    # A V: down the ranks and up again, so that the first rank has the first stage and the last.
    ("dualpipev", 2, 2, [[(0, 0), (0, 3)], [(0, 1), (0, 2)]]),
    ("zbv", 3, 2, [[(0, 0), (0, 5)], [(0, 1), (0, 4)], [(0, 2), (0, 3)]]),
    # Two copies in opposite directions, the nearer end first.
    ("dualpipe", 4, 1, [[(0, 0), (1, 3)], [(0, 1), (1, 2)], [(1, 1), (0, 2)], [(1, 0), (0, 3)]])])
def test_by_hand(schedule, ranks, stages, expected):
    assert [[tuple(place) for place in held] for held in place_stages(schedule, ranks, stages)] == expected


@given(st.sampled_from(["1f1b", "zb1p", "interleaved", "dualpipev", "zbv", "dualpipe"]), st.integers(1, 8),
       st.integers(1, 4))
def test_every_stage_of_each_copy_is_held_once(schedule, ranks, stages):
    ranks, stages = (2 * ranks, 1) if schedule == "dualpipe" else (ranks, stages)
    held = [place for places in place_stages(schedule, ranks, stages) for place in places]
    copies = 2 if schedule == "dualpipe" else 1
    each = 2 * ranks if schedule in ("dualpipev", "zbv") else ranks * stages
    assert sorted(held) == [(copy, stage) for copy in range(copies) for stage in range(each)]


def test_of_a_run():
    parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule="dualpipe")
    assert placement(parallel) == place_stages("dualpipe", 2, 1)
