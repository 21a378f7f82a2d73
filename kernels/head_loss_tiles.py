"""Tile sizes of the fused head and loss, and the bytes that they make it move. No torch: the planner reads it too.

Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadLossTiles:
    """One way to run the kernels.

    Attributes:
        block_t: Tokens of a tile of logits.
        block_v: Columns of a tile.
        block_h: Width of a step of the product.
        group_t: Tiles of tokens that are walked together.
        stages: Steps in flight.
        warps: Warps of a program.
    """

    block_t: int = 128
    block_v: int = 256
    block_h: int = 64
    group_t: int = 16
    stages: int = 3
    warps: int = 8


# Under Triton's interpreter, where every loop shall turn more than once.
INTERPRETED_TILES = HeadLossTiles(16, 32, 16, 2, 2, 4)


# Bytes a logit that the hidden gradient's sums may take in backward: with 6 for the gradients of the logits, and 0.06
# for partial sums, all stays below 10.
_SUMMING_BYTES = 3.9


def gradient_columns(vocabulary: int, hidden: int, block_v: int) -> int:
    """Columns of logits whose gradients backward holds at a time, in whole tiles: V over a number n of chunks.

    The hidden gradient is written once, read and written n - 1 times more in fp32, and rounded in 6 bytes: (8 n + 2) H
    / V bytes a logit. The most chunks are taken that keep to `_SUMMING_BYTES`: with DeepSeek-V3's vocabulary and width
    8, so that the gradients of 16,384 columns are held.
    """
    chunks = max(1, int((_SUMMING_BYTES * vocabulary / hidden - 2) / 8))
    tiles = -(-vocabulary // block_v)
    return -(-tiles // chunks) * block_v


@dataclass(frozen=True)
class HeadLossBytes:
    """Bytes between a GPU's memory and its processors in forward and backward of one head, if caches keep nothing.

    An operand that a product reads in one walk counts once for each group of tiles that shares it.

    Attributes:
        partial_sums: Maxima and sums of tiles, in forward.
        gradients: Gradients of the logits, written once and read by two products.
        hidden_gradient: The hidden gradient, summed in fp32 chunk by chunk, then rounded.
        weight: Reads of the weight.
        hidden: Reads of the hidden states.
        main_gradient: The weight's gradient, read, added to and written in fp32.
    """

    partial_sums: float
    gradients: float
    hidden_gradient: float
    weight: float
    hidden: float
    main_gradient: float

    @property
    def of_logits(self) -> float:
        """Bytes that there are because there are logits: all but the operands of the head and its weight's gradient."""
        return self.partial_sums + self.gradients + self.hidden_gradient

    @property
    def total(self) -> float:
        """All bytes that are moved."""
        return self.of_logits + self.weight + self.hidden + self.main_gradient


def fused_bytes(tokens: int, hidden: int, vocabulary: int, *, tiles: HeadLossTiles | None = None, value_bytes: int = 2
                ) -> HeadLossBytes:
    """Count what the fused head and loss move.

    Args:
        tokens: Tokens of a micro-batch.
        hidden: Width of the hidden states.
        vocabulary: Rows of the weight on this rank.
        tiles: Tile sizes; None takes the kernels'.
        value_bytes: Bytes of a hidden state or a weight.
    """
    t = tiles or HeadLossTiles()
    columns = gradient_columns(vocabulary, hidden, t.block_v)
    chunks = -(-vocabulary // columns)
    logits, states, weight = tokens * vocabulary, tokens * hidden, vocabulary * hidden
    # Forward keeps two fp32 numbers a token and tile, which are read once more. Backward writes gradients once, and
    # two products read them.
    partial = 2 * 2 * 4 * tokens * -(-vocabulary // t.block_v)
    gradients = 3 * value_bytes * logits
    # The first chunk writes the fp32 sum, every other reads and writes it, and at the end it is rounded.
    summed = states * (4 * (2 * chunks - 1) + 4 + value_bytes) if chunks > 1 else states * value_bytes
    groups = -(-tokens // (t.block_t * t.group_t))
    return HeadLossBytes(
        partial_sums=partial, gradients=gradients, hidden_gradient=summed,
        weight=value_bytes * weight * (2 * groups + 1),  # logits twice, and the hidden gradient
        hidden=value_bytes * states * (2 + chunks),  # logits twice in all, the weight's gradient once a chunk
        main_gradient=8 * weight)
