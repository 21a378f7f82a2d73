"""Rotary position embedding on interleaved pairs, the layout of DeepSeek's checkpoints.

Pair (2i, 2i+1) of the rotary dims at position t is multiplied, as a complex number, by cos + j sin of its angle. The
order of elements is kept; Transformers and Megatron-Core permute to half-split order while they rotate. Scores are
equal.

Source: Su et al. 2021, arXiv 2104.09864; DeepSeek-V3 report, section 2.1.1. The rotation works in place on complex
numbers: even and odd slices and a concatenation would pass over memory several times.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.recompute import recomputed, saving

# Pairs that torch multiplies at once on a CPU. The number of pairs of every preset is a multiple.
_PAIRS_AT_ONCE = 8


def apply_rope(x: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor, *, is_steady: bool = False) -> torch.Tensor:
    """Rotate the last 2P dims of every row; dims before them pass through.

    One call serves a whole query [no-RoPE part | RoPE part], without a split and a concatenation.

    Args:
        x: [S, ..., D] with D >= 2P, bf16, fp32 or fp64.
        cos_SP: cosines of position and pair, fp32 (fp64 for fp64 x), times a magnitude if there is one; [S, B, P] for
            x of [S, B, ..., D] whose sequences have positions of their own.
        sin_SP: sines of the same angles.
        is_steady: Whether a row has the same bits wherever it lies in memory, as generation needs it
            (`steady_sums.py`). Only rotary widths that are no multiple of 16 have other bits then, on a CPU.

    Returns:
        [S, ..., D] in x's dtype, computed in fp32 and rounded once.

    Raises:
        ValueError: Sequence lengths or numbers of sequences differ, or 2P is larger than D.
    """
    *positions, num_pairs = cos_SP.shape
    if x.shape[0] != positions[0]:
        raise ValueError(f"apply_rope: x has {x.shape[0]} positions, cos_SP and sin_SP {positions[0]}; slice them")
    if list(x.shape[: len(positions)]) != positions:
        raise ValueError(f"apply_rope: x has {x.shape[1]} sequences, cos_SP and sin_SP {positions[1]}; give each one")
    if 2 * num_pairs > x.shape[-1]:
        raise ValueError(f"apply_rope: {num_pairs} pairs need {2 * num_pairs} dims, x has {x.shape[-1]}")
    if not torch.is_grad_enabled():
        return rotate_tail(x, torch.complex(cos_SP, sin_SP), is_steady)
    rotations_SP = recomputed(torch.complex, cos_SP, sin_SP)  # before `saving`, which looks whether there is any
    with saving():
        return _RoPE.apply(x, rotations_SP, is_steady)


def reference_rope(x: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor) -> torch.Tensor:
    """Rotate as `apply_rope` does, by even and odd elements."""
    wide = x.to(wide_dtype(x.dtype))
    cos, sin = _beside(cos_SP, x), _beside(sin_SP, x)
    start = x.shape[-1] - 2 * cos_SP.shape[-1]
    even, odd = wide[..., start::2], wide[..., start + 1 :: 2]
    rotated = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([wide[..., :start], rotated], dim=-1).to(x.dtype)


def _beside(factors: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[S, P] or [S, B, P] with the dims of x between the positions and the pairs."""
    return factors.reshape(factors.shape[:-1] + (1,) * (x.dim() - factors.dim()) + factors.shape[-1:])


def rotate_tail(x: torch.Tensor, rotations_SP: torch.Tensor, is_steady: bool = False) -> torch.Tensor:
    """`apply_rope` by complex factors [S, P] or [S, B, P], without autograd and without checks."""
    return rotate_tail_(x.clone(memory_format=torch.contiguous_format), rotations_SP, is_steady)


def rotate_tail_(x: torch.Tensor, rotations_SP: torch.Tensor, is_steady: bool = False) -> torch.Tensor:
    """`rotate_tail` in place; x is contiguous."""
    num_pairs = rotations_SP.shape[-1]
    tail = x[..., -2 * num_pairs :]
    wide = wide_dtype(x.dtype)
    factors = _beside(rotations_SP, x)
    missing = -num_pairs % _PAIRS_AT_ONCE if is_steady and x.device.type == "cpu" else 0
    if x.dtype == wide and x.shape[-1] % 2 == 0 and not missing:
        torch.view_as_complex(tail.view(*tail.shape[:-1], -1, 2)).mul_(factors)
    else:
        pairs = torch.view_as_complex(tail.to(wide).unflatten(-1, (-1, 2)).contiguous())
        if missing:  # torch rounds fewer pairs than it takes at once in another way
            pairs, factors = (torch.nn.functional.pad(pair, (0, missing)) for pair in (pairs, factors))
        tail.copy_(torch.view_as_real((pairs * factors)[..., :num_pairs]).flatten(-2))
    return x


class _RoPE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rotations_SP: torch.Tensor, is_steady: bool) -> torch.Tensor:
        ctx.save_for_backward(rotations_SP)
        return rotate_tail(x, rotations_SP, is_steady)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        # The transpose of a rotation is the rotation back; a magnitude stays.
        (rotations_SP,) = ctx.saved_tensors
        return rotate_tail(grads[0], rotations_SP.conj().resolve_conj()), None, None
