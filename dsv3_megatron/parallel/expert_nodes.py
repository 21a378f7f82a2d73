"""Expert-parallel ranks as nodes: who has the same place on every node, and who shares one.

    across   the ranks with this rank's place, one on each node: over the network
    within   the ranks on this rank's node: over NVLink

A node's ranks follow each other in the order of global ranks, as a launcher numbers them.

Source: DeepSeek-V3 report, section 3.2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.expert_dispatch import members_of_nodes
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.parallel.groups import all_sets, own_group


@dataclass(frozen=True)
class ExpertNodes:
    """The ranks of an expert-parallel group by node: rank n * size + i of the group has place i on node n.

    Attributes:
        num_nodes: Nodes that the group lies on.
        size: Ranks of the group on each of them.
        rank: This rank's number in the group.
        hops: Groups over which a row goes to its experts, in this order: across and within; one of them where the
            other has one rank only.
    """

    num_nodes: int
    size: int
    rank: int
    hops: tuple[torch.distributed.ProcessGroup, ...]

    @property
    def node(self) -> int:
        """This rank's node, counted among those of the group."""
        return self.rank // self.size

    @property
    def place(self) -> int:
        """This rank's place on its node."""
        return self.rank % self.size


def expert_nodes(parallel: ParallelConfig, groups: ProcessGroupCollection, ranks_per_node: int) -> ExpertNodes:
    """Sort this rank's expert-parallel group by nodes; called by every rank of the run, for it makes groups.

    Args:
        parallel: The split.
        groups: The run's process groups.
        ranks_per_node: Ranks of a node, all of them.

    Raises:
        ConfigError: the group's ranks are not spread evenly over nodes.
    """
    group = groups.ep
    num_nodes, size = members_of_nodes(parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size,
                                       ranks_per_node)
    hops: tuple[torch.distributed.ProcessGroup, ...] = (group,)
    if num_nodes > 1 and size > 1:
        across, within = [], []
        for ranks in all_sets(group):
            assert [rank // ranks_per_node for rank in ranks] == [
                ranks[0] // ranks_per_node + (ranks[index * size] - ranks[0]) // ranks_per_node
                for index in range(num_nodes) for _ in range(size)], "a node's ranks follow each other"
            across += [ranks[place::size] for place in range(size)]
            within += [ranks[node * size:(node + 1) * size] for node in range(num_nodes)]
        hops = (own_group(across), own_group(within))
    return ExpertNodes(num_nodes, size, group.rank(), hops)

