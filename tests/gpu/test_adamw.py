"""AdamW with bf16 moments on the GPU: one launch against the update block by block."""

from __future__ import annotations

import pytest

from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("sizes", [[7168, 128, 1], [300_000, 131_072, 5]], ids=str)
def test_one_launch_is_the_update_block_by_block(runs, sizes):
    pytest.importorskip("triton")
    from tools.bench.bench_adamw import check

    check(sizes, DEVICE)  # ends with SystemExit where they differ
