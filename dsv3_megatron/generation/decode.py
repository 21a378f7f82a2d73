"""Attention of a few new tokens to everything before them, over cached latents or over cached keys and values.

Over latents the up-projections are absorbed: W_UK goes into the query and W_UV behind the weighted sum, so that scores
and sums are taken in the latent's width and no key or value of a past position is ever made. That is fewer bytes per
position and more arithmetic per score, (512 + 64) + 512 instead of 192 + 128 for DeepSeek-V3: right for one new token,
wrong for a prompt, which goes through the ordinary attention (ops/attention.py).

Shapes: Q new tokens of a row, B rows, N heads, D query width, X its part without rotation, Y its rotated part,
C positions looked at, Z latent width, W = Z + Y, U value width, T = B Q, J = Q N, A = B N.
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype
from dsv3_megatron.ops.softmax import softmax_
from dsv3_megatron.ops.steady_sums import steady_context, steady_scores


def absorbed_attention(
    query_TND: torch.Tensor, entries_BCW: torch.Tensor, up_NXZ: torch.Tensor, up_NUZ: torch.Tensor, *,
    softmax_scale: float, hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale (W_UK^T q_C . c + q_R . k_R)) c, through W_UV.

    Args:
        query_TND: Rotated queries, as many of each row behind each other; the rotated part is the last of D.
        entries_BCW: Cached normed latents and, behind each, its rotated shared key.
        up_NXZ: W_UK of each head.
        up_NUZ: W_UV of each head.
        softmax_scale: Multiplies the scores.
        hidden_BQC: True where a token may not look; None: everywhere it may.

    Returns:
        [T, N, U] in the query's dtype.

    Source: DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2 (absorption); equal to DeepSeek-V3's eq. 2-10.
    """
    heads, nope_width, latent_width = up_NXZ.shape
    rows, _, entry_width = entries_BCW.shape
    query_nope_TNX, query_rope_TNY = query_TND.split([nope_width, entry_width - latent_width], dim=-1)
    query_NTZ = _product(query_nope_TNX.transpose(0, 1), up_NXZ)
    query_TNW = torch.cat([query_NTZ.transpose(0, 1), query_rope_TNY], dim=-1)
    scores_BJC = _product(query_TNW.view(rows, -1, entry_width), entries_BCW.transpose(1, 2))
    hidden_BJC = None if hidden_BQC is None else hidden_BQC.repeat_interleave(heads, dim=1)
    sums_BJZ = _product(_probabilities(scores_BJC, softmax_scale, hidden_BJC), entries_BCW[..., :latent_width])
    context_NTU = _product(sums_BJZ.view(-1, heads, latent_width).transpose(0, 1), up_NUZ.transpose(1, 2))
    return context_NTU.transpose(0, 1)


def full_attention(
    query_TND: torch.Tensor, keys_BNCD: torch.Tensor, values_BNCU: torch.Tensor, *, softmax_scale: float,
    hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute softmax(scale q k^T) v over cached keys and values; arguments and result are as in `absorbed_attention`.

    Source: DeepSeek-V3 report, eq. 10.
    """
    rows, heads = keys_BNCD.shape[:2]
    query_AQD = query_TND.view(rows, -1, *query_TND.shape[1:]).transpose(1, 2).flatten(0, 1)
    scores_AQC = _product(query_AQD, keys_BNCD.flatten(0, 1).transpose(1, 2))
    hidden_AQC = None if hidden_BQC is None else hidden_BQC.repeat_interleave(heads, dim=0)
    context_AQU = _product(_probabilities(scores_AQC, softmax_scale, hidden_AQC), values_BNCU.flatten(0, 1))
    return context_AQU.view(rows, heads, *context_AQU.shape[1:]).transpose(1, 2).flatten(0, 1)


def tile_attention(
    query_TND: torch.Tensor, keys_BNCD: torch.Tensor, values_BNCU: torch.Tensor, *, softmax_scale: float,
    hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute what `full_attention` does by the steps and in the dtypes of a tile of training's attention on a CPU.

    A query's result has the same bits whatever queries and masked keys are multiplied with it, as a tile's that is
    steady. Arguments and result are as in `absorbed_attention`.

    Source: `ops/attention.py`, "blocked"; `ops/steady_sums.py`.
    """
    rows, heads = keys_BNCD.shape[:2]
    query_BQND, wide = query_TND.view(rows, -1, *query_TND.shape[1:]), wide_dtype(query_TND.dtype)
    query_BNQD = query_BQND.transpose(1, 2).to(dtype=wide, memory_format=torch.contiguous_format, copy=True)
    keys_ACD, values_ACU = (stored.to(wide).flatten(0, 1) for stored in (keys_BNCD, values_BNCU))
    scores_AQC = steady_scores(query_BNQD.mul_(softmax_scale).flatten(0, 1), keys_ACD)
    if hidden_BQC is not None:
        scores_AQC.view(rows, heads, *scores_AQC.shape[1:]).masked_fill_(hidden_BQC.unsqueeze(1), float("-inf"))
    context_AQU = steady_context(softmax_(scores_AQC), values_ACU)
    context_BNQU = context_AQU.unflatten(0, (rows, heads))
    return context_BNQU.transpose(1, 2).flatten(0, 1).to(query_TND.dtype)


def _probabilities(scores: torch.Tensor, softmax_scale: float, hidden: torch.Tensor | None) -> torch.Tensor:
    """Softmax over positions, the last dimension, in fp32 or fp64, back in the scores' dtype."""
    wide = scores.to(wide_dtype(scores.dtype)) * softmax_scale
    if hidden is not None:
        wide.masked_fill_(hidden, float("-inf"))
    return wide.softmax(dim=-1).to(scores.dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product; bf16 through fp32 where the machine has no units for it."""
    if choose_product_backend("auto", left.device, left.dtype) == "via_fp32":
        return torch.bmm(left.float(), right.float()).to(left.dtype)
    return torch.bmm(left, right)
