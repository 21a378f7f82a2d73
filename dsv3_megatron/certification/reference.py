"""A slow, obvious DeepSeek-V3 in plain torch: what every faster path of the library is compared with.

One process, no Megatron-Core, nothing from dsv3_megatron. The model is a set of functions of a flat dict of
weights under the names of the published checkpoint (`model.layers.3.self_attn.q_a_proj.weight`), so that a test can
hand the same dict to this module, to Hugging Face's model and, translated, to ours. Gradients come from autograd on
the dict's tensors. Arithmetic is in the dtype of the weights (float64 unless asked otherwise); norms, softmaxes,
router scores and losses never use less than float32.

"Report" is the DeepSeek-V3 technical report (arXiv 2412.19437v2); the numbers are its equations. Where the report is
silent, the published checkpoint and Megatron-Core 0.19.2 decide, and the docstring says so.

Shape suffixes: B sequences, S positions, T tokens (B x S), H hidden, N heads, D head width, E experts, K experts per
token, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3_megatron.certification.reference_weights import Architecture, Weights, is_router_bias
from dsv3_megatron.certification.reference_weights import random_weights as random_weights
from dsv3_megatron.certification.reference_weights import weight_shapes as weight_shapes


@dataclass(frozen=True)
class ReferenceRouting:
    """What one router decided: gates_TK, expert_ids_TK (best biased score first) and the sigmoid scores_TE."""

    gates_TK: Tensor
    expert_ids_TK: Tensor
    scores_TE: Tensor


@dataclass(frozen=True)
class ReferenceLosses:
    """Everything one micro-batch produces.

    Attributes:
        lm_loss: mean cross-entropy over the counted tokens.
        mtp_losses: one mean cross-entropy per depth, without the factor lambda / D.
        balance_losses: layer -> eq. 17 with its factor alpha, mean over the sequences; MTP modules included.
        balance_loss: sum of balance_losses.
        total: lm_loss + (lambda / D) sum of mtp_losses + balance_loss.
        logits_BSV, mtp_logits_BSV: main model's, and one per depth.
        hidden_BSH: residual stream after the embedding (index 0) and after each main layer.
        normed_BSH: index 0 the main model's output after its final norm, index k the output of MTP depth k after
            its `shared_head.norm`: what the output head reads.
        routings: layer -> ReferenceRouting, MTP modules at num_layers + k.
    """

    lm_loss: Tensor
    mtp_losses: list[Tensor]
    balance_losses: dict[int, Tensor]
    balance_loss: Tensor
    total: Tensor
    logits_BSV: Tensor
    mtp_logits_BSV: list[Tensor]
    hidden_BSH: list[Tensor]
    normed_BSH: list[Tensor]
    routings: dict[int, ReferenceRouting]


def at_least_float32(x: Tensor) -> Tensor:
    """float64 stays, everything narrower becomes float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T with W of shape [out, in]; no layer of the model has a bias."""
    return torch.einsum("...i,oi->...o", x, weight)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight, over the last dim."""
    wide = at_least_float32(x)
    return weight * (wide / torch.sqrt((wide * wide).mean(dim=-1, keepdim=True) + epsilon)).to(x.dtype)


def swiglu(weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """W_down (silu(W_gate x) * W_up x): the dense FFN, a routed expert, or the shared experts side by side."""
    gate = linear(x, weights[f"{prefix}.gate_proj.weight"])
    up = linear(x, weights[f"{prefix}.up_proj.weight"])
    return linear(gate * torch.sigmoid(gate) * up, weights[f"{prefix}.down_proj.weight"])


# Rotary embedding and attention: report section 2.1.1 (eq. 1-11) and 4.3 (YaRN).


def yarn_temperature(scale: float, mscale: float) -> float:
    """0.1 mscale ln(scale) + 1: the report's sqrt(t); 1 where the context is not extended."""
    return 1.0 if scale <= 1.0 else 0.1 * mscale * math.log(scale) + 1.0


def rope_frequencies(arch: Architecture) -> list[float]:
    """Radians per position of each of the qk_rope_head_dim / 2 pairs.

    Plain: theta^(-2i/d). YaRN divides the slow ones by the scaling factor and leaves the fast ones; between pair
    `low` (beta_fast rotations within the original context, rounded down) and pair `high` (beta_slow rotations,
    rounded up) it mixes linearly in i. Source: DeepSeek's published code, which rounds; the YaRN paper does not.
    """
    dim, base = arch.qk_rope_head_dim, arch.rotary_base
    plain = [base ** (-2 * i / dim) for i in range(dim // 2)]
    if arch.rope_type == "rope":
        return plain

    def pair_with(rotations: float) -> float:
        # Solve original_length * base^(-2i/dim) / (2 pi) = rotations for i.
        return dim * math.log(arch.original_max_position_embeddings / (2 * math.pi * rotations)) / (2 * math.log(base))

    low = max(math.floor(pair_with(arch.beta_fast)), 0)
    high = min(math.ceil(pair_with(arch.beta_slow)), dim - 1)
    mixed = []
    for i, frequency in enumerate(plain):
        interpolated = min(max((i - low) / (high - low if high != low else 0.001), 0.0), 1.0)
        mixed.append((1 - interpolated) * frequency + interpolated * frequency / arch.rotary_scaling_factor)
    return mixed


def rope_multiplier(arch: Architecture) -> float:
    """Factor on cos and sin: 1 for plain RoPE, and for YaRN where mscale equals mscale_all_dim, as published."""
    if arch.rope_type == "rope":
        return 1.0
    numerator = yarn_temperature(arch.rotary_scaling_factor, arch.mscale)
    return numerator / yarn_temperature(arch.rotary_scaling_factor, arch.mscale_all_dim)


def softmax_scale(arch: Architecture) -> float:
    """1 / sqrt(qk width), times the squared temperature under YaRN; 0.1352338 for V3's 4K -> 160K."""
    scale = (arch.qk_nope_head_dim + arch.qk_rope_head_dim) ** -0.5
    if arch.rope_type == "rope":
        return scale
    return scale * yarn_temperature(arch.rotary_scaling_factor, arch.mscale_all_dim) ** 2


def rope(x_BSND: Tensor, arch: Architecture) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by position * frequency[i]; the pairs stay where they are.

    Interleaved pairs are the checkpoint's layout. Implementations that first gather the even and the odd elements
    into halves (Transformers, Megatron-Core's MLA) return another order of the same numbers, for queries and keys
    alike, so their scores are equal.
    """
    num_positions = x_BSND.shape[1]
    wide = at_least_float32(x_BSND)
    frequencies = torch.tensor(rope_frequencies(arch), dtype=torch.float64)
    angle_SD = torch.arange(num_positions, dtype=torch.float64)[:, None] * frequencies[None, :]
    cos = (angle_SD.cos() * rope_multiplier(arch)).to(wide.dtype)[None, :, None, :]
    sin = (angle_SD.sin() * rope_multiplier(arch)).to(wide.dtype)[None, :, None, :]
    even, odd = wide[..., 0::2], wide[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.reshape(x_BSND.shape).to(x_BSND.dtype)


def mla(weights: Weights, prefix: str, arch: Architecture, x_BSH: Tensor) -> Tensor:
    """Multi-head latent attention, causal, not absorbed. Report eq. 1-11.

    Args:
        prefix: name in front of the weights, `model.layers.N.self_attn`.
        x_BSH: the normed input of the layer.
    """
    heads, nope, rotary, value = (
        arch.num_attention_heads,
        arch.qk_nope_head_dim,
        arch.qk_rope_head_dim,
        arch.v_head_dim,
    )
    batch, length, _ = x_BSH.shape
    epsilon = arch.layernorm_epsilon if arch.latent_layernorm_epsilon is None else arch.latent_layernorm_epsilon
    # eq. 6-8: queries, per head [nope | rope].
    if arch.q_lora_rank is None:
        q = linear(x_BSH, weights[f"{prefix}.q_proj.weight"])
    else:
        c_q = linear(x_BSH, weights[f"{prefix}.q_a_proj.weight"])
        c_q = rms_norm(c_q, weights[f"{prefix}.q_a_layernorm.weight"], epsilon)
        q = linear(c_q, weights[f"{prefix}.q_b_proj.weight"])
    q_BSND = q.reshape(batch, length, heads, nope + rotary)
    q_nope, q_rope = q_BSND[..., :nope], rope(q_BSND[..., nope:], arch)
    # eq. 1, 3: the latent (normed) and the one rotary key of all heads (not normed).
    down = linear(x_BSH, weights[f"{prefix}.kv_a_proj_with_mqa.weight"])
    c_kv, k_rope_BSD = down[..., : arch.kv_lora_rank], down[..., arch.kv_lora_rank :]
    c_kv = rms_norm(c_kv, weights[f"{prefix}.kv_a_layernorm.weight"], epsilon)
    k_rope = rope(k_rope_BSD[:, :, None, :], arch)[:, :, 0, :]
    # eq. 2, 5: keys and values, per head [nope | value].
    kv_BSND = linear(c_kv, weights[f"{prefix}.kv_b_proj.weight"]).reshape(batch, length, heads, nope + value)
    k_nope, v = kv_BSND[..., :nope], kv_BSND[..., nope:]
    # eq. 10: scores of query position s against key position t; later keys get -inf.
    scores = torch.einsum("bsnd,btnd->bnst", q_nope, k_nope) + torch.einsum("bsnd,btd->bnst", q_rope, k_rope)
    mask_ST = torch.zeros(length, length, dtype=scores.dtype)
    for s in range(length):
        mask_ST[s, s + 1 :] = -math.inf
    attention = torch.softmax(at_least_float32(scores) * softmax_scale(arch) + mask_ST, dim=-1).to(x_BSH.dtype)
    # eq. 11
    o_BSND = torch.einsum("bnst,btnd->bsnd", attention, v)
    return linear(o_BSND.reshape(batch, length, heads * value), weights[f"{prefix}.o_proj.weight"])


# Experts: report section 2.1.2 (eq. 12-20).


def select_experts(biased_E: list[float], arch: Architecture) -> list[int]:
    """One token's experts, best first: top K of the biased scores within the best groups.

    A group's score is the sum of its K / M best biased scores, M the groups kept (section 2.1.2, node-limited
    routing; biased as in DeepSeek's code), or of a given number. Experts of other groups are out whatever their score,
    also where the scores of the kept ones are negative; or, masked with "zero", they compete with a score of 0.
    """
    per_group = arch.num_experts // arch.moe_router_num_groups
    per_node = arch.moe_router_group_score_topk or arch.moe_router_topk // arch.moe_router_group_topk
    groups = range(arch.moe_router_num_groups)
    members = [list(range(group * per_group, (group + 1) * per_group)) for group in groups]
    group_scores = [sum(sorted((biased_E[e] for e in members[group]), reverse=True)[:per_node]) for group in groups]
    kept = sorted(groups, key=lambda group: -group_scores[group])[: arch.moe_router_group_topk]
    if arch.moe_router_group_mask == "zero":
        ranks = [score if e // per_group in kept else 0.0 for e, score in enumerate(biased_E)]
        return sorted(range(arch.num_experts), key=lambda e: -ranks[e])[: arch.moe_router_topk]
    candidates = [e for group in sorted(kept) for e in members[group]]
    return sorted(candidates, key=lambda e: -biased_E[e])[: arch.moe_router_topk]


def route(weights: Weights, prefix: str, arch: Architecture, x_TH: Tensor) -> ReferenceRouting:
    """Affinities, biased selection, unbiased gates. Report eq. 12-16; softmax affinities are DeepSeek-V2's.

    Gates are the selected affinities divided by their sum, times the scaling factor, for any K: also for K = 1,
    where Megatron-Core 0.19.2 skips the division. No gradient flows through the choice or into the bias.
    """
    logits_TE = linear(at_least_float32(x_TH), at_least_float32(weights[f"{prefix}.weight"]))
    if arch.moe_router_score_function == "softmax":
        weights_TE = (logits_TE - logits_TE.max(dim=-1, keepdim=True).values.detach()).exp()
        scores_TE = weights_TE / weights_TE.sum(dim=-1, keepdim=True)
    else:
        assert arch.moe_router_score_function == "sigmoid"
        scores_TE = torch.sigmoid(logits_TE)
    biased_TE = scores_TE.detach() + weights[f"{prefix}.e_score_correction_bias"].detach()
    expert_ids_TK = torch.tensor([select_experts(biased_E, arch) for biased_E in biased_TE.tolist()])
    selected_TK = torch.gather(scores_TE, 1, expert_ids_TK)
    gates_TK = arch.moe_router_topk_scaling_factor * selected_TK / selected_TK.sum(dim=1, keepdim=True)
    return ReferenceRouting(gates_TK, expert_ids_TK, scores_TE)


def moe(weights: Weights, prefix: str, arch: Architecture, x_BSH: Tensor) -> tuple[Tensor, ReferenceRouting]:
    """Shared experts plus the gated sum of the chosen ones; no token is dropped. Report eq. 12.

    The residual h' = u + ... is added by `block`. An expert that no token chose gets a zero gradient, not None.
    """
    x_TH = x_BSH.reshape(-1, arch.hidden_size)
    routing = route(weights, f"{prefix}.gate", arch, x_TH)
    out_TH = torch.zeros_like(x_TH)
    for expert in range(arch.num_experts):
        rows, slots = torch.where(routing.expert_ids_TK == expert)
        gates = routing.gates_TK[rows, slots].to(x_TH.dtype)
        expert_out = swiglu(weights, f"{prefix}.experts.{expert}", x_TH[rows])
        out_TH = out_TH.index_add(0, rows, gates[:, None] * expert_out)
    if arch.num_shared_experts > 0:
        out_TH = out_TH + swiglu(weights, f"{prefix}.shared_experts", x_TH)
    return out_TH.reshape(x_BSH.shape), routing


def sequence_balance_loss(scores_BSE: Tensor, *, top_k: int, alpha: float) -> Tensor:
    """Sequence-wise balance loss of one layer, mean over the sequences. Report eq. 17-20.

    The experts that f_i counts are the top K of the unbiased scores over all groups (eq. 18), not the ones that the
    router chose; f_i carries no gradient. The mean over sequences is Megatron-Core's (`seq_aux_loss`).
    """
    num_experts = scores_BSE.shape[-1]
    losses = []
    for scores_SE in scores_BSE:
        length = scores_SE.shape[0]
        best_SK = scores_SE.detach().topk(top_k, dim=-1).indices
        counts_E = torch.bincount(best_SK.flatten(), minlength=num_experts)
        f_E = counts_E.to(scores_SE.dtype) * num_experts / (top_k * length)
        p_E = (scores_SE / scores_SE.sum(dim=-1, keepdim=True)).mean(dim=0)
        losses.append(alpha * (f_E * p_E).sum())
    return torch.stack(losses).mean()


def updated_router_bias(bias_E: Tensor, expert_ids_TK: Tensor, update_rate: float) -> Tensor:
    """b_i + rate * sign(mean load - load_i), the load counted over a whole step. Report section 2.1.2."""
    counts_E = torch.bincount(expert_ids_TK.flatten(), minlength=bias_E.numel()).to(torch.float64)
    return bias_E + (update_rate * torch.sign(counts_E.mean() - counts_E)).to(bias_E.dtype)


# The model: report figures 2 and 3.


def block(weights: Weights, arch: Architecture, layer: int, x_BSH: Tensor) -> tuple[Tensor, ReferenceRouting | None]:
    """One pre-norm transformer layer."""
    prefix, epsilon = f"model.layers.{layer}", arch.layernorm_epsilon
    normed = rms_norm(x_BSH, weights[f"{prefix}.input_layernorm.weight"], epsilon)
    u_BSH = x_BSH + mla(weights, f"{prefix}.self_attn", arch, normed)
    normed = rms_norm(u_BSH, weights[f"{prefix}.post_attention_layernorm.weight"], epsilon)
    if not arch.is_moe_layer(layer):
        return u_BSH + swiglu(weights, f"{prefix}.mlp", normed), None
    out, routing = moe(weights, f"{prefix}.mlp", arch, normed)
    return u_BSH + out, routing


def shift_left(x_BS: Tensor, depth: int) -> Tensor:
    """Position i takes what stood at i + depth; the last `depth` positions become 0 (token 0, not counted)."""
    shifted = torch.zeros_like(x_BS)
    shifted[:, : x_BS.shape[1] - depth] = x_BS[:, depth:]
    return shifted


def mtp_module(
    weights: Weights, arch: Architecture, depth: int, h_BSH: Tensor, shifted_tokens_BS: Tensor
) -> tuple[Tensor, ReferenceRouting | None]:
    """MTP module of depth 1..D, without the head. Report eq. 21-23.

    Args:
        h_BSH: hidden states: at depth 1 the main model's output after its final norm; at depth k the return value of
            depth k - 1, that is after that module's `shared_head.norm`. Megatron-Core and Transformers' MtpLayer pass
            the same; the report does not say where the norms stand.
        shifted_tokens_BS: the input tokens shifted left by `depth`.

    Returns:
        The block's output after `shared_head.norm` (what the shared head reads), and the block's routing.

    Differs from the report in the order of the concatenation: the checkpoint's eh_proj reads [Emb; h].
    The block sees all S positions with rotary positions 0..S-1: the last `depth` ones hold token 0's embedding,
    which no counted position attends to, but which the router sees.
    """
    prefix, epsilon = f"model.layers.{arch.num_layers + depth - 1}", arch.layernorm_epsilon
    embedded = weights["model.embed_tokens.weight"][shifted_tokens_BS]
    both = torch.cat(
        (
            rms_norm(embedded, weights[f"{prefix}.enorm.weight"], epsilon),
            rms_norm(h_BSH, weights[f"{prefix}.hnorm.weight"], epsilon),
        ),
        dim=-1,
    )
    x_BSH = linear(both, weights[f"{prefix}.eh_proj.weight"])
    x_BSH, routing = block(weights, arch, arch.num_layers + depth - 1, x_BSH)
    return rms_norm(x_BSH, weights[f"{prefix}.shared_head.norm.weight"], epsilon), routing


def main_model(
    weights: Weights, arch: Architecture, tokens_BS: Tensor
) -> tuple[Tensor, list[Tensor], dict[int, ReferenceRouting]]:
    """Output after the final norm, the residual stream after the embedding and each layer, and the routings."""
    hidden = [weights["model.embed_tokens.weight"][tokens_BS]]
    routings = {}
    for layer in range(arch.num_layers):
        x_BSH, routing = block(weights, arch, layer, hidden[-1])
        hidden.append(x_BSH)
        if routing is not None:
            routings[layer] = routing
    return rms_norm(hidden[-1], weights["model.norm.weight"], arch.layernorm_epsilon), hidden, routings


def masked_cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, mask_BS: Tensor, denominator: Tensor) -> Tensor:
    """Sum of -log p(label) over the positions that the mask counts, divided by the denominator."""
    log_p_BSV = torch.log_softmax(at_least_float32(logits_BSV), dim=-1)
    nll_BS = -torch.gather(log_p_BSV, 2, labels_BS[:, :, None])[:, :, 0]
    return (nll_BS * mask_BS).sum() / denominator.clamp(min=1)


def losses(
    weights: Weights,
    config: object,
    tokens_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor | None = None,
    *,
    mtp_loss_scaling_factor: float = 0.3,
    balance_loss_alpha: float = 1e-4,
    mtp_mean_over: str = "counted",
) -> ReferenceLosses:
    """Forward pass and every loss of one micro-batch. Report eq. 17-25.

    Args:
        config: an Architecture, or any object with its attributes.
        tokens_BS, labels_BS: int64; labels[i] is the token that follows tokens[i].
        loss_mask_BS: 1 where the label counts, 0 where it does not; all by default.
        mtp_loss_scaling_factor: weight lambda of the MTP losses.
        balance_loss_alpha: weight alpha of the balance losses.
        mtp_mean_over: "counted" divides depth k's sum by the number of labels it counts, S - k in each sequence
            without a mask: Megatron-Core's. "main" divides by the main loss's number: the report's 1/T (eq. 24).

    At depth k, position i (from 0) reads Emb(tokens[i + k]) and predicts labels[i + k], for i = 0..S-1-k: exactly
    the terms of eq. 24. It counts where the mask counts the label's own position, loss_mask[i + k].

    With `calculate_per_token_loss` Megatron-Core weights each micro-batch's MTP mean by the micro-batch's main token
    count and divides by the step's; that equals this function on the whole batch wherever the two counts have the
    same ratio in every micro-batch, in particular without a mask.
    """
    arch = Architecture.of(config)
    if mtp_mean_over not in ("counted", "main"):
        raise ValueError(f"mtp_mean_over={mtp_mean_over!r} must be 'counted' or 'main'")
    head_VH = weights["lm_head.weight"]
    mask_BS = torch.ones_like(labels_BS) if loss_mask_BS is None else loss_mask_BS
    mask_BS = mask_BS.to(torch.promote_types(head_VH.dtype, torch.float32))

    h_BSH, hidden, routings = main_model(weights, arch, tokens_BS)
    normed = [h_BSH]
    logits_BSV = linear(h_BSH, head_VH)
    lm_loss = masked_cross_entropy(logits_BSV, labels_BS, mask_BS, mask_BS.sum())

    mtp_losses, mtp_logits = [], []
    for depth in range(1, arch.mtp_num_layers + 1):
        h_BSH, routing = mtp_module(weights, arch, depth, normed[-1], shift_left(tokens_BS, depth))
        normed.append(h_BSH)
        if routing is not None:
            routings[arch.num_layers + depth - 1] = routing
        mtp_logits.append(linear(h_BSH, head_VH))
        shifted_mask_BS = shift_left(mask_BS, depth)
        denominator = (shifted_mask_BS if mtp_mean_over == "counted" else mask_BS).sum()
        shifted_labels_BS = shift_left(labels_BS, depth)
        mtp_losses.append(masked_cross_entropy(mtp_logits[-1], shifted_labels_BS, shifted_mask_BS, denominator))

    balance_losses = {
        layer: sequence_balance_loss(
            routing.scores_TE.reshape(*tokens_BS.shape, arch.num_experts),
            top_k=arch.moe_router_topk,
            alpha=balance_loss_alpha,
        )
        for layer, routing in routings.items()
    }
    zero = torch.zeros_like(lm_loss)
    balance_loss = sum(balance_losses.values(), start=zero)
    mtp_term = sum(mtp_losses, start=zero) * (mtp_loss_scaling_factor / max(arch.mtp_num_layers, 1))
    return ReferenceLosses(
        lm_loss=lm_loss,
        mtp_losses=mtp_losses,
        balance_losses=balance_losses,
        balance_loss=balance_loss,
        total=lm_loss + mtp_term + balance_loss,
        logits_BSV=logits_BSV,
        mtp_logits_BSV=mtp_logits,
        hidden_BSH=hidden,
        normed_BSH=normed,
        routings=routings,
    )


def loss_and_gradients(weights: Weights, config: object, *args: Any, **options: Any) -> tuple[ReferenceLosses, Weights]:
    """`losses`, and the gradient of its total by every weight but the routers' biases, under the same names."""
    leaves = {name: weight.detach().clone() for name, weight in weights.items()}
    trained = [name for name in leaves if not is_router_bias(name)]
    for name in trained:
        leaves[name].requires_grad_(True)
    result = losses(leaves, config, *args, **options)
    gradients = torch.autograd.grad(result.total, [leaves[name] for name in trained])
    return result, dict(zip(trained, gradients, strict=True))
