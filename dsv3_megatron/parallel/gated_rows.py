"""Routed rows and their gates as one tensor, so that one transfer carries both, forward and backward.

A row's gate lies behind it. Gated rows are [R, columns] in the rows' dtype; in the columns behind the row are the bits
of its gate, which is wider, and nothing: a row takes a multiple of 16 bytes, so that kernels can read and write it in
large pieces. 7,168 values in BF16 with an fp32 gate take 14,352 bytes. The gradients of gated rows have the same form.
So gated rows are moved and taken apart, and never added or multiplied.

They are made while rows are put in the order of their experts' ranks, and taken apart while those that came are put in
the order of the experts here: no pass over the rows is added, unless a rank has a single expert.

Shapes: T tokens, R rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.row_bytes import gated_bytes


def write_gates(rows: torch.Tensor, first_byte: int, gates_R: torch.Tensor) -> None:
    """Write the bits of each row's gate from a byte of the row on; in rows of any dtype."""
    gates = gates_R.contiguous().view(-1, 1).view(torch.uint8)
    rows.view(torch.uint8)[:, first_byte:first_byte + gates.shape[1]] = gates


def read_gates(rows: torch.Tensor, first_byte: int, dtype: torch.dtype) -> torch.Tensor:
    """The gates [R] that `write_gates` wrote."""
    bits = rows.view(torch.uint8)[:, first_byte:first_byte + dtype.itemsize]
    # A copy even of a single row, whose place may be no multiple of the gate's size.
    return bits.clone(memory_format=torch.contiguous_format).view(dtype).view(-1)


@dataclass(frozen=True)
class GatedRow:
    """The form of a row with its gate behind it.

    Attributes:
        width: Values of a row, H.
        dtype: Dtype of the row.
        gate_dtype: Dtype of the gate.
    """

    width: int
    dtype: torch.dtype
    gate_dtype: torch.dtype = torch.float32

    @property
    def num_columns(self) -> int:
        """Columns of gated rows."""
        return gated_bytes(self.width * self.dtype.itemsize, self.gate_dtype.itemsize) // self.dtype.itemsize

    def empty(self, num_rows: int, device: torch.device) -> torch.Tensor:
        """Make gated rows [R, columns] without values."""
        return torch.empty((num_rows, self.num_columns), dtype=self.dtype, device=device)

    def rows(self, gated: torch.Tensor) -> torch.Tensor:
        """The rows as a view [R, H]."""
        return gated[:, :self.width]

    def gates(self, gated: torch.Tensor) -> torch.Tensor:
        """The gates, a copy [R]."""
        return read_gates(gated, self.width * self.dtype.itemsize, self.gate_dtype)

    def set_gates(self, gated: torch.Tensor, gates_R: torch.Tensor) -> None:
        """Put gates behind the rows."""
        write_gates(gated, self.width * self.dtype.itemsize, gates_R.to(self.gate_dtype))


def join(x_TH: torch.Tensor, token_of_row_R: torch.Tensor, gates_R: torch.Tensor, *, has_values: bool = True
         ) -> torch.Tensor:
    """A row for each of a token's experts, with its gate.

    Args:
        x_TH: Tokens' hidden states.
        token_of_row_R: int64, the token of each row.
        gates_R: Gate of each row.
        has_values: False: what is sent is something else, and the result stands for it in autograd: it has no values
            (all NaN) and no memory.

    Returns:
        Gated rows [R, columns]. Their gradients are gated rows too.
    """
    return _Join.apply(x_TH, token_of_row_R, gates_R, has_values)


def part(gated: torch.Tensor, row: GatedRow, sizes: Sequence[int], order: Sequence[int]
         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Take gated rows apart, and put them in another order.

    Args:
        gated: Rows in chunks, one behind the other.
        row: Form of a gated row.
        sizes: Rows of each chunk.
        order: Chunks in the order in which the result has them, each once.

    Returns:
        Rows [R, H], contiguous, and gates [R].
    """
    return _Part.apply(gated, row, tuple(sizes), tuple(order))


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, token_of_row: torch.Tensor, gates: torch.Tensor, has_values: bool
                ) -> torch.Tensor:
        ctx.save_for_backward(token_of_row)
        row = ctx.row = GatedRow(x.shape[1], x.dtype, gates.dtype)
        ctx.num_tokens, num_rows = x.shape[0], token_of_row.numel()
        if not has_values:
            return x.new_full((), float("nan")).expand(num_rows, row.num_columns)
        gated = row.empty(num_rows, x.device)
        torch.index_select(x, 0, token_of_row, out=row.rows(gated))
        row.set_gates(gated, gates)
        return gated

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, None]:
        (token_of_row,), row = ctx.saved_tensors, ctx.row
        grad_x = grads[0].new_zeros(ctx.num_tokens, row.width).index_add_(0, token_of_row, row.rows(grads[0]))
        return grad_x, None, row.gates(grads[0]), None


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gated: torch.Tensor, row: GatedRow, sizes: tuple[int, ...], order: tuple[int, ...]
                ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.row, ctx.sizes, ctx.order = row, sizes, order
        rows, gates = row.rows(gated).split(sizes), row.gates(gated).split(sizes)
        return torch.cat([rows[chunk] for chunk in order]), torch.cat([gates[chunk] for chunk in order])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        row, order = ctx.row, ctx.order
        sizes = [ctx.sizes[chunk] for chunk in order]
        back = sorted(range(len(order)), key=order.__getitem__)
        rows, gates = (grad.split(sizes) for grad in grads)
        gated = row.empty(sum(sizes), grads[0].device)
        torch.cat([rows[place] for place in back], out=row.rows(gated))
        row.set_gates(gated, torch.cat([gates[place] for place in back]))
        return gated, None, None, None
