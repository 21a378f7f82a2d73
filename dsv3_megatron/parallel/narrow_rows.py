"""Rows that travel in FP8: half the bytes of a dispatch to experts, and of the gradients that go the same way.

What travels are records (`ops/fp8/packed_rows.py`): 7,392 bytes a row at H = 7168, where BF16 takes 14,336. What comes
back is in the run's precision: the sum over a token's experts, forward, and over their gradients, backward. With one
rank nothing travels, but rows are rounded all the same: the layout is not part of the experiment.

A token goes to several experts, and is quantized once: `permuted_records` puts records, not rows, in the order of
experts, and the rows themselves are never made.

Shapes: T tokens, R rows, H hidden.

Source: DeepSeek-V3 report, section 3.3.3 (low-precision communication).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits, post_all_to_all


@dataclass(frozen=True)
class Narrow:
    """How rows are exchanged in FP8, in one direction of the pass.

    Attributes:
        direction: "forward": rows travel in FP8 and their gradients as they are; "backward": the other way round.
        backend: Packs and unpacks.
        records: Records of the rows as `permuted_records` made them, with "forward"; None: the rows are packed when
            they are sent.
    """

    direction: str
    backend: ReferenceBackend = REFERENCE
    records: torch.Tensor | None = None

    def __post_init__(self) -> None:
        assert self.direction in ("forward", "backward"), self.direction
        assert self.records is None or self.direction == "forward"


def permuted_records(x_TH: torch.Tensor, token_of_row_R: torch.Tensor, backend: ReferenceBackend
                     ) -> tuple[torch.Tensor, torch.Tensor]:
    """A record for each row, and what stands for the rows in autograd.

    Args:
        x_TH: Tokens' hidden states, before they are put in the order of rows.
        token_of_row_R: int64, the token of each row, every token in equally many.
        backend: Implementation that packs rows into records.

    Returns:
        [R, H] in x's dtype without values (all NaN, no memory), to be exchanged together with the records: its
        gradients are the rows'; and the records, uint8 [R, bytes].
    """
    records = backend.pack_rows(x_TH.detach(), token_of_row_R)
    return _Rows.apply(x_TH, token_of_row_R), records


def post_narrow(rows_RH: torch.Tensor, splits: Splits, narrow: Narrow, post: PostAllToAll = post_all_to_all) -> Posted:
    """Start an all-to-all of rows in FP8; what is waited for is in their dtype again."""
    records = narrow.backend.pack_rows(rows_RH) if narrow.records is None else narrow.records
    return _Posted(post(records, splits), rows_RH.shape[1], rows_RH.dtype, narrow.backend)


def exchange_rows(rows_RH: torch.Tensor, splits: Splits | None, narrow: Narrow) -> torch.Tensor:
    """A differentiable all-to-all of rows, in FP8 in one direction.

    Args:
        rows_RH: Rows to send, in the order of the receiving ranks.
        splits: How many rows go where; None with one rank.
        narrow: Direction of the pass in which rows are narrow, and how they are packed.

    Returns:
        The rows that came.
    """
    return _ExchangeRows.apply(rows_RH, splits, narrow)


class _Posted:
    """A transfer of records under way."""

    def __init__(self, posted: Posted, width: int, dtype: torch.dtype, backend: ReferenceBackend) -> None:
        self.posted, self.width, self.dtype, self.backend = posted, width, dtype, backend

    def wait(self) -> torch.Tensor:
        return self.backend.unpack_rows(self.posted.wait(), self.width, self.dtype)


class _Rows(torch.autograd.Function):
    """x[token_of_row] for autograd, without its values."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token_of_row: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(token_of_row)
        ctx.num_tokens = x.shape[0]
        return x.new_full((), float("nan")).expand(token_of_row.numel(), x.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (token_of_row,) = ctx.saved_tensors
        return grads[0].new_zeros(ctx.num_tokens, grads[0].shape[1]).index_add_(0, token_of_row, grads[0]), None


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, splits: Splits | None, narrow: Narrow) -> torch.Tensor:
        # The records are not needed backward.
        ctx.splits, ctx.is_narrow, ctx.backend = splits, narrow.direction == "backward", narrow.backend
        return _send(rows, splits, narrow if narrow.direction == "forward" else None)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        back = None if ctx.splits is None else ctx.splits.reversed()
        return _send(grads[0], back, Narrow("backward", ctx.backend) if ctx.is_narrow else None), None, None


def _send(rows: torch.Tensor, splits: Splits | None, narrow: Narrow | None) -> torch.Tensor:
    if splits is not None:
        return (post_all_to_all(rows, splits) if narrow is None else post_narrow(rows, splits, narrow)).wait()
    if narrow is None:
        return rows.view_as(rows)
    records = narrow.backend.pack_rows(rows) if narrow.records is None else narrow.records
    return narrow.backend.unpack_rows(records, rows.shape[1], rows.dtype)
