"""Attention of a few new tokens to everything before them, over cached latents or over cached keys and values.

Over latents the up-projections are absorbed: W_UK goes into the query and W_UV behind the weighted sum, so that scores
and sums are taken in the latent's width and no key or value of a past position is ever made. That is fewer bytes per
position and more arithmetic per score, (512 + 64) + 512 instead of 192 + 128 for DeepSeek-V3: right for one new token,
wrong for a prompt, which goes through the ordinary attention (ops/attention.py).

Shapes: Q new tokens of a row, B rows, N heads, D query width, E its part without rotation, R its rotated part,
C positions looked at, K latent width, W = K + R, V value width, T = B Q, M = Q N,
G = B N.
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype


def absorbed_attention(
    query_TND: torch.Tensor, entries_BCW: torch.Tensor, up_NEK: torch.Tensor, up_NVK: torch.Tensor, *,
    softmax_scale: float, hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale (W_UK^T q_C . c + q_R . k_R)) c, through W_UV.

    Args:
        query_TND: Rotated queries, as many of each row behind each other; the rotated part is the last of D.
        entries_BCW: Cached normed latents and, behind each, its rotated shared key.
        up_NEK: W_UK of each head.
        up_NVK: W_UV of each head.
        softmax_scale: Multiplies the scores.
        hidden_BQC: True where a token may not look; None: everywhere it may.

    Returns:
        [T, N, V] in the query's dtype.

    Source: DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2 (absorption); equal to DeepSeek-V3's eq. 2-10.
    """
    heads, nope_width, latent_width = up_NEK.shape
    rows, _, entry_width = entries_BCW.shape
    query_nope_TNE, query_rope_TNR = query_TND.split([nope_width, entry_width - latent_width], dim=-1)
    query_NTK = _product(query_nope_TNE.transpose(0, 1), up_NEK)
    query_TNW = torch.cat([query_NTK.transpose(0, 1), query_rope_TNR], dim=-1)
    scores_BMC = _product(query_TNW.view(rows, -1, entry_width), entries_BCW.transpose(1, 2))
    hidden_BMC = None if hidden_BQC is None else hidden_BQC.repeat_interleave(heads, dim=1)
    sums_BMK = _product(_probabilities(scores_BMC, softmax_scale, hidden_BMC), entries_BCW[..., :latent_width])
    context_NTV = _product(sums_BMK.view(-1, heads, latent_width).transpose(0, 1), up_NVK.transpose(1, 2))
    return context_NTV.transpose(0, 1)


def full_attention(
    query_TND: torch.Tensor, keys_BNCD: torch.Tensor, values_BNCV: torch.Tensor, *, softmax_scale: float,
    hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute softmax(scale q k^T) v over cached keys and values; arguments and result are as in `absorbed_attention`.

    Source: DeepSeek-V3 report, eq. 10.
    """
    rows, heads = keys_BNCD.shape[:2]
    query_GQD = query_TND.view(rows, -1, *query_TND.shape[1:]).transpose(1, 2).flatten(0, 1)
    scores_GQC = _product(query_GQD, keys_BNCD.flatten(0, 1).transpose(1, 2))
    hidden_GQC = None if hidden_BQC is None else hidden_BQC.repeat_interleave(heads, dim=0)
    context_GQV = _product(_probabilities(scores_GQC, softmax_scale, hidden_GQC), values_BNCV.flatten(0, 1))
    return context_GQV.view(rows, heads, *context_GQV.shape[1:]).transpose(1, 2).flatten(0, 1)


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
