"""The only translation from this library's configuration to Megatron-Core's.

Where Megatron-Core's spelling or default would mislead, the line says so.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.rotary import rotary_fields
from dsv3_megatron.parallel.layout import layout_string, stage_layouts

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def mcore_config(run: RunConfig, precision: str, *, transformer_impl: str = "local") -> MLATransformerConfig:
    """Megatron-Core's configuration of the model, its split and its losses.

    Args:
        run: A validated run.
        precision: "bf16" or "fp32", resolved (not "auto").
        transformer_impl: Kind of modules, resolved: "local" or "transformer_engine". Local ones are told what to
            recompute by `recomputed_modules.py`.
    """
    model, parallel, training = run.model, run.parallel, run.training
    dtype = DTYPES[precision]
    chunks = parallel.stages_per_rank
    layout = layout_string(stage_layouts(model, parallel))
    return MLATransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        ffn_hidden_size=model.ffn_hidden_size,
        # MLA. Megatron-Core's qk_head_dim is the part without rotary embedding only.
        multi_latent_attention=True,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_head_dim=model.qk_nope_head_dim,
        qk_pos_emb_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        qk_layernorm=True,
        **rotary_fields(model),
        apply_rope_fusion=False,
        # Mixture of experts.
        num_moe_experts=model.num_experts,
        moe_ffn_hidden_size=model.moe_ffn_hidden_size,
        moe_layer_freq=[0] * model.num_dense_layers + [1] * model.num_moe_layers,
        moe_shared_expert_intermediate_size=(
            model.num_shared_experts * model.moe_ffn_hidden_size if model.num_shared_experts else None),
        moe_router_topk=model.moe_router_topk,
        moe_router_num_groups=model.moe_router_num_groups if model.moe_router_num_groups > 1 else None,
        moe_router_group_topk=model.moe_router_group_topk if model.moe_router_num_groups > 1 else None,
        moe_router_topk_scaling_factor=model.moe_router_topk_scaling_factor,
        moe_router_score_function=model.moe_router_score_function,
        # Our router holds its own bias and balance loss (model/router.py), updated by optim/router_bias.py.
        moe_router_enable_expert_bias=False,
        moe_router_load_balancing_type="none",
        moe_aux_loss_coeff=0.0,
        moe_router_dtype="fp32",
        # "node" takes the place of "alltoall" in the layers that are built (model/node_dispatcher.py).
        moe_token_dispatcher_type="flex" if parallel.moe_token_dispatcher_type == "flex" else "alltoall",
        moe_flex_dispatcher_backend=parallel.moe_flex_dispatcher_backend,
        moe_grouped_gemm=True,
        moe_permute_fusion=False,
        # Multi-token prediction.
        mtp_num_layers=model.mtp_num_layers or None,
        # Of the run's start; the trainer weighs the losses by its recipe.
        mtp_loss_scaling_factor=training.mtp_loss_scaling_factor,
        # Block.
        normalization="RMSNorm",
        layernorm_epsilon=model.layernorm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        init_method_std=model.init_method_std,
        # Weights come from model/init.py, the same for every layout.
        perform_initialization=False,
        # Split.
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        pipeline_model_parallel_layout=PipelineParallelLayerLayout(layout, parallel.pipeline_model_parallel_size),
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        expert_tensor_parallel_size=parallel.expert_tensor_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        cp_comm_type=parallel.cp_comm_type,
        # Arithmetic.
        bf16=precision == "bf16",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        # For Transformer Engine, which is told by the environment; local modules have a choice of their own.
        attention_backend=AttnBackend["auto" if transformer_impl == "local" else training.attention_backend],
        gradient_accumulation_fusion=False,
        calculate_per_token_loss=True,
        # A stage sends its whole output and drops the tensor's data once the receiver has it.
        deallocate_pipeline_outputs=True,
        # The interleaved schedule exchanges activations and gradients in one go; batched, between the two ranks
        # of PP2, each would be received as the other.
        overlap_p2p_comm=chunks > 1,
        batch_p2p_comm=chunks == 1,
        variable_seq_lengths=False,
        **_recompute(run, transformer_impl),
    )


def _recompute(run: RunConfig, transformer_impl: str) -> dict[str, Any]:
    """Megatron-Core's own recomputation: of whole layers one by one, and of Transformer Engine's modules."""
    if run.training.recompute_granularity == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    modules = recomputed_modules(run.training)
    if not modules or transformer_impl == "local":
        return {}
    return {"recompute_granularity": "selective", "recompute_modules": list(modules)}
