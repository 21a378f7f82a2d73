"""A stage in pieces on the GPU against one autograd pass over it there; experts' weight gradients wait there too."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.gpu

# Sums of gradients by atomic additions come in any order on a GPU; in bf16 so do their roundings.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pieces_equal_one_pass(runs, precision):
    from megatron.core import parallel_state

    from tests.distributed.chunk_passes import Case, run_case

    runs.start_process_group(runs.prepare())
    try:
        (chunk,) = run_case(Case("", num_ranks=1, precision=precision))
    finally:
        parallel_state.destroy_model_parallel()
    expected = chunk.pop("ordinary")
    for way, got in chunk.items():
        for kind in ("outputs", "gradients"):
            for name, value in getattr(got, kind).items():
                error = runs.relative_error(value, getattr(expected, kind)[name])
                assert error <= TOLERANCE[precision], (way, name, error)
        assert all(value.equal(expected.counts[name]) for name, value in got.counts.items() if "load" in name), way
