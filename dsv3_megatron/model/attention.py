"""Multi-head latent attention from local modules: the part that Megatron-Core builds only with TE.

Megatron-Core's MLA cannot be built from its local modules (its dot-product attention takes no separate
key and value widths). This one holds the same weights under the same names. The down-projections and
the norms of the latents are whole on every tensor-parallel rank and work on the rank's part of the
sequence; the up-projections gather the sequence and split the heads.

Where context-parallel ranks share a sequence, S is this rank's part of it, of which tensor-parallel ranks have parts
again, and core attention gets to the tokens of other ranks as `cp_comm_type` says. Positions and document bounds are of
the whole sequence.

Shapes: S sequence (s its local part under sequence parallelism), B micro-batch, H hidden, N local heads,
D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import MLATransformerConfig

from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.linear import LocalColumnParallelLinear, LocalRowParallelLinear, ReplicatedLinear
from dsv3_megatron.model.norm import RMSNorm
from dsv3_megatron.model.packed_documents import PackedDocuments
from dsv3_megatron.model.rotary import RotaryTables, softmax_scale
from dsv3_megatron.model.stage.weight_gradients import weight_grads_at_once
from dsv3_megatron.ops.attention import attention_case, causal_attention
from dsv3_megatron.ops.attention_choices import choose_attention
from dsv3_megatron.ops.backend import log_choice
from dsv3_megatron.ops.fp8.choice import packing_backend
from dsv3_megatron.ops.fused_blocks import choose_block_attention
from dsv3_megatron.ops.recompute import recomputed
from dsv3_megatron.ops.rope import apply_rope
from dsv3_megatron.parallel.head_exchange import heads_for_tokens, tokens_for_heads
from dsv3_megatron.parallel.latent_ring import RingAttention
from dsv3_megatron.parallel.narrow_latents import NarrowLatents
from dsv3_megatron.parallel.sequence_parts import SequenceParts


@dataclass
class LocalMLASubmodules:
    """Types of the attention's parts, for specs that replace one."""

    column_parallel: type = LocalColumnParallelLinear
    row_parallel: type = LocalRowParallelLinear
    replicated: type = ReplicatedLinear
    norm: type = RMSNorm


def set_attention_backend(stages: Iterable[torch.nn.Module], run: RunConfig, precision: str) -> None:
    """Choose what computes core attention for a run on this process's device, log it, and tell local modules.

    Args:
        stages: Modules with `LocalMLASelfAttention` in them.
        run: A validated run.
        precision: "bf16" or "fp32".

    Raises:
        ConfigError: The run's attention_backend is not possible here.
    """
    modules = [module for stage in stages for module in stage.modules() if isinstance(module, LocalMLASelfAttention)]
    device, value_bytes = "cuda" if torch.cuda.is_available() else "cpu", 2 if precision == "bf16" else 4
    if run.parallel.passes_latents:
        choice = choose_block_attention(run.training.attention_backend, device, value_bytes, run.model.qk_head_dim)
        log_choice(f"attention_backend {run.training.attention_backend} to blocks of other ranks", *choice)
        narrow = NarrowLatents(run.model.kv_lora_rank, packing_backend()) if run.parallel.cp_fp8_latents else None
        for module in modules:
            module.block_backend, module.narrow_latents = choice[0], narrow
        return
    case = attention_case(device, value_bytes, run.model.qk_head_dim, run.model.v_head_dim,
                          has_documents=run.data.has_document_attention)
    chosen, reason = choose_attention(run.training.attention_backend, case)
    log_choice(f"attention_backend {run.training.attention_backend}", chosen, reason)
    for module in modules:
        module.attention_backend = chosen


class LocalMLASelfAttention(MegatronModule):
    """Causal multi-head latent attention. Source: DeepSeek-V3 report, section 2.1.1, eq. 1-11.

    Attributes:
        is_recomputed: Core attention need not keep queries, keys and values for backward.
        attention_backend: What computes core attention, one of `ops.attention.BACKENDS`.
        is_steady: Core attention sums as generation does (`ops/steady_sums.py`).
        block_backend: What computes attention to blocks of other ranks, "flash" or "local".
        narrow_latents: Makes latents narrow on their way to other ranks; None: they travel as they are.
    """

    is_recomputed = False
    is_steady = False
    attention_backend = "auto"
    block_backend = "local"
    narrow_latents: NarrowLatents | None = None

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: LocalMLASubmodules | None = None,
        layer_number: int = 1,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
        latent_epsilon: float | None = None,
    ) -> None:
        super().__init__(config=config)
        epsilon = config.layernorm_epsilon if latent_epsilon is None else latent_epsilon
        parts = submodules or LocalMLASubmodules()
        assert pg_collection is not None, "process groups are passed, never global"
        assert attn_mask_type == AttnMaskType.causal, "only causal attention is supported"
        self.layer_number = layer_number
        self.tp_group, self.cp_group = pg_collection.tp, pg_collection.cp
        self.parts, self.cp_comm_type = SequenceParts.of(pg_collection), cp_comm_type or "p2p"
        self.num_local_heads = config.num_attention_heads // self.tp_group.size()
        self.softmax_scale = softmax_scale(config)
        self.rotary = RotaryTables(config)
        heads, query_width = config.num_attention_heads, config.qk_head_dim + config.qk_pos_emb_head_dim

        def column(inputs: int, outputs: int) -> torch.nn.Module:
            return parts.column_parallel(inputs, outputs, config=config, init_method=config.init_method, bias=False,
                                         gather_output=False, skip_bias_add=True, tp_group=self.tp_group)

        if config.q_lora_rank is None:
            self.linear_q_proj = column(config.hidden_size, heads * query_width)
        else:
            self.linear_q_down_proj = parts.replicated(config.hidden_size, config.q_lora_rank, config=config)
            self.q_layernorm = parts.norm(config, config.q_lora_rank, epsilon)
            self.linear_q_up_proj = column(config.q_lora_rank, heads * query_width)
        self.linear_kv_down_proj = parts.replicated(
            config.hidden_size, config.kv_lora_rank + config.qk_pos_emb_head_dim, config=config)
        self.kv_layernorm = parts.norm(config, config.kv_lora_rank, epsilon)
        self.linear_kv_up_proj = column(config.kv_lora_rank, heads * (config.qk_head_dim + config.v_head_dim))
        self.linear_proj = parts.row_parallel(
            heads * config.v_head_dim, config.hidden_size, config=config, init_method=config.init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_group=self.tp_group)

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None,
                packed_seq_params: PackedDocuments | None = None, **_: Any) -> tuple[torch.Tensor, None]:
        """Attend within each sequence, or within each document of it.

        Args:
            hidden_states: normed input [s, B, H].
            attention_mask: Ignored, the mask is causal; Megatron-Core's layer passes one.
            packed_seq_params: Places where attention stops and positions restart, under the name by which
                Megatron-Core's layers pass it on. None: nowhere, as in the report.

        Returns:
            [s, B, H], and no bias.
        """
        documents = packed_seq_params or PackedDocuments()
        assert isinstance(documents, PackedDocuments), "Megatron-Core's own packed format is not supported"
        sources = *self.compress(hidden_states), *self._tables(hidden_states, documents.position_ids_BS)
        if self.parts.size == 1:
            context_SBND = self._attend_to_whole(self._from(self._decompress, *sources), documents)
        elif self.cp_comm_type == "a2a":
            part_of_heads = self._attend_to_whole(self._from(self._decompress_whole, *sources), documents)
            context_SBND = tokens_for_heads(part_of_heads, self.parts, self.cp_group)
        else:
            assert documents.shared is None, "config/policy.py refuses context parallelism"
            ring = RingAttention(self._expand_passed, self.config.v_head_dim, self.softmax_scale, self.parts,
                                 self.cp_group, documents.bounds, gathers=self.cp_comm_type == "all_gather",
                                 backend=self.block_backend, narrow=self.narrow_latents)
            context_SBND = ring(*self._from(self._project_to_pass, *sources))
        output_sBH, _bias = self.linear_proj(context_SBND.flatten(2))
        return output_sBH, None

    def _attend_to_whole(self, queries_keys_values: tuple[torch.Tensor, ...], documents: PackedDocuments
                         ) -> torch.Tensor:
        shared, bounds, first_queries = documents.shared, documents.bounds, None
        if shared is not None:
            queries_keys_values = self._from(shared.apart, *queries_keys_values)
            bounds, first_queries = (shared.bounds,), shared.first_queries
        query_SBND, key_SBND, value_SBND = queries_keys_values
        context_SBND = causal_attention(query_SBND, key_SBND, value_SBND, softmax_scale=self.softmax_scale,
                                        document_bounds=bounds, first_queries=first_queries,
                                        is_steady=self.is_steady, backend=self.attention_backend)
        return context_SBND if shared is None else shared.together(context_SBND)

    def _tables(self, x_sBH: torch.Tensor, position_ids_BS: torch.Tensor | None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines of this rank's part of the sequence."""
        tensor_ranks = self.tp_group.size() if self.config.sequence_parallel else 1
        tables = self.rotary(x_sBH.shape[0] * tensor_ranks * self.parts.size, x_sBH, position_ids_BS)
        return self.parts.take(tables[0], 0), self.parts.take(tables[1], 0)

    def _from(self, function: Callable[..., Any], *sources: torch.Tensor) -> Any:
        """Call a function on what core attention is made of, again in backward where that is not kept."""
        return recomputed(function, *sources) if self.is_recomputed else function(*sources)

    def query_key_value(self, x_sBH: torch.Tensor, position_ids_BS: torch.Tensor | None = None
                        ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries and keys [S, B, N, nope + rope] and values [S, B, N, v] of this rank's heads (eq. 1-9).

        `position_ids_BS` are of the whole sequence, also under sequence parallelism; None is 0 .. S - 1.
        """
        queries_keys_values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = self._from(
            self._decompress, *self.compress(x_sBH), *self._tables(x_sBH, position_ids_BS))
        return queries_keys_values

    def _decompress(self, query_source: torch.Tensor, key_value_source: torch.Tensor, cos_SP: torch.Tensor,
                    sin_SP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        query, latent, shared_key = self._project(query_source, key_value_source, cos_SP, sin_SP)
        return query, *self.expand(latent, shared_key)

    def _decompress_whole(self, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Queries, keys and values of the whole sequence, of a part of this rank's heads."""
        return tuple(heads_for_tokens(tensor, self.parts, self.cp_group) for tensor in self._decompress(*sources))

    def _project_to_pass(self, *sources: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries, and latents [s, B, kv_lora_rank + rope] with the shared key behind: what ranks pass each other."""
        query, latent, shared_key = self._project(*sources)
        return query, torch.cat([latent, shared_key], dim=-1)

    def _expand_passed(self, passed_sBW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of what a rank has passed.

        Weight gradients do not wait here: what they need is of one block, and would be kept of every block.
        """
        widths = [self.config.kv_lora_rank, self.config.qk_pos_emb_head_dim]
        with weight_grads_at_once():
            return self.expand(*passed_sBW.split(widths, dim=-1))

    def project(self, x_sBH: torch.Tensor, cos_SP: torch.Tensor, sin_SP: torch.Tensor
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, and the two things that keys and values are made of: all that has to be kept of a position.

        Args:
            x_sBH: Normed input.
            cos_SP: Cosines of the whole sequence's positions, as `RotaryTables` gives them.
            sin_SP: Sines of the same positions.

        Returns:
            query_SBND: [S, B, N, nope + rope], rotated.
            latent_sBC: Normed key/value latents [s, B, kv_lora_rank].
            shared_key_sBR: The rotated part of the key [s, B, rope], one for all heads.

        Source: DeepSeek-V3 report, eq. 1, 3, 6-9.
        """
        return self._project(*self.compress(x_sBH), cos_SP, sin_SP)

    def compress(self, x_sBH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries are made of, the input or its latent, and the key/value latent with the shared key beside it.

        Neither is normed or rotated. Source: eq. 1, 3, 6.
        """
        source = x_sBH if self.config.q_lora_rank is None else self.linear_q_down_proj(x_sBH)
        return source, self.linear_kv_down_proj(x_sBH)

    def _project(self, query_source: torch.Tensor, key_value_source: torch.Tensor, cos_SP: torch.Tensor,
                 sin_SP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        config, heads = self.config, self.num_local_heads
        rope = config.qk_pos_emb_head_dim
        if config.q_lora_rank is None:
            query, _ = self.linear_q_proj(query_source)
        else:
            query, _ = self.linear_q_up_proj(self.q_layernorm(query_source))
        latent, shared_key = key_value_source.split([config.kv_lora_rank, rope], dim=-1)
        own = slice(None)
        if config.sequence_parallel:
            start = self.tp_group.rank() * len(latent)
            own = slice(start, start + len(latent))
        # The rotary part is the last of a query's width.
        query = apply_rope(query.view(*query.shape[:2], heads, config.qk_head_dim + rope), cos_SP, sin_SP,
                           is_steady=self.is_steady)
        shared_key = apply_rope(shared_key, cos_SP[own], sin_SP[own], is_steady=self.is_steady)
        return query, self.kv_layernorm(latent), shared_key

    def expand(self, latent_sBC: torch.Tensor, shared_key_sBR: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys [S, B, N, nope + rope] and values [S, B, N, v] out of what `project` returns (eq. 2, 4, 5)."""
        config, heads = self.config, self.num_local_heads
        nope, width = config.qk_head_dim, config.v_head_dim
        key_value, _ = self.linear_kv_up_proj(latent_sBC)
        if config.sequence_parallel:
            shared_key_sBR = gather_from_sequence_parallel_region(shared_key_sBR, group=self.tp_group)
        key_nope, value = key_value.view(*key_value.shape[:2], heads, nope + width).split([nope, width], dim=-1)
        return torch.cat([key_nope, shared_key_sBR.unsqueeze(2).expand(-1, -1, heads, -1)], dim=-1), value
