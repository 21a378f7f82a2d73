"""AdamW on many pieces of memory in one launch: fp32 weights and gradients, each moment in fp32 or bf16.

A table in GPU memory says where the pieces are; program (i, j) updates elements j SIZE .. (j + 1) SIZE of piece i, in
registers: 4 + 4 + 2 + 2 bytes are read and 4 + 2 + 2 written for an element with two bf16 moments, and nothing else.
bf16 is handled as the upper half of fp32, in integers, so that rounding is the same on a GPU and under the interpreter.

The reference is `optim/adamw.py` without this kernel. Rounding to nearest and stochastic rounding are exact functions
of the fp32 results; these differ from the reference's in their last bits, as sums and products in another order do.

Run under Triton's interpreter in tests. Compiled for Hopper. On a GPU: not run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

# Columns of the table: addresses of weights, gradients, moments; elements; offset in the tables of random bits.
PIECE_COLUMNS = 6
_SIZE = 2048
_WARPS = 8


@dataclass(frozen=True)
class Settings:
    """AdamW's numbers at one step, for a group of parameters.

    Attributes:
        lr: Learning rate.
        beta1: Decay of the first moment.
        beta2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled decay, a share of lr.
        step: Number of the step, from 1.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    step: int


@triton.jit
def _load_moment(address, at, mask, IS_NARROW: tl.constexpr):
    if IS_NARROW:
        bits = tl.load(address.to(tl.pointer_type(tl.int16)) + at, mask=mask, other=0)
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)


@triton.jit
def _store_moment(address, at, mask, values, noise, IS_NARROW: tl.constexpr, IS_STOCHASTIC: tl.constexpr):
    if IS_NARROW:
        bits = values.to(tl.int32, bitcast=True)
        if IS_STOCHASTIC:
            bits += noise
        else:
            nearest = bits + 0x7FFF + ((bits >> 16) & 1)
            bits = tl.where(tl.abs(values) < float("inf"), nearest, bits)
        tl.store(address.to(tl.pointer_type(tl.int16)) + at, (bits >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(address.to(tl.pointer_type(tl.float32)) + at, values, mask=mask)


@triton.jit
def _adamw_kernel(pieces_ptr, keys_ptr, first_bits_ptr, second_bits_ptr, beta1, one_minus_beta1, beta2, one_minus_beta2,
                  eps, kept, step_size, root_of_correction, FIRST_IS_NARROW: tl.constexpr,
                  SECOND_IS_NARROW: tl.constexpr, IS_STOCHASTIC: tl.constexpr, SIZE: tl.constexpr):
    piece = pieces_ptr + tl.program_id(0).to(tl.int64) * 6
    count = tl.load(piece + 4).to(tl.int32)
    first_element = tl.program_id(1) * SIZE
    if first_element < count:
        at = first_element + tl.arange(0, SIZE)
        mask = at < count
        weights = tl.load(piece).to(tl.pointer_type(tl.float32)) + at
        gradient = tl.load(tl.load(piece + 1).to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
        first_at, second_at = tl.load(piece + 2), tl.load(piece + 3)
        weight = tl.load(weights, mask=mask, other=0.0) * kept
        first = beta1 * _load_moment(first_at, at, mask, FIRST_IS_NARROW) + one_minus_beta1 * gradient
        second = (beta2 * _load_moment(second_at, at, mask, SECOND_IS_NARROW)
                  + one_minus_beta2 * gradient * gradient)
        denominator = tl.div_rn(tl.sqrt_rn(second), root_of_correction + tl.zeros_like(second)) + eps
        tl.store(weights, weight - tl.div_rn(step_size * first, denominator), mask=mask)
        first_noise = tl.zeros((SIZE,), tl.int32)
        second_noise = tl.zeros((SIZE,), tl.int32)
        if IS_STOCHASTIC:
            offset = tl.load(piece + 5).to(tl.int32)
            keys = keys_ptr + tl.program_id(0) * 2
            first_noise = tl.load(first_bits_ptr + offset + at, mask=mask, other=0) ^ tl.load(keys)
            second_noise = tl.load(second_bits_ptr + offset + at, mask=mask, other=0) ^ tl.load(keys + 1)
        _store_moment(first_at, at, mask, first, first_noise, FIRST_IS_NARROW, IS_STOCHASTIC)
        _store_moment(second_at, at, mask, second, second_noise, SECOND_IS_NARROW, IS_STOCHASTIC)


def update_pieces(pieces_P6: torch.Tensor, keys_P2: torch.Tensor | None, bits: tuple[torch.Tensor, ...],
                  settings: Settings, *, are_narrow: tuple[bool, bool], longest: int) -> None:
    """Update weights and moments of every piece by its gradients, in place, in one launch.

    Args:
        pieces_P6: int64, a row a piece: addresses of its fp32 weights, fp32 gradients, first and second moments; its
            number of elements; where its elements begin in the tables of random bits.
        keys_P2: int32, what the random bits of a piece's moments are combined with; None: round to nearest.
        bits: The tables of random bits of the two moments, int32; empty with `keys_P2` None.
        settings: The step.
        are_narrow: Whether each moment is stored in bf16, else fp32.
        longest: Elements of the longest piece.
    """
    pieces = pieces_P6.shape[0]
    if not pieces or not longest:
        return
    is_stochastic = keys_P2 is not None
    first_bits, second_bits = bits if is_stochastic else (pieces_P6, pieces_P6)
    correction1, correction2 = (1 - beta**settings.step for beta in (settings.beta1, settings.beta2))
    _adamw_kernel[(pieces, triton.cdiv(longest, _SIZE))](
        pieces_P6, keys_P2 if is_stochastic else pieces_P6, first_bits, second_bits, settings.beta1,
        1 - settings.beta1, settings.beta2, 1 - settings.beta2, settings.eps, 1 - settings.lr * settings.weight_decay,
        settings.lr / correction1, correction2**0.5, FIRST_IS_NARROW=are_narrow[0], SECOND_IS_NARROW=are_narrow[1],
        IS_STOCHASTIC=is_stochastic, SIZE=_SIZE, num_warps=_WARPS)
