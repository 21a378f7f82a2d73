"""How much of the gradient belongs to which component of the model.

The global norm is one number; which part of the model grows is what one wants to know when it does. The squares of the
components' norms add to the square of the global norm, which Megatron-Core takes of the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared

from dsv3_megatron.config.weights import find_weight
from dsv3_megatron.model.global_names import whole_parameters
from dsv3_megatron.optim.shards import distributed_parts

COMPONENTS = ("embedding", "attention", "dense-ffn", "experts", "shared-experts", "router", "norms", "mtp", "head")
# Components of the table of weights under the names that a run's records have.
_NAMES = {"embedding": "embedding", "attention": "attention", "dense_ffn": "dense-ffn", "router": "router",
          "routed_experts": "experts", "shared_experts": "shared-experts", "norms": "norms", "final_norm": "norms",
          "head": "head"}


def component_of(name: str) -> str:
    """The component that a parameter belongs to.

    Everything of an MTP module counts as "mtp", its norms and router too; the latents' norms count as "norms".

    Args:
        name: Global name of a parameter, as `model.global_names.whole_parameters` gives it.
    """
    return "mtp" if name.startswith("mtp.") else _NAMES[find_weight(name).component]


@dataclass(frozen=True)
class _Shard:
    """Part of a parameter's gradient: entries start..stop - 1 of it, flattened."""

    parameter: torch.nn.Parameter
    start: int
    stop: int


class GradientNorms:
    """Sums of squares by component, of the main gradients that this rank updates parameters from.

    Args:
        chunks: This rank's stages, wrapped.
        optimizer: Distributed optimizer over the same stages.
        groups: The run's process groups.
    """

    def __init__(self, chunks: Iterable[torch.nn.Module], optimizer: MegatronOptimizer,
                 groups: ProcessGroupCollection) -> None:
        components = {whole.parameter: component_of(whole.name)
                      for chunk in chunks for whole in whole_parameters(chunk, groups)}
        self._shards: dict[str, list[_Shard]] = {component: [] for component in COMPONENTS}
        for part in distributed_parts(optimizer):
            for parameter in _counted_parameters(part):
                held = part._get_model_param_range_map(parameter)["param"]
                self._shards[components[parameter]].append(_Shard(parameter, held.start, held.end))

    def squares(self) -> torch.Tensor:
        """Sum of squares of each of COMPONENTS, fp64 [C] on the gradients' device: summed over ranks, the run's.

        To be called where gradients are final: reduced over replicas and divided by the tokens, not yet clipped.
        """
        norms = []
        for shards in self._shards.values():
            gradients = [getattr(shard.parameter, "main_grad").view(-1)[shard.start:shard.stop]  # noqa: B009 - a mark
                         for shard in shards]
            norms.append(torch.nn.utils.get_total_norm(gradients) if gradients
                         else torch.zeros((), device=torch.cuda.current_device()))
        return torch.stack([norm.double() for norm in norms]).square()


def _counted_parameters(part: Any) -> Iterable[torch.nn.Parameter]:
    """Parameters of which a distributed optimizer holds a shard, without copies that another rank counts.

    The rule is Megatron-Core's own for the global norm.
    """
    for group in [*part.model_float16_groups, *part.model_fp32_groups]:
        for parameter in group:
            if param_is_not_shared(parameter) and param_is_not_tensor_parallel_duplicate(
                    parameter, tp_group=getattr(part, "tp_group", None),
                    expert_tp_group=getattr(part, "expert_tp_group", None)):
                yield parameter
