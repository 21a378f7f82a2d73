"""Rows that travel in FP8: half the bytes of a dispatch to experts, and of the gradients that go the same way.

What travels are records (`ops/fp8/packed_rows.py`): 7,392 bytes a row at H = 7168, where BF16 takes 14,336. What comes
back is in the run's precision: the sum over a token's experts, forward, and over their gradients, backward. With one
rank nothing travels, but rows are rounded all the same: the layout is not part of the experiment.

A token goes to several experts, and is quantized once: `permuted_records` puts records, not rows, in the order of
experts, and the rows themselves are never made. A gate travels in the record of its row, exactly; gated rows
(`gated_rows.py`) are what comes out.

Shapes: T tokens, R rows, H hidden.

Source: DeepSeek-V3 report, section 3.3.3 (low-precision communication).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.ops.row_bytes import gated_bytes, record_bytes
from dsv3_megatron.parallel.exchange import PostAllToAll, Posted, Splits, post_all_to_all
from dsv3_megatron.parallel.gated_rows import GatedRow, join, read_gates, write_gates


@dataclass(frozen=True)
class Narrow:
    """How rows are exchanged in FP8, in one direction of the pass.

    Attributes:
        direction: "forward": rows travel in FP8 and their gradients as they are; "backward": the other way round.
        backend: Packs and unpacks.
        records: Records of the rows as `permuted_records` made them, with "forward"; None: the rows are packed when
            they are sent.
        gated: Form of the gated rows that stand for the records; None: there are no gates in them.
    """

    direction: str
    backend: ReferenceBackend = REFERENCE
    records: torch.Tensor | None = None
    gated: GatedRow | None = None

    def __post_init__(self) -> None:
        assert self.direction in ("forward", "backward"), self.direction
        assert self.records is None or self.direction == "forward"


def permuted_records(x_TH: torch.Tensor, token_of_row_R: torch.Tensor, gates_R: torch.Tensor,
                     backend: ReferenceBackend) -> tuple[torch.Tensor, Narrow]:
    """A record for each row, with its gate; and what stands for gated rows in autograd.

    Args:
        x_TH: Tokens' hidden states, before they are put in the order of rows.
        token_of_row_R: int64, the token of each row, every token in equally many.
        gates_R: Gate of each row.
        backend: Implementation that packs rows into records.

    Returns:
        Gated rows without values or memory, to be exchanged, whose gradients are those of rows and gates; and how they
        are exchanged: by the records.
    """
    row = GatedRow(x_TH.shape[1], x_TH.dtype, gates_R.dtype)
    size = record_bytes(row.width)
    records = backend.pack_rows(x_TH.detach(), token_of_row_R,
                                spare=gated_bytes(size, gates_R.dtype.itemsize) - size)
    write_gates(records, size, gates_R.detach())
    return join(x_TH, token_of_row_R, gates_R, has_values=False), Narrow("forward", backend, records, row)


def post_narrow(rows_RH: torch.Tensor, splits: Splits, narrow: Narrow, post: PostAllToAll = post_all_to_all) -> Posted:
    """Start an all-to-all of rows in FP8; what is waited for is in their dtype again."""
    return _Posted(post(_records(rows_RH, narrow), splits), rows_RH, narrow)


def exchange_rows(rows_RH: torch.Tensor, splits: Splits | None, narrow: Narrow | None) -> torch.Tensor:
    """A differentiable all-to-all of rows, in FP8 in one direction or none.

    Args:
        rows_RH: Rows to send, in the order of the receiving ranks; or gated rows.
        splits: How many rows go where; None with one rank.
        narrow: Direction of the pass in which rows are narrow, and how they are packed; None: in neither.

    Returns:
        The rows that came.
    """
    return _ExchangeRows.apply(rows_RH, splits, narrow)


class _Posted:
    """A transfer of records under way."""

    def __init__(self, posted: Posted, rows: torch.Tensor, narrow: Narrow) -> None:
        # The records are the transfer's, which lets go of them.
        self.posted, self.backend, self.gated = posted, narrow.backend, narrow.gated
        self.width, self.dtype = rows.shape[1], rows.dtype

    def wait(self) -> torch.Tensor:
        return _rows(self.posted.wait(), self.width, self.dtype, self.backend, self.gated)


def _records(rows: torch.Tensor, narrow: Narrow) -> torch.Tensor:
    return narrow.backend.pack_rows(rows) if narrow.records is None else narrow.records


def _rows(records: torch.Tensor, width: int, dtype: torch.dtype, backend: ReferenceBackend, gated: GatedRow | None
          ) -> torch.Tensor:
    """The rows of records in `dtype`; or gated rows, if gates are in the records."""
    if gated is None:
        return backend.unpack_rows(records, width, dtype)
    rows = gated.empty(records.shape[0], records.device)
    backend.unpack_rows(records, gated.width, dtype, gated.rows(rows))
    gated.set_gates(rows, read_gates(records, record_bytes(gated.width), gated.gate_dtype))
    return rows


class _ExchangeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, splits: Splits | None, narrow: Narrow | None) -> torch.Tensor:
        # The records are not needed backward.
        ctx.splits = splits
        ctx.narrow = Narrow("backward", narrow.backend) if narrow and narrow.direction == "backward" else None
        return _send(rows, splits, narrow if narrow and narrow.direction == "forward" else None)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return _send(grads[0], None if ctx.splits is None else ctx.splits.reversed(), ctx.narrow), None, None


def _send(rows: torch.Tensor, splits: Splits | None, narrow: Narrow | None) -> torch.Tensor:
    if splits is not None:
        return (post_all_to_all(rows, splits) if narrow is None else post_narrow(rows, splits, narrow)).wait()
    if narrow is None:
        return rows.view_as(rows)
    return _rows(_records(rows, narrow), rows.shape[1], rows.dtype, narrow.backend, narrow.gated)
