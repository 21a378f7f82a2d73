"""FP8 on a GPU: this library's Triton kernels, and for Fprop and Dgrad whichever implementation was measured faster.

    triton      kernels/fp8_gemm.py
    scaled_mm   torch.nn.functional.scaled_mm with 1x128 and 128x128 scales (cuBLASLt); single products
    deep_gemm   DeepSeek's DeepGEMM, where installed; single and grouped products

The choice by shape is in the file of measurements that kernels/fp8_tuning.py reads; without one it is triton.

Kernels are tested under Triton's interpreter. On a GPU: not run, and the two other implementations neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.quantize import Quantized, quantize
from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE, Group
from dsv3_megatron.platform.sending import send_integers


class TritonBackend(ReferenceBackend):
    """The kernels in `kernels/`, for the groups they know; the reference for the rest."""

    name = "triton"

    def quantize(self, x: torch.Tensor, group: Group = TILE, *, format: str = "e4m3", power_of_2: bool = False
                 ) -> Quantized:
        """Quantize a matrix, or a stack of them; the reference does what no kernel does: E5M6 but in 1x128 tiles of
        rows of even length, E4M3 in other groups than 1x128 and 128x128. Blocks come with their values turned.
        """
        from dsv3_megatron.kernels import fp8_quantize as kernels

        if format == "e5m6" and group == TILE and x.dim() == 2 and x.shape[1] % 2 == 0:
            packed, scales = kernels.quantize_e5m6(x.contiguous(), power_of_2=power_of_2)
            return Quantized(packed, scales, TILE, "e5m6", tuple(x.shape))
        if format != "e4m3" or group not in (TILE, SQUARE):
            return quantize(x, group, format=format, power_of_2=power_of_2)
        if group == TILE:
            values, scales = kernels.quantize_tiles(x.contiguous(), power_of_2=power_of_2)
            return Quantized(values, scales, TILE, "e4m3", tuple(x.shape))
        values, scales, turned = kernels.quantize_blocks(x.contiguous(), power_of_2=power_of_2, turn=True)
        return Quantized(values, scales, SQUARE, "e4m3", tuple(x.shape), turned)

    def quantize_columns(self, x: torch.Tensor | Quantized, *, power_of_2: bool = False) -> Quantized:
        """Quantize a matrix, wide or narrow already, in groups of 128 along its columns: E4M3, turned."""
        from dsv3_megatron.kernels import fp8_quantize as kernels

        if isinstance(x, Quantized):
            shape = None if x.format == "e4m3" else (x.shape[-2], x.shape[-1])
            values, scales = kernels.quantize_columns(x.values, x.scales, power_of_2=power_of_2, shape=shape)
        else:
            values, scales = kernels.quantize_columns(x.contiguous(), None, power_of_2=power_of_2)
        return Quantized(values, scales, TILE, "e4m3", tuple(values.shape))

    def quantize_swiglu(self, hidden_RF: torch.Tensor, gates_R: torch.Tensor | None, *, power_of_2: bool
                        ) -> tuple[Quantized, Quantized]:
        """Compute SwiGLU of [R, 2F] times the rows' gates, and quantize in tiles its result and its input, which is
        kept.
        """
        from dsv3_megatron.kernels import fp8_quantize as kernels

        rows, width = hidden_RF.shape[0], hidden_RF.shape[1] // 2
        hidden = hidden_RF.contiguous()
        # Tiles of the input must not reach from the gate half into the up half.
        is_one_pass = width % 128 == 0
        values, scales, *kept = kernels.swiglu_quantize(
            hidden, gates_R if gates_R is None else gates_R.contiguous(), power_of_2=power_of_2, keep=is_one_pass,
            kept_power_of_2=power_of_2)
        active = Quantized(values, scales, TILE, "e4m3", (rows, width))
        if not is_one_pass:
            return active, self.quantize(hidden, power_of_2=power_of_2)
        return active, Quantized(kept[0], kept[1], TILE, "e4m3", tuple(hidden.shape))

    def pack_rows(self, x_TH: torch.Tensor, token_of_row_R: torch.Tensor | None = None, spare: int = 0
                  ) -> torch.Tensor:
        """Quantize rows into records of E4M3 and scales, uint8 [R, bytes], with spare bytes behind each; by the
        reference where these or H are no multiple of 4.
        """
        from dsv3_megatron.kernels import fp8_packed_rows as kernels

        tokens, width = x_TH.shape
        if width % 4 or spare % 4:
            return pack_rows(x_TH, token_of_row_R, spare)
        if token_of_row_R is None or not tokens:
            return kernels.pack_records(x_TH.contiguous(), spare=spare)
        # As many rows for each token: sorted by token they are a table.
        rows_TK = token_of_row_R.argsort(stable=True).view(tokens, -1)
        return kernels.pack_records(x_TH.contiguous(), rows_TK.int(), spare=spare)

    def unpack_rows(self, records: torch.Tensor, width: int, dtype: torch.dtype, out: torch.Tensor | None = None
                    ) -> torch.Tensor:
        """Undo `pack_rows`: [R, width] in `dtype`; by the reference where the width is no multiple of 4."""
        from dsv3_megatron.kernels import fp8_packed_rows as kernels

        if width % 4 or records.stride(0) % 4:
            return unpack_rows(records, width, dtype, out)
        return kernels.unpack_records(records, width, dtype, out=out)

    def gemm(self, a_MK: Quantized, b_NK: Quantized, *, dtype: torch.dtype, accumulation: str = "fp32",
             add_to: torch.Tensor | None = None) -> torch.Tensor:
        """Multiply a b^T, [M, N] in `dtype` or added to `add_to`: by the Triton kernel, or by another implementation
        where that was measured to be faster.
        """
        from dsv3_megatron.kernels import fp8_gemm as kernels
        from dsv3_megatron.kernels.fp8_tuning import tuned_for

        self._require_fp32(accumulation)
        if add_to is None and a_MK.group == TILE and b_NK.group == SQUARE and dtype == torch.bfloat16:
            tuned = tuned_for(a_MK.shape[0], b_NK.shape[0], a_MK.shape[1], num_experts=1)
            if tuned is not None and tuned.implementation != "triton":
                return IMPLEMENTATIONS[tuned.implementation](a_MK, b_NK)
        return kernels.gemm(a_MK.values, a_MK.scales, b_NK.values, b_NK.scales, dtype=dtype, add_to=add_to)

    def grouped_gemm(self, a_RK: Quantized, b_eNK: Quantized, counts: Sequence[int], *, dtype: torch.dtype,
                     accumulation: str = "fp32") -> torch.Tensor:
        """Multiply each row, sorted by expert, by its expert's matrix, [R, N] in `dtype`: by the Triton kernel, or by
        another implementation where that was measured to be faster.
        """
        from dsv3_megatron.kernels import fp8_gemm as kernels
        from dsv3_megatron.kernels.fp8_tuning import tuned_for

        self._require_fp32(accumulation)
        if dtype == torch.bfloat16 and a_RK.shape[0]:
            experts, columns, depth = b_eNK.shape
            tuned = tuned_for(a_RK.shape[0], columns, depth, num_experts=experts)
            if tuned is not None and tuned.implementation != "triton":
                return GROUPED_IMPLEMENTATIONS[tuned.implementation](a_RK, b_eNK, counts)
        return kernels.grouped_gemm(a_RK.values, a_RK.scales, b_eNK.values, b_eNK.scales, counts, dtype=dtype)

    def _require_fp32(self, accumulation: str) -> None:
        if accumulation != "fp32":
            raise ValueError(f"accumulation={accumulation!r} is a model that fp8_backend=reference alone has; set it, "
                             "or fp8_accumulation=fp32")


def scaled_mm(a_MK: Quantized, b_NK: Quantized) -> torch.Tensor:
    """a b^T by torch's block-wise product, in bf16. Not run."""
    from torch.nn.functional import ScalingType
    from torch.nn.functional import scaled_mm as product

    # torch wants the scales of both with the outer dimension innermost.
    return product(a_MK.values, b_NK.values.t(), a_MK.scales.t().contiguous().t(), ScalingType.BlockWise1x128,
                   b_NK.scales.contiguous().t(), ScalingType.BlockWise128x128, output_dtype=torch.bfloat16)


def deep_gemm(a_MK: Quantized, b_NK: Quantized) -> torch.Tensor:
    """a b^T by DeepGEMM, in bf16. Not run.

    Raises:
        ValueError: The package is not installed.
    """
    library = _deep_gemm_library()
    result = torch.empty(a_MK.shape[0], b_NK.shape[0], dtype=torch.bfloat16, device=a_MK.values.device)
    library.fp8_gemm_nt((a_MK.values, a_MK.scales), (b_NK.values, b_NK.scales), result)
    return result


def deep_gemm_grouped(a_RK: Quantized, b_eNK: Quantized, counts: Sequence[int]) -> torch.Tensor:
    """Each row times its expert's matrix by DeepGEMM, in bf16. Not run.

    Its tiles must not hold rows of two experts: where counts are no multiples of its alignment, rows are copied apart
    before and together after.

    Raises:
        ValueError: The package is not installed.
    """
    library = _deep_gemm_library()
    multiple, device = library.get_mk_alignment_for_contiguous_layout(), a_RK.values.device
    padded = [-(-count // multiple) * multiple for count in counts]
    expert_of_row = send_integers(np.repeat(np.arange(len(padded)), padded), device)
    values, scales, places = a_RK.values, a_RK.scales, None
    if padded != list(counts):
        starts = [sum(padded[:expert]) for expert in range(len(padded))]
        places = send_integers(np.concatenate([np.arange(start, start + count)
                                               for start, count in zip(starts, counts, strict=True)]), device,
                               torch.int64)
        # As bytes: rows of FP8 are copied like any others. What is between them is multiplied and not read.
        values = values.new_zeros(sum(padded), values.shape[1])
        values.view(torch.uint8)[places] = a_RK.values.view(torch.uint8)
        scales = scales.new_ones(sum(padded), scales.shape[1])
        scales[places] = a_RK.scales
    result = torch.empty(values.shape[0], b_eNK.shape[-2], dtype=torch.bfloat16, device=device)
    library.m_grouped_fp8_gemm_nt_contiguous((values, scales), (b_eNK.values, b_eNK.scales), result, expert_of_row)
    return result if places is None else result[places]


def _deep_gemm_library() -> Any:
    if not is_installed("deep_gemm"):
        raise ValueError("the measured choice for this shape is deep_gemm, which is not installed; install it, or "
                         "measure again with tools/bench/bench_fp8.py --tune")
    import deep_gemm as library

    return library


IMPLEMENTATIONS = {"scaled_mm": scaled_mm, "deep_gemm": deep_gemm}
GROUPED_IMPLEMENTATIONS = {"deep_gemm": deep_gemm_grouped}
