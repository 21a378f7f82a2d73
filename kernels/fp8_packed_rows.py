"""Rows as the records in which they travel to their experts: quantized, and put in the order of experts, in one pass.

A record is a row's H bytes of E4M3 and its power-of-two scales, 4 bytes for each 128 of them. The reference is
`ops/fp8/packed_rows.py`. Run under Triton's interpreter in tests. On a GPU: not run.

Shapes: T tokens, R rows, K experts a token, H hidden.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_megatron.kernels.fp8_rounding import quantize_rows
from dsv3_megatron.kernels.launch import IS_INTERPRETED, QUANTIZATION_WARPS

_ROWS = 32


@triton.jit
def _pack_kernel(x_ptr, rows_ptr, values_ptr, scales_ptr, T, H, stride_x, stride_values, stride_scales,
                 CHOICES: tl.constexpr, PERMUTED: tl.constexpr, ROWS: tl.constexpr, EXACT_FIRST: tl.constexpr):
    tokens = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (tokens < T)[:, None] & (columns < H)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize_rows(x, True, EXACT_FIRST)
    for choice in range(CHOICES):
        if PERMUTED:
            row = tl.load(rows_ptr + tokens * CHOICES + choice, mask=tokens < T, other=0).to(tl.int64)
        else:
            row = tokens
        tl.store(values_ptr + row[:, None] * stride_values + columns[None, :], values, mask=mask)
        tl.store(scales_ptr + row * stride_scales + tl.program_id(1), scales, mask=tokens < T)


def pack_records(x_TH: torch.Tensor, rows_TK: torch.Tensor | None = None, *, spare: int = 0) -> torch.Tensor:
    """Quantize each token once, in 1x128 tiles with power-of-two scales, and write its record wherever it belongs.

    Args:
        x_TH: Tokens, bf16 or fp32.
        rows_TK: int32, the rows of each token's choices, no row twice and none left out; None: one row, its own.
        spare: Bytes behind each record that nothing is written to.

    Returns:
        uint8 [T K, H + 4 ceil(H/128) + spare].

    Raises:
        ValueError: A width at which scales would not start at multiples of 4 bytes.
    """
    tokens, width = x_TH.shape
    _check_width("pack_records", width, spare)
    choices = 1 if rows_TK is None else rows_TK.shape[1]
    records = torch.empty((tokens * choices, width + 4 * triton.cdiv(width, 128) + spare), dtype=torch.uint8,
                          device=x_TH.device)
    if tokens:
        values, scales = _parts(records, width)
        grid = (triton.cdiv(tokens, _ROWS), triton.cdiv(width, 128))
        _pack_kernel[grid](x_TH, rows_TK if rows_TK is not None else records, values, scales, tokens, width,
                           x_TH.stride(0), values.stride(0), scales.stride(0), CHOICES=choices,
                           PERMUTED=rows_TK is not None, ROWS=_ROWS, EXACT_FIRST=IS_INTERPRETED,
                           num_warps=QUANTIZATION_WARPS)
    return records


@triton.jit
def _unpack_kernel(values_ptr, scales_ptr, x_ptr, R, H, stride_values, stride_scales, stride_x, ROWS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (rows < R)[:, None] & (columns < H)[None, :]
    values = tl.load(values_ptr + rows[:, None] * stride_values + columns[None, :], mask=mask, other=0.0)
    scales = tl.load(scales_ptr + rows * stride_scales + tl.program_id(1), mask=rows < R, other=1.0)
    x = values.to(tl.float32) * scales[:, None]
    tl.store(x_ptr + rows[:, None] * stride_x + columns[None, :], x.to(x_ptr.dtype.element_ty), mask=mask)


def unpack_records(records: torch.Tensor, width: int, dtype: torch.dtype, *, out: torch.Tensor | None = None
                   ) -> torch.Tensor:
    """Undo `pack_records`: [R, width] in `dtype`, which holds E4M3 times a power of two exactly.

    Args:
        records: Records, with or without spare bytes behind them.
        width: Values of a row.
        dtype: Dtype of the result.
        out: [R, width] in `dtype` to write to, and to return; its rows may lie apart.

    Raises:
        ValueError: A width that the records cannot have, as in `pack_records`.
    """
    _check_width("unpack_records", width, records.shape[1])
    rows = records.shape[0]
    x = torch.empty((rows, width), dtype=dtype, device=records.device) if out is None else out
    if rows:
        values, scales = _parts(records.contiguous(), width)
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, 128))
        _unpack_kernel[grid](values, scales, x, rows, width, values.stride(0), scales.stride(0), x.stride(0),
                             ROWS=_ROWS, num_warps=QUANTIZATION_WARPS)
    return x


def _parts(records: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of records: E4M3 values [R, H] and fp32 scales [R, ceil(H/128)], with what is spare behind these."""
    return records[:, :width].view(torch.float8_e4m3fn), records[:, width:].view(torch.float32)


def _check_width(name: str, width: int, others: int) -> None:
    if width % 4 or others % 4:
        raise ValueError(f"{name}: width {width} and the bytes of a row {others} must be multiples of 4, so that "
                         "scales can be read; take the reference")
