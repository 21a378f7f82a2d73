"""How many of the processes at hand a run can use, beside trying every size."""

from __future__ import annotations

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.presets import preset
from dsv3_megatron.config.world_size import largest_world_size


@pytest.mark.parametrize(("changes", "expected"), [
    ({"global_batch_size": 8, "micro_batch_size": 1}, {1: 1, 3: 2, 6: 4, 7: 4, 8: 8, 20: 8}),
    ({"global_batch_size": 12, "micro_batch_size": 1, "expert_model_parallel_size": 2},
     {2: 2, 5: 4, 6: 6, 11: 6, 12: 12}),
    ({"global_batch_size": 12, "micro_batch_size": 1, "pipeline_model_parallel_size": 2,
      "pipeline_schedule": "1f1b"}, {2: 2, 3: 2, 7: 6, 9: 8}),
])
def test_the_largest_size_that_every_rule_allows(changes, expected) -> None:
    run = preset("tiny").override(**changes)
    assert {size: largest_world_size(run, size) for size in expected} == expected


def test_too_few_processes() -> None:
    run = preset("tiny").override(pipeline_model_parallel_size=4, pipeline_schedule="1f1b", global_batch_size=8)
    with pytest.raises(ConfigError, match="cannot be on 3 process.es. or fewer: its layout needs 4; set NNODES so"):
        largest_world_size(run, 3)
    wrong = run.override(micro_batch_size=3)
    with pytest.raises(ConfigError, match="cannot be on 8 process.es. or fewer: micro_batch_size=3"):
        largest_world_size(wrong, 8)
