"""Attention of a few new tokens to everything before them, over cached latents or over cached keys and values.

Over latents the up-projections are absorbed: W_UK goes into the query and W_UV behind the weighted sum, so that scores
and sums are taken in the latent's width and no key or value of a past position is ever made. That is fewer bytes per
position and more arithmetic per score, (512 + 64) + 512 instead of 192 + 128 for DeepSeek-V3: right for one new token,
wrong for a prompt, which goes through the ordinary attention (ops/attention.py).

Shapes: Q new tokens of a row, B rows, N heads, D query width, E its part without rotation, R its rotated part,
C positions looked at, K latent width, W = K + R, V value width, T = Q B.
"""

from __future__ import annotations

import torch

from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype


def absorbed_attention(
    query_QBND: torch.Tensor, entries_BCW: torch.Tensor, kv_up_weight: torch.Tensor, *, nope_width: int,
    softmax_scale: float, hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale (W_UK^T q_C . c + q_R . k_R)) c, through W_UV.

    Args:
        query_QBND: Rotated queries; the rotated part is the last.
        entries_BCW: Cached normed latents and, behind each, its rotated shared key.
        kv_up_weight: [N (E + V), K], the model's own: per head the rows of W_UK, then those of W_UV; views of it
            are read.
        nope_width: E.
        softmax_scale: Multiplies the scores.
        hidden_BQC: True where a token may not look; None: everywhere it may.

    Returns:
        [Q, B, N, V] in the query's dtype.

    Source: DeepSeek-V2 report, arXiv 2405.04434, section 2.1.2 (absorption); equal to DeepSeek-V3's eq. 2-10.
    """
    num_new, rows, heads, _ = query_QBND.shape
    latent_width = kv_up_weight.shape[1]
    up_NEK, up_NVK = kv_up_weight.view(heads, -1, latent_width).split(
        [nope_width, kv_up_weight.shape[0] // heads - nope_width], dim=1)
    query_nope_TNE, query_rope_TNR = query_QBND.flatten(0, 1).split(
        [nope_width, query_QBND.shape[-1] - nope_width], dim=-1)
    query_NTK = _product(query_nope_TNE.transpose(0, 1), up_NEK)
    query_TNW = torch.cat([query_NTK.transpose(0, 1), query_rope_TNR], dim=-1)
    query_BMW = query_TNW.view(num_new, rows, heads, -1).permute(1, 2, 0, 3).reshape(rows, heads * num_new, -1)
    probabilities_BMC = _probabilities(
        _product(query_BMW, entries_BCW.transpose(1, 2)).view(rows, heads, num_new, -1), softmax_scale, hidden_BQC)
    sums_BMK = _product(probabilities_BMC.flatten(1, 2), entries_BCW[..., :latent_width])
    sums_NTK = sums_BMK.view(rows, heads, num_new, -1).permute(1, 2, 0, 3).reshape(heads, num_new * rows, -1)
    context_NTV = _product(sums_NTK, up_NVK.transpose(1, 2))
    return context_NTV.transpose(0, 1).reshape(num_new, rows, heads, -1)


def full_attention(
    query_QBND: torch.Tensor, keys_BNCD: torch.Tensor, values_BNCV: torch.Tensor, *, softmax_scale: float,
    hidden_BQC: torch.Tensor | None = None
) -> torch.Tensor:
    """softmax(scale q k^T) v over cached keys and values; arguments and result as of `absorbed_attention`.

    Source: DeepSeek-V3 report, eq. 10.
    """
    num_new, rows, heads, _ = query_QBND.shape
    query_GQD = query_QBND.permute(1, 2, 0, 3).flatten(0, 1)
    scores_GQC = _product(query_GQD, keys_BNCD.flatten(0, 1).transpose(1, 2))
    probabilities_BNQC = _probabilities(scores_GQC.view(rows, heads, num_new, -1), softmax_scale, hidden_BQC)
    context_GQV = _product(probabilities_BNQC.flatten(0, 1), values_BNCV.flatten(0, 1))
    return context_GQV.view(rows, heads, num_new, -1).permute(2, 0, 1, 3)


def _probabilities(scores_BNQC: torch.Tensor, softmax_scale: float, hidden_BQC: torch.Tensor | None) -> torch.Tensor:
    """Softmax in fp32 or fp64, back in the scores' dtype."""
    wide = scores_BNQC.to(wide_dtype(scores_BNQC.dtype)) * softmax_scale
    if hidden_BQC is not None:
        wide.masked_fill_(hidden_BQC.unsqueeze(1), float("-inf"))
    return wide.softmax(dim=-1).to(scores_BNQC.dtype)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Batched product; bf16 through fp32 where the machine has no units for it."""
    if choose_product_backend("auto", left.device, left.dtype) == "via_fp32":
        return torch.bmm(left.float(), right.float()).to(left.dtype)
    return torch.bmm(left, right)
