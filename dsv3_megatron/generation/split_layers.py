"""A layer whose experts are on several ranks.

Every rank of a layer has all tokens. Each computes what its experts give, and the parts are added up over the ranks
that the routed experts are spread over, as they are under tensor parallelism after attention and dense widths
(cached_layers.py). No token travels to its experts, so nothing depends on how tokens are divided.

Shapes: T tokens (rows), H hidden; K experts per token, R = T K routed rows.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.generation.cached_layers import Layer, MixtureOfExperts
from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.linear import multiply_rows


class SplitExperts(MixtureOfExperts):
    """Shared experts and, of each token, its routed ones, of which a rank has some.

    Args:
        module: The module.
        groups: The run's process groups.

    Source: DeepSeek-V3 report, eq. 12-16.
    """

    def __init__(self, module: Any, groups: ProcessGroupCollection) -> None:
        super().__init__(module)
        self._groups = (groups.ep, groups.expt_tp)
        self._num_experts = len(self._fc1)
        self._first_expert = groups.ep.rank() * self._num_experts

    def __call__(self, x_TH: torch.Tensor, least_rows: int = 1) -> torch.Tensor:
        """[T, H] -> [T, H], the same on all ranks; arguments as of MixtureOfExperts."""
        wide = wide_dtype(x_TH.dtype)
        gates_TK, ids_TK = self._choose(self._score(multiply_rows(x_TH.to(wide), self._router.to(wide))))
        output_TH = self._of_own(x_TH, gates_TK, ids_TK, least_rows)
        for group in self._groups:
            if group.size() > 1:
                torch.distributed.all_reduce(output_TH, group=group)
        return output_TH if self._shared is None else output_TH.add_(self._shared(x_TH))

    def _of_own(self, x_TH: torch.Tensor, gates_TK: torch.Tensor, ids_TK: torch.Tensor, least_rows: int
                ) -> torch.Tensor:
        """What this rank's experts add, of the rows that are routed to them."""
        expert_R = ids_TK.flatten() - self._first_expert
        mine = ((expert_R >= 0) & (expert_R < self._num_experts)).nonzero().flatten()
        order = mine[expert_R[mine].argsort(stable=True)]
        output_TH = torch.zeros_like(x_TH)
        if len(order):
            counts = torch.bincount(expert_R[order], minlength=self._num_experts).tolist()
            token_of_row = order // ids_TK.shape[1]
            output_TH.index_add_(0, token_of_row, swiglu_experts(
                x_TH[token_of_row], counts, self._fc1, self._fc2, gates_TK.flatten()[order],
                least_rows=least_rows))
        return output_TH


class SplitLayer(Layer):
    """Attention and FFN of which this rank has a part.

    Args:
        module: A transformer layer made of this library's local modules.
        groups: The run's process groups.
    """

    def __init__(self, module: Any, groups: ProcessGroupCollection) -> None:
        super().__init__(module)
        if isinstance(module.mlp, MoELayer):
            self._ffn = SplitExperts(module.mlp, groups)
