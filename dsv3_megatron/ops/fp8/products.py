"""The three products of a linear layer, each in FP8 or not, as its line of the precision map says.

    product   groups                                           contraction
    Fprop     x 1x128, W 128x128                               inputs
    Dgrad     dy 1x128, W 128x128 (transposed, same scales)    outputs
    Wgrad     dy and x 128x1 (128 tokens of a channel)         tokens

A plain layer has one weight [O, I]; experts have a stack [e, O, I], rows sorted by expert, and `counts` of them. Groups
along tokens then start anew with each expert.

Source: DeepSeek-V3 report, sections 3.3.2, 3.5.2 and appendix B.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.fp8.held_weights import quantized_weight
from dsv3_megatron.ops.fp8.quantize import Quantized
from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE
from dsv3_megatron.ops.linear import add_product_, linear_forward, linear_input_grad
from dsv3_megatron.ops.swiglu import swiglu

Counts = Sequence[int] | None
# An input as it is kept for Wgrad, or what makes it again.
Kept = torch.Tensor | Quantized | Callable[[], torch.Tensor | Quantized]


class WgradOperands(NamedTuple):
    """What Wgrad multiplies for one weight: dy and x, in FP8 both in groups of 128 tokens of a channel.

    Attributes:
        expert: Place of the weight in a stack; None: it is alone.
        grad: Gradient of the output, dy.
        cached: Input of the linear, x.
    """

    expert: int | None
    grad: torch.Tensor | Quantized
    cached: torch.Tensor | Quantized


@dataclass(frozen=True)
class Products:
    """Products of one weight.

    Args:
        precision: The weight's line of the precision map.
        backend: Implementation of quantization and products.
    """

    precision: LinearPrecision
    backend: ReferenceBackend

    def operand(self, x: torch.Tensor) -> torch.Tensor | Quantized:
        """The input [R, I] as Fprop multiplies it."""
        if self.precision.fprop != "fp8":
            return x
        return self.backend.quantize(x, TILE, power_of_2=self.precision.input_scales == "power_of_2")

    def cached(self, x: torch.Tensor, operand: torch.Tensor | Quantized) -> torch.Tensor | Quantized:
        """The input as it is kept for Wgrad; Fprop's operand where that is what is kept."""
        kept = self.precision.cached_input
        if kept == "bf16":
            return x
        if kept == "e4m3" and isinstance(operand, Quantized):
            return operand
        return self.backend.quantize(x, TILE, format=kept, power_of_2=self.precision.input_scales == "power_of_2")

    def cached_again(self, x: torch.Tensor) -> torch.Tensor | Quantized:
        """What `cached` makes of the input, made again in backward."""
        return self.cached(x, self.operand(x) if self.precision.cached_input == "e4m3" else x)

    def activated(self, hidden: torch.Tensor, gates: torch.Tensor | None
                  ) -> tuple[torch.Tensor | Quantized, torch.Tensor | Quantized]:
        """SwiGLU of [R, 2 I], rows weighted by gates: as Fprop multiplies it; and its input as that is kept.

        Both in one step where both are E4M3, which a backend can compute in one pass over the input.
        """
        if (self.precision.fprop, self.precision.cached_input) == ("fp8", "e4m3"):
            return self.backend.quantize_swiglu(hidden, gates,
                                                power_of_2=self.precision.input_scales == "power_of_2")
        return self.operand(swiglu(hidden, gates)), self.cached(hidden, hidden)

    def forward(self, operand: torch.Tensor | Quantized, weight: torch.Tensor, dtype: torch.dtype,
                counts: Counts = None) -> torch.Tensor:
        """y = x W^T, [R, O]."""
        if isinstance(operand, Quantized):
            return self._multiply(operand, self._weight(weight), dtype, counts)
        parts = (linear_forward(rows, matrix) for rows, matrix in _pairs(operand, weight, counts))
        return _joined(parts, operand, weight.shape[-2], counts).to(dtype)

    def input_grad(self, grad: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, counts: Counts = None
                   ) -> torch.Tensor:
        """dx = dy W, [R, I]."""
        if self.precision.dgrad != "fp8":
            parts = (linear_input_grad(rows.to(matrix.dtype), matrix) for rows, matrix in _pairs(grad, weight, counts))
            return _joined(parts, grad, weight.shape[-1], counts).to(dtype)
        if self.precision.grad_grouping == "tile":
            return self._multiply(self._gradient(grad), self._weight(weight).transpose(), dtype, counts)
        # Blocks of rows must not reach over two experts.
        parts = (self.backend.gemm(self._gradient(grad[rows]), matrix.transpose(), dtype=dtype,
                                   accumulation=self.precision.accumulation)
                 for rows, matrix in _ranges(self._weight(weight), counts))
        return _joined(parts, grad, weight.shape[-1], counts).to(dtype)

    def weight_grad_operands(self, grad: torch.Tensor, cached: Kept, counts: Counts = None) -> Iterator[WgradOperands]:
        """WgradOperands of Wgrad, dy^T x, as it multiplies them: of one expert after the other that has rows.

        Args:
            grad: Gradient of the output, [R, O].
            cached: The input [R, I] as it was kept, or what makes it again.
            counts: Rows of each expert; None: there is one weight.
        """
        rows = cached() if callable(cached) else cached
        if counts is None:
            yield self._operands(None, grad, rows)
            return
        for expert, part in enumerate(row_ranges(counts)):
            if part.stop > part.start:
                yield self._operands(expert, grad[part],
                                     rows.rows(part) if isinstance(rows, Quantized) else rows[part])

    def _operands(self, expert: int | None, grad: torch.Tensor, cached: torch.Tensor | Quantized) -> WgradOperands:
        if self.precision.wgrad != "fp8":
            return WgradOperands(expert, grad, cached)
        columns, precision = self.backend.quantize_columns, self.precision
        return WgradOperands(expert, columns(grad, power_of_2=precision.scales == "power_of_2"),
                             columns(cached, power_of_2=precision.input_scales == "power_of_2"))

    def add_weight_grads(self, operands: Iterable[WgradOperands], total: torch.Tensor) -> None:
        """total += dy^T x, or total[e] += dy[rows of e]^T x[rows of e]; total is fp32 or the run's precision."""
        for expert, grad, cached in operands:
            own = total if expert is None else total[expert]
            if isinstance(grad, Quantized):
                assert isinstance(cached, Quantized), "both are in groups of tokens"
                self.backend.gemm(grad, cached, dtype=torch.float32, accumulation=self.precision.accumulation,
                                  add_to=own)
            else:
                rows, wide = cached.dequantize() if isinstance(cached, Quantized) else cached, wide_dtype(grad.dtype)
                add_product_(own, grad.to(wide).t(), rows.to(wide))

    def _multiply(self, rows: Quantized, weight: Quantized, dtype: torch.dtype, counts: Counts) -> torch.Tensor:
        accumulation = self.precision.accumulation
        if counts is None:
            return self.backend.gemm(rows, weight, dtype=dtype, accumulation=accumulation)
        return self.backend.grouped_gemm(rows, weight, counts, dtype=dtype, accumulation=accumulation)

    def _gradient(self, grad: torch.Tensor) -> Quantized:
        group = TILE if self.precision.grad_grouping == "tile" else SQUARE
        return self.backend.quantize(grad, group, power_of_2=self.precision.scales == "power_of_2")

    def _weight(self, weight: torch.Tensor) -> Quantized:
        power_of_2 = self.precision.scales == "power_of_2"
        return quantized_weight(weight, lambda w: self.backend.quantize(w, SQUARE, power_of_2=power_of_2),
                                power_of_2=power_of_2)


def row_ranges(counts: Sequence[int]) -> list[slice]:
    """The rows of each expert; empty where it has none."""
    ends = list(itertools.accumulate(counts, initial=0))
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _ranges(weight: Quantized, counts: Counts) -> Iterator[tuple[slice, Quantized]]:
    if counts is None:
        yield slice(None), weight
        return
    for expert, rows in enumerate(row_ranges(counts)):
        if rows.stop > rows.start:
            yield rows, weight[expert]


def _pairs(x: torch.Tensor, weight: torch.Tensor, counts: Counts) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if counts is None:
        yield x, weight
        return
    for expert, rows in enumerate(row_ranges(counts)):
        if rows.stop > rows.start:
            yield x[rows], weight[expert]


def _joined(parts: Iterator[torch.Tensor], like: torch.Tensor, width: int, counts: Counts) -> torch.Tensor:
    """The parts of all experts; none where no expert has rows."""
    found = list(parts)
    if not found:
        return like.new_empty(0, width)
    return found[0] if counts is None else torch.cat(found)
