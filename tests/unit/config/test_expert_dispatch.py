"""Which experts' ranks share a node, and what is said where they cannot."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.expert_dispatch import members_of_nodes, resolve_dispatcher
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.parallel import ParallelConfig


@pytest.mark.parametrize(("ep", "etp", "node", "expected"), [
    (64, 1, 8, (8, 8)), (8, 1, 8, (1, 8)), (4, 1, 8, (1, 4)), (4, 2, 4, (2, 2)), (4, 4, 2, (4, 1)), (4, 1, 1, (4, 1)),
    (2, 2, 2, (2, 1)), (6, 1, 3, (2, 3)), (1, 2, 8, (1, 1))])
def test_members_are_those_of_a_list_of_ranks(ep, etp, node, expected):
    nodes = [rank * etp // node for rank in range(ep)]
    assert members_of_nodes(ep, etp, node) == expected
    assert (len(set(nodes)), nodes.count(0)) == expected


@pytest.mark.parametrize(("ep", "etp", "node"), [(6, 1, 4), (4, 1, 6), (4, 3, 4), (64, 1, 12)])
def test_uneven_nodes_are_refused(ep, etp, node):
    with pytest.raises(ConfigError, match=rf"expert_model_parallel_size={ep}.* on nodes of ranks_per_node={node}.*"
                                          "try ranks_per_node=.*moe_token_dispatcher_type=alltoall"):
        resolve_dispatcher("node", ep, etp, node)
    assert resolve_dispatcher("auto", ep, etp, node) == resolve_dispatcher("alltoall", ep, etp, node) == "alltoall"


@pytest.mark.parametrize(("requested", "ep", "node", "expected"), [
    ("auto", 64, 8, "node"), ("auto", 8, 8, "alltoall"), ("auto", 1, 8, "alltoall"), ("node", 8, 8, "node"),
    ("node", 1, 8, "node"), ("alltoall", 64, 8, "alltoall"), ("flex", 64, 8, "flex")])
def test_auto_is_by_nodes(requested, ep, node, expected):
    assert resolve_dispatcher(requested, ep, 1, node) == expected


def test_the_runs_own_nodes_come_first():
    parallel = ParallelConfig(expert_model_parallel_size=4)
    assert parallel.token_dispatcher(4) == "alltoall"
    assert dataclasses.replace(parallel, ranks_per_node=2).token_dispatcher(4) == "node"
