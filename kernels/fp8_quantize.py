"""Quantization kernels: activations, SwiGLU with its quantization, weights, requantization for Wgrad.

Each reads its input once and writes narrow values and scales; their bound is memory bandwidth. Scales of activations
are stored groups-major, [K / 128, M], so that a GEMM's threads read neighbouring rows' scales together; functions
return the [M, K / 128] view. References: `ops/fp8/quantize.py`, `ops/swiglu.py`.

Run under Triton's interpreter in tests. On a GPU: not run.

Shapes: M rows, K channels, F expert hidden, e experts, O outputs, I inputs of a weight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dsv3_megatron.kernels.bf16_rounding import round_to
from dsv3_megatron.kernels.fp8_rounding import from_e5m6, quantize_rows, row_scales, scale_of, to_e4m3, to_e5m6
from dsv3_megatron.kernels.launch import IS_INTERPRETED, QUANTIZATION_WARPS

_ROWS = 32


@triton.jit
def _tiles_kernel(x_ptr, values_ptr, scales_ptr, M, K, stride_x, stride_values, stride_scales, ROWS: tl.constexpr,
                  POWER_OF_2: tl.constexpr, EXACT_FIRST: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    values, scales = quantize_rows(x, POWER_OF_2, EXACT_FIRST)
    tl.store(values_ptr + rows[:, None] * stride_values + columns[None, :], values, mask=mask)
    tl.store(scales_ptr + tl.program_id(1) * stride_scales + rows, scales, mask=rows < M)


def quantize_tiles(x_MK: torch.Tensor, *, power_of_2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 values [M, K] and scales [M, ceil(K/128)] of 1x128 tiles."""
    rows, width = x_MK.shape
    values, scales = _tile_outputs(rows, width, x_MK.device)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, 128))
        _tiles_kernel[grid](x_MK, values, scales, rows, width, x_MK.stride(0), values.stride(0), scales.stride(0),
                            ROWS=_ROWS, POWER_OF_2=power_of_2, EXACT_FIRST=IS_INTERPRETED, num_warps=QUANTIZATION_WARPS)
    return values, scales.t()


@triton.jit
def _e5m6_kernel(x_ptr, packed_ptr, scales_ptr, M, K, stride_x, stride_scales, ROWS: tl.constexpr,
                 POWER_OF_2: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (rows < M)[:, None] & (columns < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * stride_x + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    scales = row_scales(x, POWER_OF_2, 65024.0)
    codes = to_e5m6(tl.div_rn(x, scales[:, None]))
    first, second = tl.split(tl.reshape(codes, (ROWS, 64, 2)))
    pairs = tl.program_id(1) * 64 + tl.arange(0, 64)
    at = packed_ptr + rows[:, None] * (K // 2 * 3) + pairs[None, :] * 3
    mask = (rows < M)[:, None] & (2 * pairs < K)[None, :]
    tl.store(at, (first & 0xFF).to(tl.uint8), mask=mask)
    tl.store(at + 1, ((first >> 8) | ((second & 0xF) << 4)).to(tl.uint8), mask=mask)
    tl.store(at + 2, (second >> 4).to(tl.uint8), mask=mask)
    tl.store(scales_ptr + tl.program_id(1) * stride_scales + rows, scales, mask=rows < M)


def quantize_e5m6(x_MK: torch.Tensor, *, power_of_2: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """E5M6 values of 1x128 tiles, two in three bytes, uint8 [M K 3/2], and scales [M, ceil(K/128)].

    Raises:
        ValueError: An odd K: a pair would lie in two rows.
    """
    rows, width = x_MK.shape
    if width % 2:
        raise ValueError(f"quantize_e5m6: K={width} must be even; pad the rows, or take the reference")
    packed = torch.empty(rows * width // 2 * 3, dtype=torch.uint8, device=x_MK.device)
    scales = torch.empty((-(-width // 128), rows), dtype=torch.float32, device=x_MK.device)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, 128))
        _e5m6_kernel[grid](x_MK, packed, scales, rows, width, x_MK.stride(0), scales.stride(0), ROWS=_ROWS,
                           POWER_OF_2=power_of_2, num_warps=QUANTIZATION_WARPS)
    return packed, scales.t()


@triton.jit
def _swiglu_kernel(hidden_ptr, gates_ptr, values_ptr, scales_ptr, kept_ptr, kept_scales_ptr, M, F, stride_hidden,
                   stride_values, stride_scales, stride_kept, stride_kept_scales, HAS_GATES: tl.constexpr,
                   KEEP: tl.constexpr, ROWS: tl.constexpr, POWER_OF_2: tl.constexpr, KEPT_POWER_OF_2: tl.constexpr,
                   EXACT_FIRST: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (rows < M)[:, None] & (columns < F)[None, :]
    at = hidden_ptr + rows[:, None] * stride_hidden + columns[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + F, mask=mask, other=0.0).to(tl.float32)
    active = gate / (1.0 + tl.exp(-gate)) * up
    if HAS_GATES:
        active *= tl.load(gates_ptr + rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    # What Fprop multiplies is the activation in the run's precision, as without this fusion.
    active = round_to(active, hidden_ptr.dtype.element_ty, EXACT_FIRST).to(tl.float32)
    values, scales = quantize_rows(active, POWER_OF_2, EXACT_FIRST)
    tl.store(values_ptr + rows[:, None] * stride_values + columns[None, :], values, mask=mask)
    tl.store(scales_ptr + tl.program_id(1) * stride_scales + rows, scales, mask=rows < M)
    if KEEP:
        groups = tl.num_programs(1)
        values, scales = quantize_rows(gate, KEPT_POWER_OF_2, EXACT_FIRST)
        tl.store(kept_ptr + rows[:, None] * stride_kept + columns[None, :], values, mask=mask)
        tl.store(kept_scales_ptr + tl.program_id(1) * stride_kept_scales + rows, scales, mask=rows < M)
        values, scales = quantize_rows(up, KEPT_POWER_OF_2, EXACT_FIRST)
        tl.store(kept_ptr + rows[:, None] * stride_kept + F + columns[None, :], values, mask=mask)
        tl.store(kept_scales_ptr + (groups + tl.program_id(1)) * stride_kept_scales + rows, scales, mask=rows < M)


def swiglu_quantize(hidden_MF: torch.Tensor, gates_M: torch.Tensor | None, *, power_of_2: bool, keep: bool,
                    kept_power_of_2: bool = False) -> tuple[torch.Tensor, ...]:
    """SwiGLU of [M, 2F] times the gates, in 1x128 tiles; with `keep`, its input in tiles too, from the same read.

    Returns:
        Values [M, F] and scales; with `keep` also the input's values [M, 2F] and scales, which needs F to be a
        multiple of 128: a tile must not reach from the gate half into the up half.

    Raises:
        ValueError: `keep` with another F.
    """
    rows, width = hidden_MF.shape[0], hidden_MF.shape[1] // 2
    if keep and width % 128:
        raise ValueError(f"swiglu_quantize: keep=True needs an expert width that is a multiple of 128, not {width}; "
                         "quantize the input by itself")
    values, scales = _tile_outputs(rows, width, hidden_MF.device)
    kept, kept_scales = _tile_outputs(rows, 2 * width, hidden_MF.device) if keep else (values, scales)
    if rows:
        grid = (triton.cdiv(rows, _ROWS), triton.cdiv(width, 128))
        _swiglu_kernel[grid](
            hidden_MF, gates_M if gates_M is not None else scales, values, scales, kept, kept_scales, rows, width,
            hidden_MF.stride(0), values.stride(0), scales.stride(0), kept.stride(0), kept_scales.stride(0),
            HAS_GATES=gates_M is not None, KEEP=keep, ROWS=_ROWS, POWER_OF_2=power_of_2,
            KEPT_POWER_OF_2=kept_power_of_2, EXACT_FIRST=IS_INTERPRETED, num_warps=QUANTIZATION_WARPS)
    return (values, scales.t(), kept, kept_scales.t()) if keep else (values, scales.t())


@triton.jit
def _blocks_kernel(w_ptr, values_ptr, turned_ptr, scales_ptr, outputs, inputs, stride_w, stride_we, TURN: tl.constexpr,
                   POWER_OF_2: tl.constexpr, EXACT_FIRST: tl.constexpr):
    expert = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * 128 + tl.arange(0, 128)
    mask = (rows < outputs)[:, None] & (columns < inputs)[None, :]
    at = w_ptr + expert * stride_we + rows[:, None].to(tl.int64) * stride_w + columns[None, :]
    w = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    magnitude = tl.abs(w)
    is_finite = tl.sum(tl.sum((magnitude < float("inf")).to(tl.int32), axis=1), axis=0) == 128 * 128
    scale = scale_of(tl.max(tl.max(magnitude, axis=1), axis=0), is_finite, POWER_OF_2)
    values = to_e4m3(tl.div_rn(w, tl.zeros_like(w) + scale), EXACT_FIRST)
    matrix = expert * outputs * inputs
    tl.store(values_ptr + matrix + rows[:, None].to(tl.int64) * inputs + columns[None, :], values, mask=mask)
    if TURN:
        tl.store(turned_ptr + matrix + rows[:, None] + columns[None, :].to(tl.int64) * outputs, values, mask=mask)
    tl.store(scales_ptr + (expert * tl.num_programs(0) + tl.program_id(0)) * tl.num_programs(1) + tl.program_id(1),
             scale)


def quantize_blocks(w_eOI: torch.Tensor, *, power_of_2: bool, turn: bool
                    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """E4M3 values [(e,) O, I], scales of 128x128 blocks, and with `turn` the values again as [(e,) I, O] for Dgrad.

    Hopper's FP8 matrix units take both operands with the contraction innermost, so Dgrad needs the weight turned.
    """
    w = w_eOI if w_eOI.dim() == 3 else w_eOI.unsqueeze(0)
    experts, rows, columns = w.shape
    values = torch.empty((experts, rows, columns), dtype=torch.float8_e4m3fn, device=w.device)
    turned = torch.empty((experts, columns, rows), dtype=torch.float8_e4m3fn, device=w.device) if turn else values
    grid = (triton.cdiv(rows, 128), triton.cdiv(columns, 128), experts)
    scales = torch.empty((experts, *grid[:2]), dtype=torch.float32, device=w.device)
    _blocks_kernel[grid](w, values, turned, scales, rows, columns, w.stride(1), w.stride(0), TURN=turn,
                         POWER_OF_2=power_of_2, EXACT_FIRST=IS_INTERPRETED, num_warps=QUANTIZATION_WARPS)
    if w_eOI.dim() == 2:
        return values[0], scales[0], turned[0] if turn else None
    return values, scales, turned if turn else None


@triton.jit
def _columns_kernel(x_ptr, x_scales_ptr, values_ptr, scales_ptr, M, K, stride_x, stride_xm, stride_xk, stride_values,
                    stride_scales, FORMAT: tl.constexpr, COLUMNS: tl.constexpr, POWER_OF_2: tl.constexpr,
                    EXACT_FIRST: tl.constexpr):
    rows = tl.program_id(0) * 128 + tl.arange(0, 128)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (columns < K)[:, None] & (rows < M)[None, :]
    at = rows[None, :].to(tl.int64) * stride_x + columns[:, None]
    if FORMAT == "e5m6":  # 12 bits a value: a byte and a half of the next or of the one before
        low = tl.load(x_ptr + (at * 3 >> 1), mask=mask, other=0).to(tl.int32)
        high = tl.load(x_ptr + (at * 3 >> 1) + 1, mask=mask, other=0).to(tl.int32)
        x = from_e5m6(((low | (high << 8)) >> ((at & 1) * 4).to(tl.int32)) & 0xFFF)
    else:
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if FORMAT != "wide":
        at = x_scales_ptr + rows[None, :] * stride_xm + (columns // 128)[:, None] * stride_xk
        x *= tl.load(at, mask=mask, other=1.0)
    values, scales = quantize_rows(x, POWER_OF_2, EXACT_FIRST)
    tl.store(values_ptr + columns[:, None].to(tl.int64) * stride_values + rows[None, :], values, mask=mask)
    tl.store(scales_ptr + tl.program_id(0) * stride_scales + columns, scales, mask=columns < K)


def quantize_columns(x_MK: torch.Tensor, x_scales: torch.Tensor | None, *, power_of_2: bool,
                     shape: tuple[int, int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """128x1 groups of [M, K], laid out as the transpose: values [K, M], scales [K, ceil(M/128)].

    Args:
        x_MK: bf16 or fp32; or E4M3 values, or with `shape` packed E5M6 ones, whose 1x128 scales are `x_scales`: they
            are dequantized on the way.
        x_scales: fp32 [M, ceil(K/128)], or None.
        power_of_2: Kind of the new scales.
        shape: M and K of packed values.
    """
    rows, width = shape or x_MK.shape
    stored = "wide" if x_scales is None else "e5m6" if shape else "e4m3"
    values, scales = _tile_outputs(width, rows, x_MK.device)
    if rows:
        columns = 32
        grid = (triton.cdiv(rows, 128), triton.cdiv(width, columns))
        given = x_scales if x_scales is not None else scales
        _columns_kernel[grid](
            x_MK, given, values, scales, rows, width, width if shape else x_MK.stride(0), given.stride(0),
            given.stride(1), values.stride(0), scales.stride(0), FORMAT=stored, COLUMNS=columns,
            POWER_OF_2=power_of_2, EXACT_FIRST=IS_INTERPRETED, num_warps=QUANTIZATION_WARPS)
    return values, scales.t()


def _tile_outputs(rows: int, width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [M, K], rows starting at multiples of 16 bytes as TMA wants them, and scales [ceil(K/128), M]."""
    padded = -(-width // 16) * 16
    values = torch.empty((rows, padded), dtype=torch.float8_e4m3fn, device=device)[:, :width]
    return values, torch.empty((-(-width // 128), rows), dtype=torch.float32, device=device)
