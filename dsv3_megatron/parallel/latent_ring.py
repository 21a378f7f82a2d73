"""Causal attention of this rank's tokens to all tokens of sequences that are split, by passing latents on.

Keys and values of a head are made of a latent and a rotated part that all heads share: 512 + 64 numbers a token in
DeepSeek-V3, where the keys and values are 40,960. So latents are what ranks give each other, and each rank makes the
keys and values of the block of tokens that it looks at, one block at a time. In backward it makes them again, and sends
the gradient of the latents to the rank whose they are.

- "p2p": Blocks go round in a ring. Each rank looks at its own first and then at that of the rank before it, of the one
  before that, and so on; the next is under way meanwhile. They go round a second time in backward. A token's latent is
  received by CP - 1 ranks, forward and backward, and its gradient comes back from as many.
- "all_gather": All blocks come at once and are kept for backward. It saves the second round, and costs memory.

Gradients come home in the dtype of sums (fp32), so that their sum does not depend on how many ranks share a sequence.

Source of the ring: Liu et al. 2023, arXiv 2310.01889. There, and in Megatron-LM, keys and values are passed.

Shapes: S sequence, B micro-batch, N heads, D query and key width, U value width, W what is passed of a
position.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dsv3_megatron.ops.attention import DocumentBounds
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.block_attention import BlockAttention
from dsv3_megatron.ops.fused_blocks import FusedBlockAttention, block_attention
from dsv3_megatron.ops.recompute import held, saving
from dsv3_megatron.parallel.exchange import Posted, Splits, post_all_to_all
from dsv3_megatron.parallel.narrow_latents import NarrowLatents
from dsv3_megatron.parallel.sequence_parts import SequenceParts

# What is passed of some tokens to their keys [S, B, N, D] and values [S, B, N, U].
Expand = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class RingAttention:
    """How a call attends to blocks of other ranks.

    Attributes:
        expand: Makes keys and values of what is passed; called with gradients enabled in backward, where weight
            gradients of what it computes are left as of an ordinary backward pass.
        value_width: Width of a value, U.
        softmax_scale: Multiplies the scores.
        parts: The split of the sequences.
        group: The ranks that share them.
        document_bounds: Documents that do not see each other, as of `causal_attention`, of the whole sequences.
        gathers: All blocks come at once; else one after the other.
        backend: What computes attention to a block, "flash" or "local".
        narrow: Makes what is passed narrow on its way; None: it travels as it is.
    """

    expand: Expand
    value_width: int
    softmax_scale: float
    parts: SequenceParts
    group: torch.distributed.ProcessGroup
    document_bounds: DocumentBounds | None
    gathers: bool
    backend: str = "local"
    narrow: NarrowLatents | None = None

    def attention(self, query_SBND: torch.Tensor) -> BlockAttention | FusedBlockAttention:
        """The queries, before they look at a block."""
        return block_attention(self.backend, query_SBND, self.value_width, self.softmax_scale)

    def __call__(self, query_SBND: torch.Tensor, passed_SBW: torch.Tensor) -> torch.Tensor:
        """Attend; called by every rank of the group.

        Args:
            query_SBND: Queries of this rank's part of the sequences.
            passed_SBW: What keys and values are made of, of the same tokens; where tensor-parallel ranks share them, of
                as many as `expand` takes.

        Returns:
            [S, B, N, U], contiguous, in the queries' dtype.
        """
        with saving():
            out_SBNU: torch.Tensor = held(_Attend.apply(query_SBND, passed_SBW, self))
        return out_SBNU

    def blocks(self, passed_SBW: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Give each rank's block and whose it is, this rank's own first; the next one is under way meanwhile."""
        size, rank, block = self.parts.size, self.parts.rank, self._to_send(passed_SBW)
        for step in range(size):
            posted = post_all_to_all(block, self._splits(block, 1)) if step + 1 < size else None
            yield (rank - step) % size, self._as_it_was(block, passed_SBW.dtype)
            if posted is not None:
                block = posted.wait()

    def gather(self, passed_SBW: torch.Tensor) -> torch.Tensor:
        """The blocks of all ranks as they travel, in the ranks' order: [size, S, B, W], where nothing is narrow."""
        block = self._to_send(passed_SBW)
        blocks = block.new_empty(self.parts.size, *block.shape)
        torch.distributed.all_gather_into_tensor(blocks.flatten(0, 1), block, group=self.group)
        return blocks

    def in_turn(self, blocks: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Give the blocks that were gathered, of values of a dtype, as `blocks` gives them."""
        for step in range(self.parts.size):
            owner = (self.parts.rank - step) % self.parts.size
            yield owner, self._as_it_was(blocks[owner], dtype)

    def post_home(self, grad_SBW: torch.Tensor, owner: int) -> Posted:
        """Start sending the gradient of a block to its owner; as much comes of this rank's own."""
        return post_all_to_all(grad_SBW, self._splits(grad_SBW, owner - self.parts.rank))

    def _to_send(self, passed_SBW: torch.Tensor) -> torch.Tensor:
        return passed_SBW.contiguous() if self.narrow is None else self.narrow.packed(passed_SBW)

    def _as_it_was(self, block: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return block if self.narrow is None else self.narrow.unpacked(block, dtype)

    def _splits(self, rows: torch.Tensor, distance: int) -> Splits:
        """All rows go to the rank so far on, and as many come from the one so far back."""
        size, rank, count = self.parts.size, self.parts.rank, len(rows)
        sent, received = [0] * size, [0] * size
        sent[(rank + distance) % size] = received[(rank - distance) % size] = count
        return Splits.of(sent, received, self.group)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_SBND: torch.Tensor, passed_SBW: torch.Tensor, ring: RingAttention) -> torch.Tensor:
        seen, gathered = ring.attention(query_SBND).forward(), [ring.gather(passed_SBW)] if ring.gathers else []
        for owner, block in (ring.in_turn(gathered[0], passed_SBW.dtype) if gathered else ring.blocks(passed_SBW)):
            seen.look(*ring.expand(block), _regions(ring, query_SBND, owner))
        out_SBNU = seen.output(query_SBND.dtype)
        ctx.ring = ring
        ctx.save_for_backward(query_SBND, passed_SBW, out_SBNU, seen.logsumexp_AS, *gathered)
        return out_SBNU

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        ring: RingAttention = ctx.ring
        query_SBND, passed_SBW, out_SBNU, logsumexp_AS, *gathered = ctx.saved_tensors
        seen = ring.attention(query_SBND).backward(grads[0], out_SBNU, logsumexp_AS)
        grad_SBW = torch.zeros_like(passed_SBW, dtype=wide_dtype(passed_SBW.dtype))
        arriving: Posted | None = None
        for owner, block in (ring.in_turn(gathered[0], passed_SBW.dtype) if gathered else ring.blocks(passed_SBW)):
            look = partial(seen.look, regions=_regions(ring, query_SBND, owner))
            grad = _grad_of_block(ring, block, look).to(grad_SBW.dtype)
            if arriving is not None:
                grad_SBW += arriving.wait()
            if owner == ring.parts.rank:
                grad_SBW += grad
            else:
                arriving = ring.post_home(grad, owner)
        if arriving is not None:
            grad_SBW += arriving.wait()
        return seen.grad_q(query_SBND.dtype), grad_SBW.to(passed_SBW.dtype), None


def _grad_of_block(ring: RingAttention, block_SBW: torch.Tensor,
                   look: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """The gradient of what was passed, through its keys and values, which are made again."""
    leaf_SBW = block_SBW.detach().requires_grad_()
    with torch.enable_grad():
        expanded = ring.expand(leaf_SBW)
    grads = look(*(tensor.detach() for tensor in expanded))
    torch.autograd.backward(expanded, grads)
    assert leaf_SBW.grad is not None
    return leaf_SBW.grad


def _regions(ring: RingAttention, query_SBND: torch.Tensor, owner: int) -> tuple[Any, ...]:
    length = query_SBND.shape[0] * ring.parts.size
    return ring.parts.visible(owner, length, query_SBND.shape[1], ring.document_bounds)
