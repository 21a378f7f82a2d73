"""The order in which a persistent kernel walks over the tiles of a product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(index, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column tile of a number: GROUP_M rows of tiles are walked column by column, so that neighbouring programs
    share rows of both operands in the L2 cache.
    """
    in_group = GROUP_M * tiles_n
    first = (index // in_group) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    return first + (index % in_group) % size, (index % in_group) // size
