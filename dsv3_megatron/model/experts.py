"""Routed and shared experts, and the dense layers' FFN, from local modules.

The routed experts of a rank are two stacked weights instead of a module per expert: one grouped product
each, fast to build, and split over expert-tensor ranks without a special case. Checkpoints hold them
under Megatron-Core's keys and global shapes, [E, 2F, H] with the gate's rows first and [E, H, F], so
that they load into its other expert modules and into any split.

Shapes: R routed rows, e local experts, F expert hidden (f its part on this expert-tensor rank), H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.model.linear import Fp8Lines
from dsv3_megatron.model.stage.weight_gradients import weight_grad_deferral
from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.fp8.experts import fp8_swiglu_experts
from dsv3_megatron.ops.fp8.kept_swiglu import fp8_swiglu
from dsv3_megatron.ops.recompute import recomputed
from dsv3_megatron.ops.steady_sums import LEAST_ROWS
from dsv3_megatron.ops.swiglu import swiglu


class ExpertWeight(torch.nn.Module):
    """One stacked weight of the local experts, [e, rows, columns], split over expert-tensor ranks along `dim`."""

    def __init__(self, shape: tuple[int, int, int], dim: int, config: TransformerConfig, is_expert_parallel: bool
                 ) -> None:
        super().__init__()
        # The CPU in a run without CUDA (platform/cpu.py), and meta inside platform.meta_device().
        self.weight = torch.nn.Parameter(
            torch.empty(shape, dtype=config.params_dtype, device=torch.cuda.current_device()))
        # Megatron-Core reduces gradients with allreduce=False over the expert-data-parallel group.
        setattr(self.weight, "allreduce", not is_expert_parallel)
        # Without this mark only the first expert-tensor rank's part counts in the gradient norm.
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=dim, stride=1)


class GroupedExperts(MegatronModule):
    """SwiGLU experts of this rank, applied to tokens sorted by expert.

    Source: DeepSeek-V3 report, eq. 12; the gate multiplies the activation, as in Megatron-Core.

    Attributes:
        is_recomputed: The second product need not keep the activation's output for backward.
        is_steady: An expert of few rows multiplies them among more, as generation does (`ops/steady_sums.py`).
    """

    fp8: Fp8Lines | None = None
    is_recomputed = False
    is_steady = False

    def __init__(self, num_local_experts: int, config: TransformerConfig,
                 pg_collection: ProcessGroupCollection | None = None, name: str | None = None) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "process groups are passed, never global"
        self.num_local_experts = num_local_experts
        self.ep_group, self.tp_group = pg_collection.ep, pg_collection.expt_tp
        self.dp_group = pg_collection.expt_dp
        width = config.moe_ffn_hidden_size // self.tp_group.size()
        separate_reduction = (config.expert_model_parallel_size > 1
                              or config.expert_tensor_parallel_size != config.tensor_model_parallel_size)
        self.linear_fc1 = ExpertWeight((num_local_experts, 2 * width, config.hidden_size), 1, config,
                                       separate_reduction)
        self.linear_fc2 = ExpertWeight((num_local_experts, config.hidden_size, width), 2, config,
                                       separate_reduction)

    def forward(self, x_RH: torch.Tensor, tokens_per_expert: torch.Tensor, gates_R: torch.Tensor
                ) -> tuple[torch.Tensor, None]:
        """Apply to each row its expert.

        Args:
            x_RH: rows sorted by local expert.
            tokens_per_expert: rows of each local expert, sums to R.
            gates_R: gate of each row.

        Returns:
            [R, H] gated outputs, partial sums under expert-tensor parallelism; and no bias.
        """
        counts = tokens_per_expert.tolist()
        if self.fp8 is not None:
            (first, second), backend = self.fp8
            return fp8_swiglu_experts(
                x_RH, counts, self.linear_fc1.weight, self.linear_fc2.weight, gates_R, (first, second),
                backend=backend, accumulate_into_main_grad=True, defer_weight_grad=weight_grad_deferral()), None
        return swiglu_experts(x_RH, counts, self.linear_fc1.weight, self.linear_fc2.weight, gates_R,
                              accumulate_into_main_grad=True,
                              is_activation_recomputed=self.is_recomputed,
                              least_rows=LEAST_ROWS if self.is_steady else 1,
                              defer_weight_grad=weight_grad_deferral()), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
                           ) -> dict[str, Any]:
        """Both weights under the keys of Megatron-Core's expert modules."""
        offsets = tuple(sharded_offsets)
        replica_id = (0, 0, self.dp_group.rank())
        experts = (len(offsets), self.ep_group.rank(), self.ep_group.size())
        parts, part = self.tp_group.size(), self.tp_group.rank()
        # Ranks broadcast what they have loaded, which needs memory in one piece. What is saved is copied anyway.
        is_loading = (metadata or {}).get("is_loading", True)

        def gate_and_up(key: str, weight: torch.Tensor, replica: Any, flattened_range: Any = None) -> list[Any]:
            assert flattened_range is None, "flattened shards are not supported"
            gate, up = weight.chunk(2, dim=1)
            return [ShardedTensor.from_rank_offsets(
                        key, half.contiguous() if is_loading else half, *offsets, experts,
                        (len(offsets) + 1, index, 2 * parts), replica_id=replica, prepend_axis_num=len(offsets))
                    for half, index in ((gate, part), (up, parts + part))]

        def joined(halves: list[torch.Tensor]) -> torch.Tensor:
            return torch.cat(halves, dim=1)

        key = f"{prefix}experts.linear_fc1.weight"
        return {
            f"{prefix}linear_fc1.weight": ShardedTensorFactory(
                key, self.linear_fc1.weight, gate_and_up, joined, replica_id),
            f"{prefix}linear_fc2.weight": ShardedTensor.from_rank_offsets(
                f"{prefix}experts.linear_fc2.weight", self.linear_fc2.weight, *offsets, experts,
                (len(offsets) + 2, part, parts), replica_id=replica_id, prepend_axis_num=len(offsets)),
        }


class _SwiGLUForward:
    """Forward of a gated FFN with this library's activation."""

    linear_fc1: Any
    linear_fc2: Any
    is_recomputed = False

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """[s, B, H] -> [s, B, H], and no bias. Source: eq. 12, FFN_i."""
        gate_up, _ = self.linear_fc1(hidden_states)
        return self.linear_fc2(self._activation(gate_up))

    def _activation(self, gate_up: torch.Tensor) -> torch.Tensor:
        lines: Fp8Lines | None = getattr(self.linear_fc2, "fp8", None)
        if lines is not None:
            (precision,), backend = lines
            return fp8_swiglu(gate_up, precision, backend=backend)
        return recomputed(swiglu, gate_up) if self.is_recomputed else swiglu(gate_up)


class LocalMLP(_SwiGLUForward, MLP):
    """FFN of a dense layer."""


class LocalSharedExperts(_SwiGLUForward, SharedExpertMLP):
    """The shared experts of a layer as one FFN of their joint width."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[s, B, H] -> [s, B, H]."""
        output, _ = super().forward(hidden_states)
        return output
