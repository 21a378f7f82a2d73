"""What computes FP8: the exact reference, or kernels, behind one interface.

    quantize            tiles and blocks, E4M3 and E5M6
    quantize_columns    128 rows of a column, transposed: for Wgrad, also of what is quantized already
    quantize_swiglu     SwiGLU, and its input for backward
    pack_rows           rows as records of values and scales, to travel; unpack_rows
    gemm                a b^T
    grouped_gemm        rows sorted by expert times each expert's matrix

Shapes: M rows, N outputs, K contraction, R routed rows, e local experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dsv3_megatron.ops.fp8.gemm import block_gemm
from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.quantize import Quantized, quantize, quantize_columns
from dsv3_megatron.ops.fp8.scale_groups import TILE, Group
from dsv3_megatron.ops.swiglu import swiglu


class ReferenceBackend:
    """Plain torch, on any device; every other backend is this one with parts replaced."""

    name = "reference"

    def quantize(self, x: torch.Tensor, group: Group = TILE, *, format: str = "e4m3", power_of_2: bool = False
                 ) -> Quantized:
        """Quantize a matrix, or a stack of them, by `fp8_quantize.quantize`."""
        return quantize(x, group, format=format, power_of_2=power_of_2)

    def quantize_columns(self, x: torch.Tensor | Quantized, *, power_of_2: bool = False) -> Quantized:
        """Quantize a matrix along its columns by `fp8_quantize.quantize_columns`."""
        return quantize_columns(x, power_of_2=power_of_2)

    def quantize_swiglu(self, hidden_RF: torch.Tensor, gates_R: torch.Tensor | None, *, power_of_2: bool
                        ) -> tuple[Quantized, Quantized]:
        """SwiGLU and its input, both E4M3 in 1x128 tiles.

        Args:
            hidden_RF: [R, 2F], gate half first.
            gates_R: Multiply SwiGLU's rows; None is 1.
            power_of_2: Scales of both.

        Returns:
            SwiGLU [R, F], rounded to hidden's dtype before; and hidden [R, 2F].
        """
        active = swiglu(hidden_RF, gates_R)
        return self.quantize(active, power_of_2=power_of_2), self.quantize(hidden_RF, power_of_2=power_of_2)

    def pack_rows(self, x_TH: torch.Tensor, token_of_row_R: torch.Tensor | None = None, spare: int = 0
                  ) -> torch.Tensor:
        """Quantize rows into records by `fp8_records.pack_rows`."""
        return pack_rows(x_TH, token_of_row_R, spare)

    def unpack_rows(self, records: torch.Tensor, width: int, dtype: torch.dtype, out: torch.Tensor | None = None
                    ) -> torch.Tensor:
        """Undo `pack_rows` by `fp8_records.unpack_rows`."""
        return unpack_rows(records, width, dtype, out)

    def gemm(self, a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype, accumulation: str = "fp32",
             add_to: torch.Tensor | None = None) -> torch.Tensor:
        """a b^T, [M, N] in `dtype`; or, in fp32, added to `add_to`, which is then returned."""
        if add_to is None:
            return block_gemm(a_MK, b_NK, dtype=dtype, accumulation=accumulation)
        return add_to.add_(block_gemm(a_MK, b_NK, accumulation=accumulation))

    def grouped_gemm(self, a_RK: Quantized, b_eNK: Quantized, counts: Sequence[int], *, dtype: torch.dtype,
                     accumulation: str = "fp32") -> torch.Tensor:
        """Each row times its expert's matrix, [R, N]; rows are sorted by expert, `counts` of each, zero allowed."""
        y = torch.empty(a_RK.shape[0], b_eNK.shape[-2], dtype=dtype, device=a_RK.values.device)
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                y[rows] = self.gemm(a_RK.rows(rows), b_eNK[expert], dtype=dtype, accumulation=accumulation)
            start += count
        return y


REFERENCE = ReferenceBackend()
