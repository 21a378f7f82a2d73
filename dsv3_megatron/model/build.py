"""Builds this rank's modules from a run's configuration, and wraps them for data parallelism."""

from __future__ import annotations

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.memory import recomputed_modules
from dsv3_megatron.config.run import RunConfig, require_engine_epsilon
from dsv3_megatron.model.attention import set_attention_backend
from dsv3_megatron.model.fp8_modules import apply_precision, use_engine_fp8
from dsv3_megatron.model.init import initialize_weights
from dsv3_megatron.model.language_model import DeepSeekV3Model
from dsv3_megatron.model.mcore_config import mcore_config
from dsv3_megatron.model.node_dispatcher import use_node_dispatch
from dsv3_megatron.model.recomputed_modules import set_recomputed
from dsv3_megatron.model.router import RouterOptions
from dsv3_megatron.model.specs import block_specs, resolve_transformer_impl
from dsv3_megatron.model.stage.buckets import add_buckets, bucket_layout, watch_whole_passes
from dsv3_megatron.model.stage.weight_gradients import delay_engine_weight_gradients
from dsv3_megatron.model.steady_modules import set_steady
from dsv3_megatron.parallel.expert_nodes import expert_nodes
from dsv3_megatron.parallel.groups import as_pipeline_rank, at_pipeline_rank
from dsv3_megatron.parallel.layout import StageLayout, stage_layouts
from dsv3_megatron.parallel.placement import placement
from dsv3_megatron.process.ranks import Processes


def build_stages(
    run: RunConfig, groups: ProcessGroupCollection, *, precision: str, delays_engine_weights: bool = False
) -> tuple[list[DeepSeekV3Model], MLATransformerConfig]:
    """This rank's stages, on its device, with initial weights, not wrapped.

    Args:
        run: A validated run.
        groups: Process groups of the run.
        precision: "bf16" or "fp32".
        delays_engine_weights: A `ModelChunk` will run these stages and may split their backward passes. Local modules
            need not know; see `delay_engine_weight_gradients`.

    Returns:
        One module a chunk, in the schedule's order, and the configuration they share.
    """
    layouts = stage_layouts(run.model, run.parallel)
    mine = [layouts[place.stage] for place in placement(run.parallel)[groups.pp.rank()]]
    transformer_impl = resolve_transformer_impl(run.training.transformer_impl,
                                                has_documents=run.data.has_document_attention,
                                                splits_sequences=run.parallel.context_parallel_size > 1)
    config = mcore_config(run, precision, transformer_impl=transformer_impl)
    if transformer_impl == "transformer_engine":
        require_engine_epsilon(run.model)
        if run.fp8.is_enabled:
            use_engine_fp8(config)
        if delays_engine_weights:
            delay_engine_weight_gradients(config)
    stages = [_build_stage(run, config, groups, layout, transformer_impl) for layout in mine]
    _share_embedding(stages)
    ranks_per_node = run.parallel.ranks_per_node or Processes.from_environment().local_size
    if run.parallel.token_dispatcher(ranks_per_node) == "node" and groups.ep.size() > 1:
        nodes = expert_nodes(run.parallel, groups, ranks_per_node)
        for stage in stages:
            use_node_dispatch(stage, groups, nodes)
    if run.fp8.is_enabled:
        apply_precision(list(stages), run, groups, transformer_impl=transformer_impl)
    if transformer_impl == "local":
        set_attention_backend(stages, run, precision)
        set_recomputed(stages, recomputed_modules(run.training))
        set_steady(stages, run.policy.has_generations_bits)
    if torch.get_default_device().type != "meta":
        initialize_weights(list(stages), groups, std=run.model.init_method_std, seed=run.training.seed)
    return stages, config


def _share_embedding(stages: list[DeepSeekV3Model]) -> None:
    """Let the last stage and that with the MTP modules use the embedding of the first one, if it is on their rank.

    It is one parameter with one gradient, which the first stage owns and saves. Under DualPipe the two stages are of
    different copies of the model, which are equal. Source: DeepSeek-V3 report, section 3.2.3.
    """
    first = next((stage for stage in stages if stage.pre_process), None)
    for stage in stages:
        if first is not None and stage is not first and (stage.mtp_process or stage.post_process):
            stage.use_embedding_of(first)


def _build_stage(run: RunConfig, config: MLATransformerConfig, groups: ProcessGroupCollection, layout: StageLayout,
                 transformer_impl: str) -> DeepSeekV3Model:
    chunk, rank = divmod(layout.stage, groups.pp.size())  # by Megatron-Core's numbering
    decoder, mtp = block_specs(config, layout, transformer_impl=transformer_impl,
                               router=RouterOptions.of(run), latent_epsilon=run.model.latent_epsilon)
    with as_pipeline_rank(rank):
        stage = DeepSeekV3Model(
            config=config, transformer_layer_spec=decoder, vocab_size=run.model.vocab_size,
            max_sequence_length=run.training.seq_length, pre_process=layout.has_embedding,
            post_process=layout.has_loss, share_embeddings_and_output_weights=False, position_embedding_type="rope",
            mtp_block_spec=mtp, pg_collection=at_pipeline_rank(groups, rank),
            vp_stage=chunk if run.parallel.stages_per_rank > 1 else None)
    for path, module in stage.named_modules():
        if path.endswith(("experts.linear_fc1", "experts.linear_fc2")) and hasattr(module, "num_gemms"):
            for parameter in module.parameters():
                parameter.num_local_experts = module.num_gemms
    return stage


def wrap_stages(
    stages: list[DeepSeekV3Model], config: MLATransformerConfig, groups: ProcessGroupCollection, *,
    reduces_early: bool = False, gathers_late: bool = False
) -> list[DistributedDataParallel]:
    """Stages with fp32 main gradients in flat buffers, reduce-scattered for the distributed optimizer.

    Buffers are cut in the same buckets whatever overlaps, so gradients, their norm and updates have the same bits.

    Args:
        stages: This rank's stages.
        config: Configuration of the stages.
        groups: The run's process groups.
        reduces_early: Gradients are reduced as soon as they are complete (`StageBuckets.begin_step`), where there are
            several ranks to do so.
        gathers_late: Updated weights are gathered under the next passes, or when `finish_gathering` is called; the
            optimizer must then not do it (`build_optimizer`).
    """
    num_ranks, num_expert_ranks = groups.dp_cp.size(), groups.expt_dp.size()
    has_replicas = num_ranks > 1 or num_expert_ranks > 1
    reduces_early, gathers_late = reduces_early and has_replicas, gathers_late and has_replicas
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=True, overlap_grad_reduce=False,
        average_in_collective=False)
    wrapped: list[DistributedDataParallel] = []
    for stage in stages:
        module: torch.nn.Module = Float16Module(config, stage) if config.bf16 else stage
        wrapped.append(DistributedDataParallel(
            config=config, ddp_config=ddp_config, module=module, pg_collection=groups,
            disable_bucketing=not (reduces_early or gathers_late),  # then all buckets are one message
            full_param_layout=bucket_layout(stage, ddp_config, num_ranks, num_expert_ranks)))
        add_buckets(stage, wrapped[-1], reduces_early=reduces_early, gathers_late=gathers_late)
    for stage, chunk in zip(stages, wrapped, strict=True):
        chunk.broadcast_params()
        if stage.mtp_process and stage.embedding_buckets is not stage.buckets:
            assert stage.embedding_buckets is not None
            stage.embedding_buckets.num_borrowers += 1
        if groups.pp.size() == 1:
            watch_whole_passes(stage)
    return wrapped
