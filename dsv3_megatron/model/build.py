"""From a run's configuration to this rank's modules, wrapped for data parallelism."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.run import RunConfig, require_engine_epsilon
from dsv3_megatron.model.init import initialize_weights
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.model.mcore_config import mcore_config
from dsv3_megatron.model.recompute import set_recomputed
from dsv3_megatron.model.router import RouterOptions
from dsv3_megatron.model.specs import block_specs, resolve_transformer_impl
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts


def build_stages(
    run: RunConfig, groups: ProcessGroupCollection, *, precision: str
) -> tuple[list[DeepSeekV3Model], MLATransformerConfig]:
    """This rank's stages, on its device, with initial weights, not wrapped.

    Args:
        run: A validated run.
        groups: Its process groups.
        precision: "bf16" or "fp32".

    Returns:
        One module a chunk, in pipeline order, and the configuration they share.
    """
    transformer_impl = resolve_transformer_impl(run.training.transformer_impl,
                                                has_documents=run.data.has_document_attention)
    config = mcore_config(run, precision, transformer_impl=transformer_impl)
    rank, ranks = groups.pp.rank(), groups.pp.size()
    mine = [layout for layout in stage_layouts(run.model, run.parallel) if layout.stage % ranks == rank]
    if transformer_impl == "transformer_engine":
        require_engine_epsilon(run.model)
    stages = [_build_stage(run, config, groups, layout, chunk, transformer_impl) for chunk, layout in enumerate(mine)]
    if transformer_impl == "local":
        set_recomputed(stages, recomputed_modules(run.training))
    if torch.get_default_device().type != "meta":
        initialize_weights(list(stages), groups, std=run.model.init_method_std, seed=run.training.seed)
    return stages, config


def _build_stage(run: RunConfig, config: MLATransformerConfig, groups: ProcessGroupCollection, layout: StageLayout,
                 chunk: int, transformer_impl: str) -> DeepSeekV3Model:
    decoder, mtp = block_specs(config, layout, transformer_impl=transformer_impl,
                               router=RouterOptions.of(run), latent_epsilon=run.model.latent_epsilon)
    stage = DeepSeekV3Model(
        config=config, transformer_layer_spec=decoder, vocab_size=run.model.vocab_size,
        max_sequence_length=run.training.seq_length, pre_process=layout.has_embedding, post_process=layout.has_loss,
        share_embeddings_and_output_weights=False, position_embedding_type="rope", mtp_block_spec=mtp,
        pg_collection=groups, vp_stage=chunk if run.parallel.num_virtual_stages_per_pipeline_rank > 1 else None)
    for path, module in stage.named_modules():
        if path.endswith(("experts.linear_fc1", "experts.linear_fc2")) and hasattr(module, "num_gemms"):
            for parameter in module.parameters():
                parameter.num_local_experts = module.num_gemms
    return stage


def wrap_stages(
    stages: list[DeepSeekV3Model], config: MLATransformerConfig, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Stages with fp32 main gradients in flat buffers, reduce-scattered for the distributed optimizer."""
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False,
        average_in_collective=False)
    wrapped: list[DistributedDataParallel] = []
    for index, stage in enumerate(stages):
        module: torch.nn.Module = Float16Module(config, stage) if config.bf16 else stage
        wrapped.append(DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=module, disable_bucketing=index > 0, pg_collection=groups))
    for chunk in wrapped:
        chunk.broadcast_params()
    return wrapped
