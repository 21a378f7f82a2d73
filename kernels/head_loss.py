"""The output head and its loss as one operation: tiles of logits are made in registers and never written.

    forward    logits tile = h W^T; written: its rows' maxima and sums of exponentials, and the target's logit
    backward   the same tile again; written: (softmax - onehot) times the token's gradient, a chunk of columns at a time

What is left of backward are two plain products of a chunk's gradients, with the weight and with the hidden states, for
the library: see `ops/fused_head_loss.py`. A chunk is of columns, not of tokens, so that every row of the weight's
gradient is read and written once a micro-batch.

Why a product of our own: a library's has to write the logits. In bf16 that rounds the loss to 8 bits; in fp32 it moves
8 bytes a logit more in forward and 8 in backward. At V3's size (T = 4096, H = 7168, V = 129280) the two products that
make logits are 7.6 TFLOP each, 22 ms together at 700 TFLOP/s, and 16 bytes a logit 8.5 GB, 2.5 ms at 3.35 TB/s: the
kernel wins where it reaches 90% of the library's rate. On a GPU: not run. Run under Triton's interpreter in tests, and
compiled for Hopper without one (Triton 3.9, `tools/bench/compile_head_loss.py`): 254 and 255 registers, no spills.

Shapes: T tokens, H hidden, V vocabulary, v its part on this tensor-parallel rank. In kernels V is
the latter, and C a number of columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3_megatron.kernels.bf16_rounding import round_to
from dsv3_megatron.kernels.head_loss_tiles import INTERPRETED_TILES, HeadLossTiles
from dsv3_megatron.kernels.launch import IS_INTERPRETED, free_processors
from dsv3_megatron.kernels.tile_order import tile_of


# The interpreter multiplies bf16 as integers: INTERPRETED has it multiply the same numbers in fp32.
@triton.jit
def _logits_tile(h_desc, w_desc, first_token, first_row, H, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
                 BLOCK_H: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr):
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for step in tl.range(0, tl.cdiv(H, BLOCK_H), num_stages=STAGES):
        h = h_desc.load([first_token, step * BLOCK_H])
        w = w_desc.load([first_row, step * BLOCK_H])
        if INTERPRETED:
            h = h.to(tl.float32)
            w = w.to(tl.float32)
        total = tl.dot(h, w.T, total, input_precision="ieee")
    return total


# What only bounds a loop or a comparison compiles no second kernel, whatever its value.
@triton.jit(do_not_specialize=["T", "tiles_t"])
def _partial_sums_kernel(h_desc, w_desc, targets_ptr, maxima_ptr, sums_ptr, target_logits_ptr, T, H, V, tiles_t,
                         BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_T: tl.constexpr,
                         STAGES: tl.constexpr, INTERPRETED: tl.constexpr):
    tiles_v = tl.cdiv(V, BLOCK_V)
    for index in tl.range(tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0), flatten=True):
        tile_t, tile_v = tile_of(index, tiles_t, tiles_v, GROUP_T)
        tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        is_token = tokens < T
        logits = _logits_tile(h_desc, w_desc, tile_t * BLOCK_T, tile_v * BLOCK_V, H, BLOCK_T, BLOCK_V, BLOCK_H, STAGES,
                              INTERPRETED)
        logits = tl.where((columns < V)[None, :], logits, float("-inf"))
        largest = tl.max(logits, 1)
        at = tile_v.to(tl.int64) * T + tokens
        tl.store(maxima_ptr + at, largest, mask=is_token)
        tl.store(sums_ptr + at, tl.sum(tl.exp(logits - largest[:, None]), 1), mask=is_token)
        target = tl.load(targets_ptr + tokens, mask=is_token, other=-1)
        is_here = (target >= tile_v * BLOCK_V) & (target < tl.minimum(tile_v * BLOCK_V + BLOCK_V, V))
        found = tl.sum(tl.where(columns[None, :] == target[:, None], logits, 0.0), 1)
        tl.store(target_logits_ptr + tokens, found, mask=is_token & is_here)


@triton.jit(do_not_specialize=["T", "tiles_t"])
def _gradients_kernel(h_desc, w_desc, targets_ptr, maxima_ptr, log_sums_ptr, grad_losses_ptr, out_ptr, T, H, first, C,
                      tiles_t, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
                      GROUP_T: tl.constexpr, STAGES: tl.constexpr, INTERPRETED: tl.constexpr):
    tiles_v = tl.cdiv(C, BLOCK_V)
    for index in tl.range(tl.program_id(0), tiles_t * tiles_v, tl.num_programs(0), flatten=True):
        tile_t, tile_v = tile_of(index, tiles_t, tiles_v, GROUP_T)
        tokens = tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
        columns = tile_v * BLOCK_V + tl.arange(0, BLOCK_V)
        is_token = tokens < T
        logits = _logits_tile(h_desc, w_desc, tile_t * BLOCK_T, first + tile_v * BLOCK_V, H, BLOCK_T, BLOCK_V, BLOCK_H,
                              STAGES, INTERPRETED)
        largest = tl.load(maxima_ptr + tokens, mask=is_token, other=0.0)
        log_sum = tl.load(log_sums_ptr + tokens, mask=is_token, other=0.0)
        grad = tl.load(grad_losses_ptr + tokens, mask=is_token, other=0.0)
        target = tl.load(targets_ptr + tokens, mask=is_token, other=-1) - first
        softmax = tl.exp(logits - largest[:, None] - log_sum[:, None])
        gradients = tl.where(columns[None, :] == target[:, None], softmax - 1, softmax) * grad[:, None]
        at = out_ptr + tokens[:, None].to(tl.int64) * C + columns[None, :]
        tl.store(at, round_to(gradients, out_ptr.dtype.element_ty, INTERPRETED),
                 mask=is_token[:, None] & (columns < C)[None, :])


class HeadScores(NamedTuple):
    """What some columns of the logits say of each token, all fp32 [T].

    Attributes:
        largest: Number that was subtracted before exponentials were taken.
        sums: Sum of exp(logit - largest).
        target_logits: The target's logit, 0 where the target is not among these columns.
    """

    largest: torch.Tensor
    sums: torch.Tensor
    target_logits: torch.Tensor


def head_scores(hidden_TH: torch.Tensor, weight_vH: torch.Tensor, targets: torch.Tensor,
                tiles: HeadLossTiles | None = None) -> HeadScores:
    """Maximum, sum of exponentials and target's logit of each token, without writing logits.

    Args:
        hidden_TH: Hidden states, bf16, fp16 or fp32, rows starting at multiples of 16 bytes.
        weight_vH: This rank's rows of the head, same dtype.
        targets: int64 [T], a row of `weight_vH`, or anything else where the target is not among them.
        tiles: Tile sizes; None takes those of `tiles_here`.

    Raises:
        ValueError: Operands that TMA cannot address.
    """
    chosen = tiles or tiles_here()
    (num_tokens, width), vocabulary = hidden_TH.shape, weight_vH.shape[0]
    tiles_t, tiles_v = triton.cdiv(num_tokens, chosen.block_t), triton.cdiv(vocabulary, chosen.block_v)
    maxima, sums = (hidden_TH.new_empty((tiles_v, num_tokens), dtype=torch.float32) for _ in range(2))
    target_logits = hidden_TH.new_zeros(num_tokens, dtype=torch.float32)
    if num_tokens:
        _partial_sums_kernel[(min(free_processors(), tiles_t * tiles_v),)](
            *_descriptors(hidden_TH, weight_vH, chosen), targets, maxima, sums, target_logits, num_tokens, width,
            vocabulary, tiles_t, **_constants(chosen), num_warps=chosen.warps)
    largest = maxima.amax(dim=0)
    return HeadScores(largest, sums.mul_(maxima.sub_(largest).exp_()).sum(dim=0), target_logits)


def logit_gradients(hidden_TH: torch.Tensor, weight_vH: torch.Tensor, targets: torch.Tensor, largest: torch.Tensor,
                    log_sums: torch.Tensor, grad_losses: torch.Tensor, first: int, out: torch.Tensor,
                    tiles: HeadLossTiles | None = None) -> None:
    """Write gradients of some columns of the logits: (softmax - onehot) times the gradient of the token's loss.

    Args:
        hidden_TH: Hidden states, as `head_scores` was given them.
        weight_vH: All of this rank's rows.
        targets: Each token's target, a row of `weight_vH` if it is among them; int64 [T].
        largest: fp32 [T], over the columns of all ranks.
        log_sums: fp32 [T], log of the sum of exp(logit - largest) over the columns of all ranks.
        grad_losses: fp32 [T].
        first: The first column, a row of `weight_vH`.
        out: Gets the gradients of its number of columns from `first` on, [T, columns], contiguous.
        tiles: Tile sizes; None takes those of `tiles_here`.

    Raises:
        ValueError: Operands that TMA cannot address.
    """
    chosen = tiles or tiles_here()
    (num_tokens, width), columns = hidden_TH.shape, out.shape[1]
    assert out.is_contiguous() and first + columns <= weight_vH.shape[0]
    tiles_t, tiles_v = triton.cdiv(num_tokens, chosen.block_t), triton.cdiv(columns, chosen.block_v)
    if num_tokens:
        _gradients_kernel[(min(free_processors(), tiles_t * tiles_v),)](
            *_descriptors(hidden_TH, weight_vH, chosen), targets, largest, log_sums, grad_losses, out, num_tokens,
            width, first, columns, tiles_t, **_constants(chosen), num_warps=chosen.warps)


def tiles_here() -> HeadLossTiles:
    """Tile sizes on this machine."""
    return INTERPRETED_TILES if IS_INTERPRETED else HeadLossTiles()


def _constants(tiles: HeadLossTiles) -> dict[str, int]:
    return {"BLOCK_T": tiles.block_t, "BLOCK_V": tiles.block_v, "BLOCK_H": tiles.block_h, "GROUP_T": tiles.group_t,
            "STAGES": tiles.stages, "INTERPRETED": IS_INTERPRETED}


def _descriptors(hidden_TH: torch.Tensor, weight_vH: torch.Tensor, tiles: HeadLossTiles
                 ) -> tuple[TensorDescriptor, TensorDescriptor]:
    for name, tensor in (("hidden states", hidden_TH), ("the weight", weight_vH)):
        if tensor.stride(1) != 1 or tensor.stride(0) * tensor.element_size() % 16 or tensor.data_ptr() % 16:
            raise ValueError(f"fused head and loss: {name} {tuple(tensor.shape)} with strides {tensor.stride()}: TMA "
                             "takes contiguous rows that start at multiples of 16 bytes; take backend='chunked'")
    return (TensorDescriptor.from_tensor(hidden_TH, [tiles.block_t, tiles.block_h]),
            TensorDescriptor.from_tensor(weight_vH, [tiles.block_v, tiles.block_h]))
