"""Which ranks have the copies of the embedding whose gradients are summed; the groups themselves need processes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.config.presets import preset

TINY = preset("tiny").model


@pytest.fixture(scope="module")
def megatron_core() -> Iterator[None]:
    """Megatron-Core, importable without CUDA; the stand-ins are taken back unless they were there before."""
    from dsv3_megatron.platform import cpu, prepare

    was_installed = cpu.installed()
    prepare()
    yield
    if not was_installed:
        cpu.remove_stand_ins()


@pytest.mark.parametrize(("schedule", "ranks", "virtual", "layout", "copies"), [
    ("1f1b", 4, 1, None, ((0, 3), (1,), (2,), (0, 3))),
    ("1f1b", 4, 1, "Ett|t|t|mL", ((0, 3), (1,), (2,), (0, 3))),
    ("1f1b", 4, 1, "Ett|tt|m|L", ((0, 2), (1,), (0, 2), (3,))),
    ("1f1b", 3, 1, "Ett|ttm|L", ((0, 1), (0, 1), (2,))),
    ("zb1p", 2, 1, "Ettttm|L", ((0,), (1,))),
    # Both stages are on rank 0.
    ("interleaved", 2, 2, "Ett|tt|m|L", ((0,), (1,))),
    ("interleaved", 2, 2, "Ett|t|t|mL", ((0, 1), (0, 1))),
    # Folded: the last stage is on rank 0, the one before it on rank 1.
    ("zbv", 2, 1, "Et|tt|t|mL", ((0,), (1,))),
    ("dualpipev", 2, 1, "Ett|tt|m|L", ((0, 1), (0, 1))),
    # Mirrored ranks are summed before: ranks 0 and 3 with each other, 1 and 2 with each other.
    ("dualpipe", 4, 1, "Ett|t|t|mL", ((0,), (1,), (2,), (3,))),
    ("dualpipe", 4, 1, "Ett|tt|m|L", ((0, 1), (0, 1), (2, 3), (2, 3))),
    ("dualpipe", 2, 1, "Ettttm|L", ((0,), (1,))),
])
def test_ranks_with_copies_of_the_embedding(megatron_core: None, schedule: str, ranks: int, virtual: int,
                                            layout: str | None, copies: tuple[tuple[int, ...], ...]) -> None:
    from dsv3_megatron.parallel.groups import embedding_copies

    parallel = ParallelConfig(
        pipeline_model_parallel_size=ranks, num_virtual_stages_per_pipeline_rank=virtual, pipeline_schedule=schedule,
        pipeline_model_parallel_layout=layout)
    assert embedding_copies(TINY, parallel) == copies


def test_without_mtp_modules_nobody_has_a_copy(megatron_core: None) -> None:
    from dsv3_megatron.parallel.groups import embedding_copies

    model = preset("tiny").override(mtp_num_layers=0).model
    for schedule in ("1f1b", "dualpipe", "dualpipev"):
        parallel = ParallelConfig(pipeline_model_parallel_size=2, pipeline_schedule=schedule)
        assert embedding_copies(model, parallel) == ((0,), (1,))
