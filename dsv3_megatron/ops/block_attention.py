"""Attention to keys and values that come in blocks: what is seen of each is added to what was seen before.

A block's share of the softmax is weighed by the log-sum-exp of its scores, so that the sum over blocks is attention to
all of them, in whatever order they come. Backward needs the log-sum-exp over all blocks and the output, and again one
block at a time. Scores are made in tiles and computed in fp32 (fp64 for fp64 inputs).

Source: Dao et al. 2022, arXiv 2205.14135, section 3.1; Liu et al. 2023, arXiv 2310.01889, for blocks of other ranks.

Shapes: S sequence, B micro-batch, N heads, A = B N rows of heads, D query and key width, U value width, C positions
looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv3_megatron.ops.attention import QUERY_BLOCK, TILE_BYTES, future_mask, head_major

# A GPU fills its multiprocessors with larger tiles, and starts a kernel for each.
_DEVICE_TILE_BYTES, _DEVICE_QUERY_BLOCK = 512 << 20, 1024


@dataclass(frozen=True)
class Region:
    """Queries of some sequences, and the keys of a block that they see.

    Attributes:
        sequences: First of them, and end.
        queries: First position and end, within the queries.
        keys: First position and end, within the block.
        is_causal: Query i of the region sees its keys 0 to i; else each query sees all of them.
    """

    sequences: tuple[int, int]
    queries: tuple[int, int]
    keys: tuple[int, int]
    is_causal: bool


@dataclass(frozen=True)
class _Tile:
    rows: slice
    queries: slice
    keys: slice
    is_causal: bool  # the last keys are the queries' own positions


class BlockAttention:
    """Queries, and what they have seen so far.

    Args:
        q_SBND: Queries, bf16, fp32 or fp64.
        value_width: Width of a value, U.
        softmax_scale: Multiplies the scores.
    """

    def __init__(self, q_SBND: torch.Tensor, value_width: int, softmax_scale: float) -> None:
        self._softmax_scale, self._heads = softmax_scale, q_SBND.shape[2]
        self._q_ASD = head_major(q_SBND).mul_(softmax_scale)
        self._future = future_mask(self._q_ASD, _query_block(q_SBND.device))
        self._shape = (*q_SBND.shape[:3], value_width)

    def forward(self) -> ForwardPass:
        """Begin to look at blocks."""
        return ForwardPass(self)

    def backward(self, grad_out_SBNU: torch.Tensor, out_SBNU: torch.Tensor, logsumexp_AS: torch.Tensor
                 ) -> BackwardPass:
        """Begin to look at the same blocks again.

        Args:
            grad_out_SBNU: The output's gradient.
            out_SBNU: What `ForwardPass.output` gave.
            logsumexp_AS: What `ForwardPass.logsumexp_AS` was then.
        """
        return BackwardPass(self, grad_out_SBNU, out_SBNU, logsumexp_AS)

    def scores(self, k_ACD: torch.Tensor, tile: _Tile) -> torch.Tensor:
        """Scores of a tile, -inf where a query does not see the key."""
        scores = torch.bmm(self._q_ASD[tile.rows, tile.queries], k_ACD[tile.rows, tile.keys].transpose(1, 2))
        if tile.is_causal:
            size = scores.shape[1]
            scores[:, :, -size:].add_(self._future[:size, :size])
        return scores

    def tiles(self, regions: tuple[Region, ...]) -> Iterator[_Tile]:
        """Cut regions into pieces whose scores fit a cache."""
        device = self._q_ASD.device
        block, limit = _query_block(device), TILE_BYTES if device.type == "cpu" else _DEVICE_TILE_BYTES
        for region in regions:
            first_row, last_row = (sequence * self._heads for sequence in region.sequences)
            start, end = region.keys
            rows = max(1, min(last_row - first_row, limit // (4 * block * (end - start))))
            for row in range(first_row, last_row, rows):
                for first in range(*region.queries, block):
                    last = min(first + block, region.queries[1])
                    seen = start + last - region.queries[0] if region.is_causal else end
                    yield _Tile(slice(row, min(row + rows, last_row)), slice(first, last), slice(start, seen),
                                region.is_causal)


class ForwardPass:
    """The output over the blocks so far.

    Attributes:
        logsumexp_AS: Log-sum-exp of each query's scores, fp32 or fp64; -inf where nothing was seen.
    """

    def __init__(self, attention: BlockAttention) -> None:
        self._attention, q = attention, attention._q_ASD
        self._out_ASU = q.new_zeros(*q.shape[:2], attention._shape[3])
        self.logsumexp_AS = q.new_full(q.shape[:2], float("-inf"))

    def look(self, k_CBND: torch.Tensor, v_CBNU: torch.Tensor, regions: tuple[Region, ...]) -> None:
        """Look at a block.

        Args:
            k_CBND: Keys of the block.
            v_CBNU: Values of the block.
            regions: What is seen of them.
        """
        k_ACD, v_ACU = head_major(k_CBND), head_major(v_CBNU)
        for tile in self._attention.tiles(regions):
            scores = self._attention.scores(k_ACD, tile)
            before = self.logsumexp_AS[tile.rows, tile.queries]
            after = torch.logaddexp(before, torch.logsumexp(scores, dim=-1))
            probabilities = scores.sub_(after.unsqueeze(-1)).exp_()
            out = self._out_ASU[tile.rows, tile.queries]
            out.mul_((before - after).exp_().unsqueeze(-1))
            out.baddbmm_(probabilities, v_ACU[tile.rows, tile.keys])
            before.copy_(after)

    def output(self, dtype: torch.dtype) -> torch.Tensor:
        """The output [S, B, N, U], once all blocks were seen."""
        return _sequence_major(self._out_ASU, self._attention._shape, dtype)


class BackwardPass:
    """The gradient of the queries over the blocks so far; arguments as of `BlockAttention.backward`."""

    def __init__(self, attention: BlockAttention, grad_out_SBNU: torch.Tensor, out_SBNU: torch.Tensor,
                 logsumexp_AS: torch.Tensor) -> None:
        self._attention, self._logsumexp_AS = attention, logsumexp_AS
        self._grad_out_ASU = head_major(grad_out_SBNU)
        # Every score's gradient is p (dp - this): the part that its softmax gives back.
        self._given_back_AS = (self._grad_out_ASU * head_major(out_SBNU)).sum(-1)
        self._grad_q_ASD = torch.zeros_like(attention._q_ASD)

    def look(self, k_CBND: torch.Tensor, v_CBNU: torch.Tensor, regions: tuple[Region, ...]
             ) -> tuple[torch.Tensor, torch.Tensor]:
        """Look at a block; arguments as of `ForwardPass.look`.

        Returns:
            Gradients of the keys and values, of their shapes and dtypes.
        """
        k_ACD, v_ACU, q_ASD = head_major(k_CBND), head_major(v_CBNU), self._attention._q_ASD
        grad_k_ACD, grad_v_ACU = torch.zeros_like(k_ACD), torch.zeros_like(v_ACU)
        for tile in self._attention.tiles(regions):
            rows, queries, keys = tile.rows, tile.queries, tile.keys
            probabilities = self._attention.scores(k_ACD, tile).sub_(
                self._logsumexp_AS[rows, queries].unsqueeze(-1)).exp_()
            grad_out = self._grad_out_ASU[rows, queries]
            grad_v_ACU[rows, keys].baddbmm_(probabilities.transpose(1, 2), grad_out)
            grad_scores = torch.bmm(grad_out, v_ACU[rows, keys].transpose(1, 2))
            grad_scores.sub_(self._given_back_AS[rows, queries].unsqueeze(-1)).mul_(probabilities)
            self._grad_q_ASD[rows, queries].baddbmm_(grad_scores, k_ACD[rows, keys],
                                                     alpha=self._attention._softmax_scale)
            grad_k_ACD[rows, keys].baddbmm_(grad_scores.transpose(1, 2), q_ASD[rows, queries])  # q holds the scale
        return (_sequence_major(grad_k_ACD, k_CBND.shape, k_CBND.dtype),
                _sequence_major(grad_v_ACU, v_CBNU.shape, v_CBNU.dtype))

    def grad_q(self, dtype: torch.dtype) -> torch.Tensor:
        """The gradient of the queries [S, B, N, D], once all blocks were seen."""
        return _sequence_major(self._grad_q_ASD, (*self._attention._shape[:3], self._grad_q_ASD.shape[-1]), dtype)


def _query_block(device: torch.device) -> int:
    return QUERY_BLOCK if device.type == "cpu" else _DEVICE_QUERY_BLOCK


def _sequence_major(x_ASD: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Contiguous [S, B, N, D] of what is head-major."""
    out = torch.empty(shape, dtype=dtype, device=x_ASD.device)
    out.permute(1, 2, 0, 3).copy_(x_ASD.unflatten(0, shape[1:3]))
    return out
