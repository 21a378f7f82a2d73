"""Which parameters AdamW decays."""

from __future__ import annotations

import pytest

from dsv3_megatron.certification.random_samples import RandomSamples
from dsv3_megatron.certification.rank_step import MadeDataTrainer
from dsv3_megatron.certification.shrunk_run import shrink
from dsv3_megatron.config.load import parse_command
from dsv3_megatron.optim.shards import master_shards
from dsv3_megatron.parallel.groups import destroy_groups


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_matrices_are_decayed_and_vectors_are_not(dtype: str) -> None:
    run = shrink(parse_command(["--preset", "tiny", "--weight-decay", "0.3"]).run, 1, 1).run
    run = run.override(exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype)
    trainer = MadeDataTrainer(run, RandomSamples.of_run(run, 1))
    decays: dict[int, set[float]] = {}
    for shard in master_shards(trainer.optimizer, list(trainer.chunks), trainer.groups):
        (group,) = [group for group in shard.part.optimizer.param_groups
                    if any(weight is shard.master for weight in group["params"])]
        decays.setdefault(shard.parameter.dim(), set()).add(group["weight_decay"])
    assert decays == {1: {0.0}, 2: {0.3}, 3: {0.3}}
    destroy_groups()
