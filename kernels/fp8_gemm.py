"""Block-scaled FP8 products on Hopper: one persistent kernel for single and grouped ones.

    A [M, K] and B [N, K], E4M3, contraction innermost; scales of every 128 of K, per row or per 128 rows
    C = A B^T in bf16 or fp32, or added to fp32

A program walks over output tiles (grouped ordering, so that neighbouring programs share rows of A and B in L2) and over
K in steps of 128: tiles come through TMA descriptors into a software-pipelined ring of buffers; a step's 128 products
are summed by the tensor core from zero, then scaled and added in fp32 registers. That is the promotion that the report
asks for: no tensor-core sum is longer than 128. There are as many programs as fit the multiprocessors that
communication leaves (`launch.py`), or as there are tiles; the kernel is the same for any number of them.

Where a tile's columns share a scale of B (128 rows of B have one, and the tile is no wider), each row's two scales are
multiplied first, and a product costs one multiplication and addition; else two multiplications and an addition.

Grouped: rows of A are sorted by expert. A table gives each row tile its expert and its rows; a tile that reaches beyond
its expert's last row reads rows of the next one and does not store them.

Configurations come from a table measured on the machine (`fp8_tuning.py`), else from a guess. Run under Triton's
interpreter in tests. `tools/bench/compile_fp8.py` compiles for Hopper what a launch would and notes registers, spills
and shared memory in `tools/bench/results/compiled_kernels.csv`. On a GPU: not run.

Source: DeepSeek-V3 report, section 3.3.2.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3_megatron.kernels.bf16_rounding import round_to
from dsv3_megatron.kernels.fp8_tuning import GemmConfig, config_for
from dsv3_megatron.kernels.launch import IS_INTERPRETED, free_processors
from dsv3_megatron.kernels.tile_order import tile_of
from dsv3_megatron.platform.sending import send_integers


# What only bounds a loop or a comparison compiles no second kernel, whatever its value.
@triton.jit(do_not_specialize=["M", "tiles_m"])
def _gemm_kernel(a_desc, b_desc, c_ptr, a_scales_ptr, b_scales_ptr, table_ptr, M, N, K, tiles_m, stride_c,
                 stride_am, stride_ak, stride_be, stride_bn, stride_bk, A_ROWS: tl.constexpr, B_ROWS: tl.constexpr,
                 GROUPED: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                 GROUP_M: tl.constexpr, STAGES: tl.constexpr, SPECIALIZE: tl.constexpr, EXACT_FIRST: tl.constexpr):
    ONE_B_SCALE: tl.constexpr = B_ROWS % BLOCK_N == 0
    tiles_n = tl.cdiv(N, BLOCK_N)
    for index in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0),
                          flatten=not SPECIALIZE):
        tile_m, tile_n = tile_of(index, tiles_m, tiles_n, GROUP_M)
        if GROUPED:
            expert = tl.load(table_ptr + 3 * tile_m)
            first_row = tl.load(table_ptr + 3 * tile_m + 1)
            last_row = tl.load(table_ptr + 3 * tile_m + 2)
        else:
            expert = 0
            first_row = tile_m * BLOCK_M
            last_row = M
        rows = first_row + tl.arange(0, BLOCK_M)
        columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        a_scales = a_scales_ptr + (rows // A_ROWS) * stride_am
        b_scales = b_scales_ptr + expert * stride_be
        if ONE_B_SCALE:
            b_scales += (tile_n * BLOCK_N // B_ROWS) * stride_bn
        else:
            b_scales += (columns // B_ROWS) * stride_bn
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, tl.cdiv(K, 128), num_stages=STAGES, warp_specialize=SPECIALIZE):
            a = a_desc.load([first_row, step * 128])
            b = b_desc.load([expert * N + tile_n * BLOCK_N, step * 128])
            partial = tl.dot(a, b.T)
            a_scale = tl.load(a_scales + step * stride_ak, mask=rows < last_row, other=0.0)
            if ONE_B_SCALE:
                total += partial * (a_scale * tl.load(b_scales + step * stride_bk))[:, None]
            else:
                b_scale = tl.load(b_scales + step * stride_bk, mask=columns < N, other=0.0)
                total += partial * a_scale[:, None] * b_scale[None, :]
        at = c_ptr + rows[:, None].to(tl.int64) * stride_c + columns[None, :]
        mask = (rows < last_row)[:, None] & (columns < N)[None, :]
        if ADD:
            total += tl.load(at, mask=mask, other=0.0)
        tl.store(at, round_to(total, c_ptr.dtype.element_ty, EXACT_FIRST), mask=mask)


def gemm(a_MK: torch.Tensor, a_scales: torch.Tensor, b_NK: torch.Tensor, b_scales: torch.Tensor, *,
         dtype: torch.dtype, add_to: torch.Tensor | None = None, config: GemmConfig | None = None) -> torch.Tensor:
    """Multiply A B^T with scales per row or per 128 rows, for every 128 of K.

    Args:
        a_MK: E4M3 matrix, rows starting at multiples of 16 bytes.
        a_scales: fp32 [M or ceil(M/128), ceil(K/128)], any strides.
        b_NK: E4M3 matrix, rows starting at multiples of 16 bytes.
        b_scales: fp32 [N or ceil(N/128), ceil(K/128)], any strides.
        dtype: Dtype of the result: bf16 or fp32.
        add_to: fp32 [M, N] to add to instead.
        config: Tile sizes; None looks them up.

    Returns:
        [M, N], or `add_to`.

    Raises:
        ValueError: Rows that TMA cannot address, or widths or scales that do not fit.
    """
    rows, depth = a_MK.shape
    columns = b_NK.shape[0]
    _check_operand("a", a_MK, a_scales, depth)
    _check_operand("b", b_NK, b_scales, depth)
    c = torch.empty((rows, columns), dtype=dtype, device=a_MK.device) if add_to is None else add_to
    if rows and columns:
        chosen = config or config_for(rows, columns, depth, num_experts=1, adds=add_to is not None)
        _launch(a_MK, a_scales, b_NK, b_scales.unsqueeze(0), c, None, triton.cdiv(rows, chosen.block_m), columns,
                add_to is not None, chosen)
    return c


def grouped_gemm(a_RK: torch.Tensor, a_scales: torch.Tensor, b_eNK: torch.Tensor, b_scales: torch.Tensor,
                 counts: Sequence[int], *, dtype: torch.dtype, config: GemmConfig | None = None) -> torch.Tensor:
    """Multiply each row of A, sorted by expert, by its expert's matrix.

    Args:
        a_RK: E4M3 matrix, rows starting at multiples of 16 bytes.
        a_scales: fp32 [R, ceil(K/128)].
        b_eNK: E4M3, contiguous.
        b_scales: fp32 [e, ceil(N/128), ceil(K/128)].
        counts: Rows of each expert, zero allowed; known on the host.
        dtype: Dtype of the result: bf16 or fp32.
        config: Tile sizes; None looks them up.

    Returns:
        [R, N].

    Raises:
        ValueError: Rows that TMA cannot address, or widths or scales that do not fit.
    """
    experts, columns, depth = b_eNK.shape
    flat = b_eNK.reshape(experts * columns, depth)
    _check_operand("a", a_RK, a_scales, depth)
    _check_operand("b", flat, b_scales[0], depth, rows=columns)
    c = torch.empty((a_RK.shape[0], columns), dtype=dtype, device=a_RK.device)
    chosen = config or config_for(a_RK.shape[0], columns, depth, num_experts=experts)
    table = _tile_table(tuple(counts), chosen.block_m, a_RK.device)
    if len(table):
        _launch(a_RK, a_scales, flat, b_scales, c, table, len(table), columns, False, chosen)
    return c


@functools.lru_cache(maxsize=8)  # the two products of a pass have the same
def _tile_table(counts: tuple[int, ...], block_m: int, device: torch.device) -> torch.Tensor:
    """(expert, first row, end of its rows) of each row tile, int32 [tiles, 3]."""
    of_expert = np.asarray(counts, dtype=np.int64)
    ends, tiles = of_expert.cumsum(), -(-of_expert // block_m)
    expert = np.repeat(np.arange(len(counts)), tiles)
    number = np.arange(len(expert)) - (tiles.cumsum() - tiles)[expert]
    first = (ends - of_expert)[expert] + number * block_m
    return send_integers(np.stack((expert, first, ends[expert]), axis=1), device)


def _launch(a: torch.Tensor, a_scales: torch.Tensor, b: torch.Tensor, b_scales: torch.Tensor, c: torch.Tensor,
            table: torch.Tensor | None, tiles_m: int, columns: int, add: bool, config: GemmConfig) -> None:
    rows, depth = a.shape
    tiles = tiles_m * triton.cdiv(columns, config.block_n)
    _gemm_kernel[(min(free_processors() * config.programs_per_processor, tiles),)](
        TensorDescriptor.from_tensor(a, [config.block_m, 128]), TensorDescriptor.from_tensor(b, [config.block_n, 128]),
        c, a_scales, b_scales, table if table is not None else a_scales, rows, columns, depth, tiles_m, c.stride(0),
        a_scales.stride(0), a_scales.stride(1), *b_scales.stride(),
        A_ROWS=1 if a_scales.shape[0] == rows else 128, B_ROWS=1 if b_scales.shape[1] == columns else 128,
        GROUPED=table is not None, ADD=add, BLOCK_M=config.block_m, BLOCK_N=config.block_n, GROUP_M=config.group_m,
        STAGES=config.stages, SPECIALIZE=config.specializes_warps, EXACT_FIRST=IS_INTERPRETED,
        num_warps=config.warps)


def _check_operand(name: str, values: torch.Tensor, scales: torch.Tensor, depth: int, rows: int | None = None) -> None:
    if values.stride(1) != 1 or values.stride(0) % 16 or values.data_ptr() % 16:
        raise ValueError(f"fp8 gemm: {name} has strides {tuple(values.stride())}; TMA takes contiguous rows that start "
                         "at multiples of 16 bytes; pad the rows")
    height = values.shape[0] if rows is None else rows
    fits = values.shape[1] == depth and scales.shape[0] in (height, -(-height // 128))
    if not fits or scales.shape[1] != -(-depth // 128):
        raise ValueError(f"fp8 gemm: {name} of shape {tuple(values.shape)} with scales {tuple(scales.shape)} does not "
                         f"fit: it takes K={depth} columns and scales for each row, or 128 rows, and 128 columns")
