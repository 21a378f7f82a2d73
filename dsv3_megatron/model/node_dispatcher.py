"""Token dispatcher that sends a token over the network once for each node that has one of its experts.

A layer in one piece calls it as it does Megatron-Core's dispatchers. A stage in pieces (`stage/segments.py`) lets
`outward` and `homeward` travel on its tape, and calls what lies before, between and behind.

Shapes: T tokens, R rows that came to this rank, each token once, r rows of the experts here, E experts,
K top-k, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoETokenDispatcher

from dsv3_megatron.config.expert_dispatch import LEGS_ON_GPU
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.routes import chosen_experts, slots_of_experts
from dsv3_megatron.ops.row_sums import copy_rows, sum_rows
from dsv3_megatron.parallel.expert_nodes import ExpertNodes
from dsv3_megatron.parallel.node_journey import Homeward, Outward, travel
from dsv3_megatron.parallel.route import Route


class NodeDispatcher(MoETokenDispatcher):
    """Dispatcher of a layer whose experts are on several ranks.

    Args:
        layer: The layer.
        groups: The run's process groups.
        nodes: Nodes that the layer's experts are on.

    Attributes:
        backend: Implementation that packs rows in FP8; None: they travel in the run's precision.
        num_legs: Parts in which tokens go out and home where they go over two groups; None: by the device.
    """

    num_legs: int | None = None
    backend: ReferenceBackend | None = None
    _outward: Outward | None = None
    _row_of_copy: torch.Tensor | None = None

    def __init__(self, layer: MoELayer, groups: ProcessGroupCollection, nodes: ExpertNodes) -> None:
        super().__init__(config=layer.config, pg_collection=groups)
        self.nodes = nodes
        self.num_local_experts = layer.num_local_experts
        self.first_expert = layer.local_expert_indices[0]

    def dispatch_preprocess(self, tokens: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
                            ) -> tuple[torch.Tensor, torch.Tensor]:
        """Note where tokens [s, B, H] go; give them, and the gates [T, K] of their experts."""
        assert self.shared_experts is None, "shared experts are computed beside the dispatcher"
        self.hidden_shape = tokens.shape
        ids_TK = chosen_experts(routing_map, self.config.moe_router_topk)
        route = Route(routing_map, self.nodes, self.tp_ep_group,
                      self.num_legs or (LEGS_ON_GPU if tokens.is_cuda else 1))
        self._outward = Outward(route, ids_TK, self.backend)
        return tokens, probs.gather(1, ids_TK)

    def outward(self) -> Outward:
        """Carrier of the tokens of the last `dispatch_preprocess`."""
        assert self._outward is not None, "dispatch_preprocess comes first"
        return self._outward

    def homeward(self) -> Homeward:
        """Carrier of their experts' outputs."""
        return Homeward(self.outward().route, self.backend)

    def token_dispatch(self, hidden_states: torch.Tensor, probs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens and gates [T, K] to the ranks of their experts: rows [R, H] and gates [R, K]."""
        rows_RH, gates_RK = travel(self.outward(), hidden_states, probs)
        return rows_RH, gates_RK

    def dispatch_postprocess(self, hidden_states: torch.Tensor, probs: torch.Tensor
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [r, H] sorted by expert, rows of each expert, and a gate for each row."""
        outward = self.outward()
        ids_RK, route = outward.arrived_ids, outward.route
        assert ids_RK is not None, "rows have come"
        if self.tp_size > 1:
            sizes = list(route.rows_of_splits)
            hidden_states, probs, ids_RK = (gather_from_sequence_parallel_region(
                rows, group=self.tp_group, output_split_sizes=sizes) for rows in (hidden_states, probs, ids_RK.int()))
        slots_r = slots_of_experts(ids_RK, self.first_expert, self.num_local_experts, sum(route.rows_of_experts))
        outward.arrived_ids = None
        self._row_of_copy = slots_r.div(ids_RK.shape[1], rounding_mode="floor")
        self._num_gathered = len(ids_RK)
        return (copy_rows(hidden_states, self._row_of_copy), torch.tensor(route.rows_of_experts),
                probs.flatten().index_select(0, slots_r))

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Sums [R, H] of the outputs [r, H] of each row's experts here."""
        assert self._row_of_copy is not None, "dispatch_postprocess comes first"
        dtype = hidden_states.dtype
        row_of_copy, self._row_of_copy = self._row_of_copy, None
        if self.tp_size == 1:
            return sum_rows(hidden_states, row_of_copy, self._num_gathered)
        # Each expert-tensor rank has a part of every output.
        parts = sum_rows(hidden_states, row_of_copy, self._num_gathered, wide_dtype(dtype))
        return reduce_scatter_to_sequence_parallel_region(
            parts, group=self.tp_group, input_split_sizes=list(self.outward().route.rows_of_splits)).to(dtype)

    def token_combine(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Sums [R, H] to the ranks of their tokens, added up on the way: [T, H]."""
        (output_TH,) = travel(self.homeward(), hidden_states)
        return output_TH

    def combine_postprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The tokens' outputs in their shape; nothing of the micro-batch is left here."""
        self._outward = None
        return hidden_states.view(self.hidden_shape)


def use_node_dispatch(stage: torch.nn.Module, groups: ProcessGroupCollection, nodes: ExpertNodes) -> None:
    """Give every MoE layer of a stage the dispatcher that sends a token once for each node."""
    for module in stage.modules():
        if isinstance(module, MoELayer):
            module.token_dispatcher = NodeDispatcher(module, groups, nodes)
