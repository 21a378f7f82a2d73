"""Transformers' DeepseekV3 with the reference's weights: its configuration, its parameters' names, its MTP layers.

Transformers stacks a layer's experts in two tensors; the reference (`certification/reference_weights.py`) and the
published checkpoints have one a projection and expert.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.certification.reference import shift_left
from dsv3_megatron.certification.reference_weights import Architecture, Weights


def huggingface_config(arch: Architecture, *, rope_interleave: bool = True) -> Any:
    """Transformers' configuration of an architecture, with its plainest implementations of attention and experts."""
    from transformers import DeepseekV3Config

    rope_parameters = {"rope_type": "default", "rope_theta": arch.rotary_base}
    if arch.rope_type == "yarn":
        rope_parameters = {
            "rope_type": "yarn",
            "rope_theta": arch.rotary_base,
            "factor": arch.rotary_scaling_factor,
            "original_max_position_embeddings": arch.original_max_position_embeddings,
            "beta_fast": arch.beta_fast,
            "beta_slow": arch.beta_slow,
            "mscale": arch.mscale,
            "mscale_all_dim": arch.mscale_all_dim,
        }
    return DeepseekV3Config(
        vocab_size=arch.vocab_size,
        hidden_size=arch.hidden_size,
        intermediate_size=arch.ffn_hidden_size,
        moe_intermediate_size=arch.moe_ffn_hidden_size,
        num_hidden_layers=arch.num_layers,
        num_attention_heads=arch.num_attention_heads,
        num_key_value_heads=arch.num_attention_heads,
        n_shared_experts=arch.num_shared_experts,
        n_routed_experts=arch.num_experts,
        routed_scaling_factor=arch.moe_router_topk_scaling_factor,
        kv_lora_rank=arch.kv_lora_rank,
        q_lora_rank=arch.q_lora_rank,
        qk_rope_head_dim=arch.qk_rope_head_dim,
        v_head_dim=arch.v_head_dim,
        qk_nope_head_dim=arch.qk_nope_head_dim,
        n_group=arch.moe_router_num_groups,
        topk_group=arch.moe_router_group_topk,
        num_experts_per_tok=arch.moe_router_topk,
        first_k_dense_replace=arch.num_dense_layers,
        rms_norm_eps=arch.layernorm_epsilon,
        max_position_embeddings=int(arch.original_max_position_embeddings * arch.rotary_scaling_factor),
        rope_parameters=rope_parameters,
        rope_interleave=rope_interleave,
        num_mtp_layers=max(arch.mtp_num_layers, 1),
        attn_implementation="eager",
        experts_implementation="eager",
    )


def stacked_experts(weights: Weights, arch: Architecture) -> Weights:
    """Checkpoint names -> Transformers' parameters: each layer's experts in two tensors, gate above up."""
    stacked = {name: value for name, value in weights.items() if ".mlp.experts." not in name}
    for layer in range(arch.num_layers + arch.mtp_num_layers):
        prefix = f"model.layers.{layer}.mlp.experts"
        if f"{prefix}.0.gate_proj.weight" not in weights:
            continue
        part = {
            kind: torch.stack([weights[f"{prefix}.{e}.{kind}_proj.weight"] for e in range(arch.num_experts)])
            for kind in ("gate", "up", "down")
        }
        stacked[f"{prefix}.gate_up_proj"] = torch.cat((part["gate"], part["up"]), dim=1)
        stacked[f"{prefix}.down_proj"] = part["down"]
    return stacked


def separate_experts(stacked: Weights) -> Weights:
    """Transformers' parameters, or their gradients -> checkpoint names: the inverse of `stacked_experts`."""
    separate: Weights = {}
    for name, value in stacked.items():
        prefix, _, kind = name.rpartition(".")
        if not prefix.endswith(".mlp.experts"):
            separate[name] = value
            continue
        parts = value.chunk(2, dim=1) if kind == "gate_up_proj" else (value,)
        for part, projection in zip(parts, ("gate", "up") if len(parts) == 2 else ("down",), strict=True):
            separate |= {f"{prefix}.{e}.{projection}_proj.weight": expert for e, expert in enumerate(part)}
    return separate


def half_split_rotary(weights: Weights, arch: Architecture, *, inverse: bool = False) -> Weights:
    """Weights of interleaved rotary pairs (2i, 2i + 1) -> those of pairs (i, i + width / 2), by reordering rows.

    Args:
        inverse: From half-split to interleaved pairs.
    """
    nope, rotary = arch.qk_nope_head_dim, arch.qk_rope_head_dim
    order = torch.cat([torch.arange(0, rotary, 2), torch.arange(1, rotary, 2)])
    order = order.argsort() if inverse else order
    reordered = dict(weights)
    for name, value in weights.items():
        if name.endswith((".self_attn.q_proj.weight", ".self_attn.q_b_proj.weight")):
            heads = value.unflatten(0, (arch.num_attention_heads, nope + rotary))
            reordered[name] = torch.cat([heads[:, :nope], heads[:, nope:][:, order]], dim=1).flatten(0, 1)
        elif name.endswith(".self_attn.kv_a_proj_with_mqa.weight"):
            latent, key = value.split([arch.kv_lora_rank, rotary])
            reordered[name] = torch.cat([latent, key[order]])
    return reordered


def huggingface_model(arch: Architecture, weights: Weights, **config: Any) -> Any:
    """Transformers' DeepseekV3ForCausalLM with the main model's weights."""
    from transformers import DeepseekV3ForCausalLM

    model = DeepseekV3ForCausalLM(huggingface_config(arch, **config))
    main = {name: value for name, value in stacked_experts(weights, arch).items() if not is_mtp(name, arch)}
    missing, unexpected = model.load_state_dict(main, strict=False)
    # Without shared experts Transformers still has them, zero wide.
    assert unexpected == [] and all(model.state_dict()[name].numel() == 0 for name in missing)
    return model


def is_mtp(name: str, arch: Architecture) -> bool:
    """Whether a weight belongs to an MTP module."""
    return any(name.startswith(f"model.layers.{arch.num_layers + k}.") for k in range(arch.mtp_num_layers))


_AROUND_MTP_BLOCK = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "post_norm"}


def huggingface_mtp(model: Any, arch: Architecture, weights: Weights) -> Any:
    """Transformers' MtpModel (its decoder layer between its norms and a projection) with the MTP modules' weights."""
    from transformers.modeling_layers import MtpModel

    mtp = MtpModel(model, arch.mtp_num_layers)
    renamed = {_mtp_name(name, arch): value for name, value in stacked_experts(weights, arch).items()
               if is_mtp(name, arch)}
    wanted = {name: value for name, value in mtp.state_dict().items() if name.startswith("layers.")}
    assert renamed.keys() == {name for name, value in wanted.items() if value.numel()}
    mtp.load_state_dict(renamed, strict=False)
    return mtp


def _mtp_name(name: str, arch: Architecture) -> str:
    """The checkpoint's name of an MTP weight in Transformers' MtpModel."""
    layer, rest = name.removeprefix("model.layers.").split(".", 1)
    theirs = _AROUND_MTP_BLOCK.get(rest.removesuffix(".weight"))
    rest = f"{theirs}.weight" if theirs else f"mtp_block.{rest}"
    return f"layers.{int(layer) - arch.num_layers}.{rest}"


def mtp_outputs(model: Any, mtp: Any, tokens_BS: torch.Tensor, hidden_BSH: torch.Tensor) -> list[torch.Tensor]:
    """What the shared head reads at each MTP depth, [B, S, H].

    Args:
        hidden_BSH: The main model's output after its final norm.
    """
    length, outputs = tokens_BS.shape[1], []
    causal = torch.full((length, length), -torch.inf).triu(1)[None, None]
    for depth, layer in enumerate(mtp.layers, start=1):
        # Transformers turns by the position of the token read, we by the position that reads: RoPE is relative.
        position_ids = torch.arange(depth, depth + length)[None]
        embedded = model.model.embed_tokens(shift_left(tokens_BS, depth))
        hidden_BSH = layer(embedded, hidden_BSH, model.model.rotary_emb(embedded, position_ids), causal, position_ids,
                           None)
        outputs.append(hidden_BSH)
    return outputs


def huggingface_gradients(model: Any, mtp: Any | None, arch: Architecture) -> Weights:
    """The gradient of every parameter that has elements, under its checkpoint name."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.numel()}
    if mtp is not None:
        for name, parameter in mtp.named_parameters():
            if name.startswith("layers.") and parameter.numel():
                found[_checkpoint_name(name, arch)] = parameter.grad
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing, f"no gradient for {missing}"
    return separate_experts(found)


def _checkpoint_name(name: str, arch: Architecture) -> str:
    """The inverse of `_mtp_name`."""
    layer, rest = name.removeprefix("layers.").split(".", 1)
    ours = {theirs: ours for ours, theirs in _AROUND_MTP_BLOCK.items()}.get(rest.removesuffix(".weight"))
    rest = f"{ours}.weight" if ours else rest.removeprefix("mtp_block.")
    return f"model.layers.{arch.num_layers + int(layer)}.{rest}"
