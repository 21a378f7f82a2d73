"""Products over the rows of one expert after the other, whose shapes repeat from step to step.

oneDNN, which computes narrow products on a CPU, makes a kernel for every shape that it has not seen: on an Intel CPU
with AMX [m, 512] x [512, 512] took 3.7 ms the first time and 0.4 ms again. The number of an expert's rows is another at
every step. So a product there takes more rows than the expert has, up to one of a few sizes. The rows behind an
expert's are those of the next one, and what a product makes of them is overwritten by the next product: nothing is
copied but behind the last rows. In a sum over rows, as a weight gradient is one, the rows behind count as zeros.

Products in fp32 and on a GPU take an expert's rows alone, unless more are asked for (`steady_sums.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

# Steps between two powers of two: a product takes an eighth more rows at most, above the fewest.
_STEPS = 8
_FEWEST_ROWS = 16


def repeating_size(count: int) -> int:
    """The smallest of a few sizes that is not below `count`: multiples of 16, and of an eighth of a power of two."""
    step = max(_FEWEST_ROWS, (1 << count.bit_length()) // (2 * _STEPS))
    return -(-count // step) * step


def shapes_should_repeat(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are made faster by shapes that were there before."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16)


def row_blocks(counts: Sequence[int], num_rows: int, device: torch.device, dtype: torch.dtype, least_rows: int = 1
               ) -> Iterator[RowBlock]:
    """The rows of each expert that has some, in their order.

    Args:
        counts: Rows of each expert; may be zero, sums to `num_rows`.
        num_rows: Rows of all experts together.
        device: Device of the products' operands.
        dtype: Dtype of the products' operands.
        least_rows: Rows that a product takes at least, where shapes need not repeat.
    """
    repeats, start = shapes_should_repeat(device, dtype), 0
    for expert, count in enumerate(counts):
        if count:
            yield RowBlock(expert, start, count, repeating_size(count) if repeats else max(count, least_rows), num_rows)
            start += count


@dataclass(frozen=True)
class RowBlock:
    """The rows of one expert among those of all, and as many rows behind them as a product takes.

    Attributes:
        expert: Index of the expert.
        start: First row of the expert.
        count: Number of the expert's rows, at least 1.
        size: Rows that a product takes, from `start` on; at least `count`.
        num_rows: Rows of all experts together.
    """

    expert: int
    start: int
    count: int
    size: int
    num_rows: int

    @property
    def rows(self) -> slice:
        """Rows of this expert alone, among those of all."""
        return slice(self.start, self.start + self.count)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The block's `size` rows of a tensor of all rows: a view, or a copy with zeros where it reaches too far."""
        if self._is_inside:
            return tensor[self.start : self.start + self.size]
        return self.padded(tensor)

    def padded(self, tensor: torch.Tensor) -> torch.Tensor:
        """The expert's rows of a tensor of all rows, and zeros behind them: [size, ...]."""
        if self.size == self.count:
            return tensor[self.rows]
        result = tensor.new_empty((self.size, *tensor.shape[1:]))
        result[: self.count] = tensor[self.rows]
        return self.with_zeros_(result)

    def with_zeros_(self, block: torch.Tensor) -> torch.Tensor:
        """A tensor [size, ...] whose rows behind the expert's are made zero in place."""
        if self.size > self.count:
            block[self.count :].zero_()
        return block

    def multiply(self, block: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """block weight, [size, columns], the expert's rows of which are put into their places in `out`.

        The rows behind them in `out` are overwritten too: blocks are to be multiplied in their order.

        Args:
            block: Rows of the block, [size, inner].
            weight: [inner, columns].
            out: Rows of all experts, [num_rows, columns].
        """
        if self._is_inside:
            return torch.mm(block, weight, out=out[self.start : self.start + self.size])
        result = torch.mm(block, weight)
        out[self.rows] = result[: self.count]
        return result

    @property
    def _is_inside(self) -> bool:
        return self.start + self.size <= self.num_rows
