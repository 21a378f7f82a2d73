"""Rows as bytes: E4M3 values and the scales of their tiles, one record a row, so that one transfer carries both.

A row [H] becomes H bytes of E4M3 and a 4-byte scale for each 128 of them: 7,392 bytes at H = 7168, where BF16 takes
14,336. Scales are powers of two, so that what arrives, in BF16, is quantized again by the experts' first product
without another error. This is the reference; `kernels/fp8_packed_rows.py` does the same on a GPU.

Shapes: T tokens, R rows, H hidden.

Source: DeepSeek-V3 report, section 3.3.3 (low-precision communication).
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.fp8.quantize import Quantized, quantize
from dsv3_megatron.ops.fp8.scale_groups import BLOCK, TILE, num_groups
from dsv3_megatron.ops.row_bytes import record_bytes


def pack_rows(x_TH: torch.Tensor, token_of_row_R: torch.Tensor | None = None, spare: int = 0) -> torch.Tensor:
    """Quantize rows in 1x128 tiles with power-of-two scales.

    Args:
        x_TH: Tokens' values, one token a row.
        token_of_row_R: int64, whose record each row is, every token in equally many of them; None: each its own. A
            token is quantized once, however many rows it has.
        spare: Bytes behind each record that are left for something else, without values.

    Returns:
        uint8 [R, H + 4 ceil(H/128) + spare].
    """
    quantized = quantize(x_TH, TILE, power_of_2=True)
    scales = quantized.scales.contiguous().view(torch.uint8)
    parts = [quantized.values.view(torch.uint8), scales]
    records = torch.cat((*parts, scales.new_empty(scales.shape[0], spare)), dim=1)
    return records if token_of_row_R is None else records.index_select(0, token_of_row_R)


def unpack_rows(records: torch.Tensor, width: int, dtype: torch.dtype, out: torch.Tensor | None = None
                ) -> torch.Tensor:
    """Undo `pack_rows`: [R, width] in `dtype`, which holds E4M3 times a power of two exactly.

    Args:
        records: Records, with or without spare bytes behind them.
        width: Values of a row.
        dtype: Dtype of the result.
        out: [R, width] in `dtype` to write to, and to return.
    """
    values = records[:, :width].contiguous().view(torch.float8_e4m3fn)
    # A copy even of a single row: scales in place may not start at a multiple of 4 bytes.
    scales = records[:, width:record_bytes(width)].clone(memory_format=torch.contiguous_format).view(torch.float32)
    assert scales.shape[1] == num_groups(width, BLOCK), "a record is its values and their scales"
    rows = Quantized(values, scales, TILE, "e4m3", tuple(values.shape)).dequantize(dtype)
    return rows if out is None else out.copy_(rows)
