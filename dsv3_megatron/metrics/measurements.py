"""What the instruments saw in a step that is logged, over all ranks, as plain numbers. Pure Python.

`instruments.py` fills it, `scalars.py` and `pictures.py` turn it into what TensorBoard shows. Layers are named as in
`StepReport.expert_load`: 0-based over the main model, MTP depth k is num_layers + k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class RouterMeasurements:
    """Measurements of one router in a step.

    Attributes:
        score_counts: Affinities of this step's tokens to every expert, counted in equal parts of 0..1.
        tokens_per_group: Tokens that went to each group of experts, a token once per group.
        tokens_by_num_groups: Tokens that went to 0, 1, 2, ... groups.
        bias: Balancing bias of each expert, after the step's update.
    """

    score_counts: list[int]
    tokens_per_group: list[int]
    tokens_by_num_groups: list[int]
    bias: list[float]

    @property
    def groups_per_token(self) -> float:
        """Groups that a token goes to, mean over the tokens; 0 if there were none."""
        tokens = sum(self.tokens_by_num_groups)
        return sum(n * count for n, count in enumerate(self.tokens_by_num_groups)) / tokens if tokens else 0.0

    @property
    def most_groups_per_token(self) -> int:
        """Groups that the most scattered token goes to."""
        return max((n for n, count in enumerate(self.tokens_by_num_groups) if count), default=0)


@dataclass(frozen=True)
class Measurements:
    """Measurements of a step and of the time since the logged step before it.

    Attributes:
        routers: Measurements of each router, by layer.
        grad_norms: L2 norm of each component's gradient before clipping; their squares add to the global norm's.
        head_agreement: Share, for each MTP depth, of sampled positions where its most likely token is the main head's;
            None where no position was sampled.
        part_seconds: Mean over ranks and steps since the last logged one, by part of a step; parts do not overlap.
        slowest_part_seconds: Seconds by part of a step of the rank that took longest in it, as a mean over these steps.
        memory_bytes: Largest over ranks, by kind.
    """

    routers: Mapping[int, RouterMeasurements]
    grad_norms: Mapping[str, float]
    head_agreement: tuple[float | None, ...]
    part_seconds: Mapping[str, float]
    slowest_part_seconds: Mapping[str, float]
    memory_bytes: Mapping[str, int]


class NodeLimitError(RuntimeError):
    """A token went to more groups of experts than the node limit allows."""


def check_node_limit(routers: Mapping[int, RouterMeasurements], group_top_k: int) -> None:
    """Check that no token was sent to more groups than it may be.

    Raises:
        NodeLimitError: some were; names the first layer, how many tokens and how many groups.
    """
    for layer, router in routers.items():
        num_beyond = sum(router.tokens_by_num_groups[group_top_k + 1:])
        if num_beyond:
            raise NodeLimitError(
                f"layer {layer}: {num_beyond} of {sum(router.tokens_by_num_groups)} tokens went to more than "
                f"moe_router_group_topk={group_top_k} groups of experts, one to {router.most_groups_per_token}; the "
                "router does not keep the node limit, so that a step's traffic is not what the layout assumes")
