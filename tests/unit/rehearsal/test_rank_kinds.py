"""Ranks of each kind, held to Megatron-Core's own numbering of ranks."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.rehearsal.rank_kinds import position_of, ranks_of_all_kinds, require_ranks


@pytest.mark.parametrize(("tp", "pp", "ep", "etp", "world"), [
    (1, 2, 4, 1, 8), (2, 2, 2, 1, 16), (2, 4, 2, 2, 32), (1, 16, 64, 1, 2048), (1, 1, 1, 1, 4)])
def test_every_pipeline_position_has_its_first_and_last_expert_position(tp: int, pp: int, ep: int, etp: int, world: int
                                                                        ) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                              expert_model_parallel_size=ep, expert_tensor_parallel_size=etp)
    order = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    pipelines = {rank: place for group in order.get_ranks("pp") for place, rank in enumerate(group)}
    experts = {rank: place for group in order.get_ranks("ep") for place, rank in enumerate(group)}
    found = [(pipelines[rank], experts[rank]) for rank in ranks_of_all_kinds(parallel, world)]
    wanted = range(ep) if pp * ep <= 16 else sorted({0, ep - 1})
    assert found == [(stage, place) for stage in range(pp) for place in wanted]
    assert all(position_of(rank, parallel, world) == (pipelines[rank], experts[rank]) for rank in range(world))


def test_ranks_asked_for_are_of_the_run() -> None:
    assert require_ranks([3, 0, 3], 4) == (0, 3)
    with pytest.raises(ConfigError, match="--ranks 4 must be from 0 to 3, below --world-size=4"):
        require_ranks([4], 4)
    with pytest.raises(ConfigError, match="--ranks -1 must"):
        require_ranks([-1], 4)
