"""A pair of passes behind slow links: it takes the longer of compute and transfers, over one link or over two."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run_ranks
from tools.bench.bench_overlap import ALONE, COMPUTE, TURNS, levels, measure, stand_in

pytestmark = pytest.mark.distributed

# Transfers, over all links, take as long as compute.
LAYERS, UNIT_S, SHARE, ROUNDS = 4, 0.02, 1.0, 3


def measure_both() -> dict[str, dict[str, list[float]]]:
    """Seconds of each way."""
    return {subject.__name__: measure(subject(LAYERS, UNIT_S), [SHARE], ROUNDS)[SHARE]
            for subject in (stand_in, levels)}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, list[float]]]:
    return run_ranks(2, measure_both)[0]


@pytest.mark.parametrize("name", ["stand_in", "levels"])
def test_a_pair_takes_the_longer_of_compute_and_transfers(measured, name: str) -> None:
    """The best of three: what disturbs a round makes it longer. One after the other they take twice as long."""
    found = measured[name]
    longer = max(min(found[COMPUTE]), *found["communication"])
    print(name, {way: [round(value / longer, 3) for value in values] for way, values in found.items()})
    assert min(found[TURNS]) <= 1.15 * longer
    assert min(found[ALONE]) > 1.9 * longer
