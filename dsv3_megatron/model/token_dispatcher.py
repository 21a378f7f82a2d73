"""Megatron-Core's MoE layer and token dispatcher, with less in memory and on the wire.

A dispatcher notes a micro-batch's gates on itself, and with them would hold the graph that they came from, inputs of
recomputed layers and their gradients included, until the next micro-batch: `FrugalMoELayer` takes the notes away.

In FP8 tokens are narrow on their way to the experts:

    forward    dispatch FP8, combine as it is
    backward   combine's gradients FP8 (they are dispatched), dispatch's as they are

Gates travel as they are. A token is quantized once and its record copied for each of its experts; gradients are
quantized row by row. Source: DeepSeek-V3 report, section 3.3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import all_to_all
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from dsv3_megatron.ops.fp8.reference_backend import REFERENCE, ReferenceBackend
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.narrow_rows import Narrow, exchange_rows, permuted_records


class FrugalMoELayer(MoELayer):
    """Megatron-Core's, of which nothing of a micro-batch is left when its forward pass is done."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what Megatron-Core's layer does, and let go of what its dispatcher would keep to no use."""
        output = super().forward(hidden_states, *args, **kwargs)
        dispatcher = self.token_dispatcher
        dispatcher.probs = dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None
        return output


class NarrowDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher whose rows are quantized before they are sent.

    Attributes:
        backend: Implementation that quantizes rows.
    """

    tokens_per_expert: torch.Tensor
    backend: ReferenceBackend = REFERENCE
    _records: torch.Tensor | None = None

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
                            ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [R, H] for the ranks of their experts, which stand for records noted here, and gates [R]."""
        # Megatron-Core's own, on one channel: splits, the order of rows, gates.
        _, gates_R = super().dispatch_preprocess(hidden_states[..., :1].detach(), routing_map, probs)
        self.hidden_shape = hidden_states.shape
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = x_TH.shape
        rows_RH, self._records = permuted_records(x_TH, self.reversed_local_input_permutation_mapping, self.backend)
        return rows_RH, gates_R

    def token_dispatch(self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [R, H] and gates [R] to the ranks of their experts."""
        assert self.shared_experts is None, "shared experts are computed beside the dispatcher"
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        rows = exchange_rows(permutated_local_input_tokens, self._splits(), self.outward())
        return rows, all_to_all(self.ep_group, permuted_probs, self.output_splits, self.input_splits)

    def token_combine(self, hidden_states: torch.Tensor, async_finish: bool = True,
                      allocate_on_comm_stream: bool = True) -> torch.Tensor:
        """Rows [R, H] back to the ranks of their tokens."""
        splits = self._splits()
        return exchange_rows(hidden_states, None if splits is None else splits.reversed(), self.homeward())

    def outward(self) -> Narrow:
        """How the rows of the last `dispatch_preprocess` travel; once."""
        records, self._records = self._records, None
        assert records is not None, "dispatch_preprocess comes first"
        return Narrow("forward", self.backend, records)

    def homeward(self) -> Narrow:
        """How the experts' outputs travel."""
        return Narrow("backward", self.backend)

    def _splits(self) -> Splits | None:
        if self.ep_group.size() == 1:
            return None
        return Splits.of(self.input_splits, self.output_splits, self.ep_group)


def use_narrow_dispatch(layer: MoELayer, groups: ProcessGroupCollection, backend: ReferenceBackend) -> None:
    """Give a MoE layer the dispatcher that sends tokens in FP8."""
    dispatcher = NarrowDispatcher(layer.num_local_experts, layer.local_expert_indices, config=layer.config,
                                  pg_collection=groups)
    dispatcher.backend = backend
    layer.token_dispatcher = dispatcher
