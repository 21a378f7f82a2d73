"""Heads against tokens: an exchange after which a rank has all tokens of some heads, and the one back.

Attention of a head looks at all tokens and at no other head. So ranks that share a sequence may share the heads instead
while they attend ("a2a"), with any backend for whole sequences. Every key, value and query travels, expanded.

Source: Jacobs et al. 2023, arXiv 2309.14509.

Shapes: S sequence, B micro-batch, N heads, D head width.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.parallel.sequence_parts import SequenceParts


def heads_for_tokens(x_SBND: torch.Tensor, parts: SequenceParts, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Give the tokens of other heads for all tokens of some heads.

    Args:
        x_SBND: This rank's part of the sequence, S / ranks long, of all N heads; N is a multiple of the ranks.
        parts: The split of the sequence.
        group: The ranks that share it.

    Returns:
        [S, B, N / ranks, D]: the whole sequence, in its order.
    """
    whole: torch.Tensor = _Exchange.apply(x_SBND, parts, group, True)
    return whole


def tokens_for_heads(x_SBND: torch.Tensor, parts: SequenceParts, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    """Undo `heads_for_tokens`, with the same arguments: [S, B, N / ranks, D] to this rank's part and all heads."""
    part: torch.Tensor = _Exchange.apply(x_SBND, parts, group, False)
    return part


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_SBND: torch.Tensor, parts: SequenceParts, group: torch.distributed.ProcessGroup,
                is_there: bool) -> torch.Tensor:
        ctx.parts, ctx.group, ctx.is_there = parts, group, is_there
        return _there(x_SBND, parts, group) if is_there else _back(x_SBND, parts, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        move = _back if ctx.is_there else _there
        return move(grads[0], ctx.parts, ctx.group), None, None, None


def _there(x_SBND: torch.Tensor, parts: SequenceParts, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    length, batch, heads, width = x_SBND.shape
    sent = x_SBND.view(length, batch, parts.size, heads // parts.size, width).permute(2, 0, 1, 3, 4).contiguous()
    return parts.join(list(_all_to_all(sent, group)), dim=0)


def _back(x_SBND: torch.Tensor, parts: SequenceParts, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    sent = torch.stack([SequenceParts(parts.size, rank).take(x_SBND, 0) for rank in range(parts.size)])
    return _all_to_all(sent, group).permute(1, 2, 0, 3, 4).flatten(2, 3)


def _all_to_all(x: torch.Tensor, group: torch.distributed.ProcessGroup) -> torch.Tensor:
    received = torch.empty_like(x)
    torch.distributed.all_to_all_single(received, x, group=group)
    return received
