"""The tree of modules that a model is built from, with local or Transformer Engine parts.

Both trees hold the same weights and save them under the same checkpoint keys, so that a checkpoint
written with one loads with the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_submodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlock,
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayerSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.model.attention import LocalMLASelfAttention, LocalMLASubmodules
from dsv3_megatron.model.experts import GroupedExperts, LocalMLP, LocalSharedExperts
from dsv3_megatron.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear
from dsv3_megatron.model.mtp import DocumentMTPLayer
from dsv3_megatron.model.norm import RMSNorm
from dsv3_megatron.model.router import DeepSeekRouter, RouterOptions
from dsv3_megatron.model.token_dispatcher import FrugalMoELayer
from dsv3_megatron.parallel.layout import StageLayout

logger = logging.getLogger(__name__)


def resolve_transformer_impl(requested: str, *, has_documents: bool = False, splits_sequences: bool = False) -> str:
    """Turn "auto" into "transformer_engine" where it is installed and CUDA is there, else "local"; log it.

    Args:
        requested: "auto", "local" or "transformer_engine".
        has_documents: Attention or positions stop at the ends of documents, which local modules alone do.
        splits_sequences: Ranks have parts of sequences, of which local modules alone attend to the others.

    Raises:
        ValueError: "transformer_engine" was asked for where it cannot run.
    """
    missing = [what for what, there in (("transformer_engine package", is_installed("transformer_engine")),
                                        ("CUDA device", torch.cuda.is_available())) if not there]
    if requested == "transformer_engine" and missing:
        raise ValueError(f"transformer_impl=transformer_engine needs what is not here: {' and '.join(missing)}; "
                         "use transformer_impl=local, or auto to choose by what is there")
    if requested != "auto":
        return requested
    needs = [what for what, is_so in (("isolates documents", has_documents), ("splits sequences", splits_sequences))
             if is_so]
    chosen = "local" if missing or needs else "transformer_engine"
    reason = f" (no {' and no '.join(missing)})" if missing else f" (it {' and '.join(needs)})" if needs else ""
    logger.info("transformer_impl auto: %s%s", chosen, reason)
    return chosen


def residual_add(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
    """Megatron-Core's place for bias, dropout and residual; this model has neither bias nor dropout."""

    def add(output_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout_probability: float
            ) -> torch.Tensor:
        output, bias = output_with_bias
        assert bias is None and dropout_probability == 0.0
        return residual + output

    return add


def layer_spec(config: MLATransformerConfig, *, is_moe: bool, transformer_impl: str,
               router: RouterOptions, latent_epsilon: float) -> ModuleSpec:
    """One transformer layer: MLA, then experts or a dense FFN."""
    if transformer_impl == "transformer_engine":
        return _transformer_engine_layer(config, is_moe, router)
    ffn = MLPSubmodules(linear_fc1=LocalColumnParallelLinear, linear_fc2=LocalRowParallelLinear)
    if is_moe:
        mlp = _moe(GroupedExperts, partial(_shared_experts, submodules=ffn), router)
    else:
        mlp = partial(LocalMLP.as_mlp_submodule, submodules=ffn)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=LocalMLASelfAttention, submodules=LocalMLASubmodules(),
                params={"attn_mask_type": AttnMaskType.causal, "latent_epsilon": latent_epsilon}),
            self_attn_bda=residual_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=residual_add,
        ),
    )


def block_specs(
    config: MLATransformerConfig, layout: StageLayout, *, transformer_impl: str, router: RouterOptions,
    latent_epsilon: float
) -> tuple[TransformerBlockSubmodules, ModuleSpec | None]:
    """Specs of one stage's transformer layers, and of its MTP modules if it has any."""
    def layer(is_moe: bool) -> ModuleSpec:
        return layer_spec(config, is_moe=is_moe, transformer_impl=transformer_impl, router=router,
                          latent_epsilon=latent_epsilon)

    norm = _transformer_engine_norm() if transformer_impl == "transformer_engine" else RMSNorm
    decoder = TransformerBlockSubmodules(
        layer_specs=[layer(bool(config.moe_layer_freq[index])) for index in layout.layer_ids], layer_norm=norm)
    if not layout.mtp_layer_ids:
        return decoder, None
    # An MTP module's block is like the main model's last layer.
    module = ModuleSpec(
        module=DocumentMTPLayer,
        submodules=MultiTokenPredictionLayerSubmodules(
            enorm=norm, hnorm=norm, layer_norm=norm, eh_proj=_eh_proj(transformer_impl),
            mtp_model_layer=layer(bool(config.moe_layer_freq[-1]))),
    )
    return decoder, ModuleSpec(module=MultiTokenPredictionBlock, submodules=MultiTokenPredictionBlockSubmodules(
        layer_specs=[module for _ in layout.mtp_layer_ids]))


def _shared_experts(*, config: Any, pg_collection: Any, gate: bool, submodules: MLPSubmodules, name: str | None = None
                    ) -> LocalSharedExperts:
    return LocalSharedExperts(config=config, submodules=submodules, gate=gate, pg_collection=pg_collection, name=name)


def _moe(experts: Any, shared_experts: Any, router: RouterOptions) -> partial[FrugalMoELayer]:
    return partial(FrugalMoELayer, submodules=MoESubmodules(
        experts=experts, shared_experts=shared_experts, router=partial(DeepSeekRouter, options=router)))


class TransformerEngineMLASelfAttention(MLASelfAttention):
    """Megatron-Core's latent attention whose full-rank queries, of models without a query latent, have no norm.

    Megatron-Core takes `qk_layernorm` to mean a norm inside `linear_q_proj` too, on the layer's whole input; DeepSeek's
    models norm the latents alone (eq. 1-6), and their checkpoints have no such weight.
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {**super()._resolve_qk_norm_config(submodules), "linear_q_proj": submodules.linear_q_proj}


def _transformer_engine_layer(config: MLATransformerConfig, is_moe: bool, router: RouterOptions) -> ModuleSpec:
    """Megatron-Core's Transformer Engine layer with this library's router and checkpoint keys.

    Where the local tree has a norm and a linear, this one has a fused module; the rest has equal names. Below
    `decoder.layers.N.` (and `mtp.layers.D.mtp_model_layer.`, saved as `mtp.layers.D.transformer_layer.`):

        checkpoint key, both trees                   parameter here where it differs from the key
        input_layernorm.weight
        self_attention.linear_q_down_proj.weight
        self_attention.q_layernorm.weight            self_attention.linear_q_up_proj.layer_norm_weight
        self_attention.linear_q_up_proj.weight
        self_attention.linear_q_proj.weight          (without a query latent, instead of the three above)
        self_attention.linear_kv_down_proj.weight
        self_attention.kv_layernorm.weight           self_attention.linear_kv_up_proj.layer_norm_weight
        self_attention.linear_kv_up_proj.weight
        self_attention.linear_proj.weight
        pre_mlp_layernorm.weight                     mlp.linear_fc1.layer_norm_weight (dense layers)
        mlp.linear_fc1.weight, .linear_fc2.weight    (dense layers)
        mlp.router.weight, .expert_bias
        mlp.experts.experts.linear_fc1.weight        mlp.experts.linear_fc1.weightE, one [2F, H] an expert; locally
        mlp.experts.experts.linear_fc2.weight        mlp.experts.linear_fc1.weight, stacked: [E, 2F, H], as saved
        mlp.shared_experts.linear_fc1.weight, .linear_fc2.weight

    Each of these modules has an `_extra_state` besides: what FP8 with delayed scaling would carry from step to step,
    empty here.
    """
    if not HAVE_TE:
        raise ValueError("transformer_impl=transformer_engine: the package is installed, but Megatron-Core could not "
                         "import it (python -c 'import transformer_engine.pytorch' says why); use "
                         "transformer_impl=local")
    submodules = get_gpt_layer_with_transformer_engine_submodules(
        num_experts=config.num_moe_experts if is_moe else None, moe_grouped_gemm=True, qk_layernorm=True,
        multi_latent_attention=True)
    submodules.self_attention.module = TransformerEngineMLASelfAttention
    # Megatron-Core's own would run a dropout of probability 0.
    submodules.self_attn_bda = submodules.mlp_bda = residual_add
    keys = {
        "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
        "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
    }
    if is_moe:
        moe = submodules.mlp.keywords["submodules"]
        submodules.mlp = _moe(moe.experts, moe.shared_experts, router)
    else:
        keys["mlp.linear_fc1.layer_norm_"] = "pre_mlp_layernorm."
    submodules.sharded_state_dict_keys_map = {**submodules.sharded_state_dict_keys_map, **keys}
    return ModuleSpec(module=TransformerLayer, submodules=submodules)


def _transformer_engine_norm() -> Any:
    from megatron.core.extensions.transformer_engine import TENorm

    return TENorm


def _eh_proj(transformer_impl: str) -> type:
    if transformer_impl == "transformer_engine":
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear

        return TEColumnParallelLinear
    return LocalColumnParallelLinear
