"""Megatron-Core's MoE layer and token dispatcher, with less in memory and on the wire.

A dispatcher notes a micro-batch's gates on itself, and with them would hold the graph that they came from, inputs of
recomputed layers and their gradients included, until the next micro-batch: `FrugalMoELayer` takes the notes away.

Where a CPU's rank has all experts nothing travels: rows are copied into the experts' order once, and their outputs
added up from it. Between ranks a gate travels behind its row (`parallel/gated_rows.py`): a layer sends rows four times,
forward to their experts and back, backward likewise, and nothing else. In FP8 tokens are narrow on their way to the
experts:

    forward    dispatch FP8, combine as it is
    backward   combine's gradients FP8 (they are dispatched), dispatch's as they are

Gates travel as they are. A token is quantized once and its record copied for each of its experts; gradients are
quantized row by row. Source: DeepSeek-V3 report, section 3.3.3.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend
from dsv3_megatron.ops.row_sums import copy_rows
from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.gated_rows import GatedRow, join, part
from dsv3_megatron.parallel.narrow_rows import Narrow, exchange_rows, permuted_records


class FrugalMoELayer(MoELayer):
    """Megatron-Core's, of which nothing of a micro-batch is left when its forward pass is done."""

    token_dispatcher: GatedDispatcher

    def __init__(self, *args: Any, pg_collection: ProcessGroupCollection | None = None, **kwargs: Any) -> None:
        assert pg_collection is not None, "process groups are passed, never global"
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        if self.config.moe_token_dispatcher_type != "flex":
            self.token_dispatcher = GatedDispatcher(self.num_local_experts, self.local_expert_indices,
                                                    config=self.config, pg_collection=pg_collection)

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute what Megatron-Core's layer does, and let go of what its dispatcher would keep to no use."""
        output = super().forward(hidden_states, *args, **kwargs)
        dispatcher = self.token_dispatcher
        dispatcher.probs = dispatcher.routing_map = dispatcher.reversed_local_input_permutation_mapping = None
        return output


class GatedDispatcher(MoEAlltoAllTokenDispatcher):
    """All-to-all dispatcher whose rows take their gates along, and may be quantized before they are sent.

    Attributes:
        backend: Implementation that quantizes rows; None: they travel as they are.
    """

    tokens_per_expert: Any
    backend: ReferenceBackend | None = None
    _outward: Narrow | None = None
    _row: GatedRow
    # A CPU's only rank has all experts whole, and takes rows in the run's precision.
    _is_alone = False

    def dispatch_preprocess(self, hidden_states: torch.Tensor, routing_map: torch.Tensor, probs: torch.Tensor
                            ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gated rows for the ranks of their experts, and the gates once more, which nobody needs any longer.

        On a CPU whose rank has all experts, rows [R, H] in the experts' order and their gates [R].
        """
        # Megatron-Core's own, on one channel: splits, the order of rows, gates.
        _, gates_R = super().dispatch_preprocess(hidden_states[..., :1].detach(), routing_map, probs)
        self.hidden_shape = hidden_states.shape
        x_TH = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.hidden_shape_before_permute = x_TH.shape
        self._row = GatedRow(x_TH.shape[1], x_TH.dtype, gates_R.dtype)
        token_of_row_R = self.reversed_local_input_permutation_mapping
        self._is_alone = x_TH.device.type == "cpu" and self.ep_size == self.tp_size == 1 and self.backend is None
        if self._is_alone:
            return copy_rows(x_TH, token_of_row_R), gates_R
        if self.backend is None:
            return join(x_TH, token_of_row_R, gates_R), gates_R.detach()
        gated, self._outward = permuted_records(x_TH, token_of_row_R, gates_R, self.backend)
        return gated, gates_R.detach()

    def token_dispatch(self, permutated_local_input_tokens: torch.Tensor, permuted_probs: torch.Tensor
                       ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gated rows to the ranks of their experts; `permuted_probs` is given back."""
        if self._is_alone:
            return permutated_local_input_tokens, permuted_probs
        return exchange_rows(permutated_local_input_tokens, self.read_splits(), self.outward()), permuted_probs

    def dispatch_postprocess(self, global_input_tokens: torch.Tensor, global_probs: torch.Tensor
                             ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows [R, H] in the order of the experts, the rows of each expert, and gates [R], of gated rows that came."""
        if self._is_alone:
            tokens_per_expert = self._maybe_dtoh_and_synchronize("before_finish", self._on_host())
            self.tokens_per_expert = None
            return global_input_tokens, tokens_per_expert, global_probs
        if self.tp_size > 1:
            # Gradients of the rows that expert-tensor ranks share are added up, and so are rows and gates apart.
            rows, gates = part(global_input_tokens, self._row, [len(global_input_tokens)], [0])
            return super().dispatch_postprocess(rows, gates)
        self.tokens_per_expert = self._on_host()
        sizes, order = [len(global_input_tokens)], [0]
        if self.num_local_experts > 1:
            sizes = self.num_global_tokens_per_local_expert.ravel().tolist()
            order = self.sort_input_by_local_experts.tolist()
        rows, gates = part(global_input_tokens, self._row, sizes, order)
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return rows, tokens_per_expert, gates

    def _on_host(self) -> Any:
        return self._maybe_dtoh_and_synchronize("before_permutation_2", self.tokens_per_expert)

    def combine_preprocess(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Rows [R, H] in the order in which they go back to the ranks of their tokens."""
        if self._is_alone:
            return hidden_states
        rows_RH: torch.Tensor = super().combine_preprocess(hidden_states)
        return rows_RH

    def token_combine(self, hidden_states: torch.Tensor, async_finish: bool = True,
                      allocate_on_comm_stream: bool = True) -> torch.Tensor:
        """Rows [R, H] back to the ranks of their tokens."""
        if self._is_alone:
            return hidden_states
        splits = self._splits()
        return exchange_rows(hidden_states, None if splits is None else splits.reversed(), self.homeward())

    def read_splits(self) -> Splits | None:
        """How many rows go where, known on the host from here on: it waits for the device. None with one rank."""
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize("before_ep_alltoall", self.tokens_per_expert)
        return self._splits()

    def _splits(self) -> Splits | None:
        if self.ep_group.size() == 1:
            return None
        return Splits.of(self.input_splits, self.output_splits, self.ep_group)

    def outward(self) -> Narrow | None:
        """How the rows of the last `dispatch_preprocess` travel; once. None: as they are."""
        outward, self._outward = self._outward, None
        assert (outward is None) == (self.backend is None), "dispatch_preprocess comes first"
        return outward

    def homeward(self) -> Narrow | None:
        """How the experts' outputs travel; None: as they are."""
        return None if self.backend is None else Narrow("backward", self.backend)
