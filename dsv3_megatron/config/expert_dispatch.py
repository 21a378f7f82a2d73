"""How tokens get to their experts: the names of the ways, and which ranks of a group share a node.

Source: DeepSeek-V3 report, section 3.2.2.
"""

from __future__ import annotations

from dsv3_megatron.config.fields import ConfigError, divisors

DISPATCHERS = ("auto", "node", "alltoall", "flex")
FLEX_BACKENDS = ("deepep", "hybridep")
# Parts in which "node" sends a rank's tokens on a GPU, so that NVLink works while the network does: an exchange takes
# the longer of the two, and one part of the other.
LEGS_ON_GPU = 4


def members_of_nodes(ep: int, etp: int, ranks_per_node: int) -> tuple[int, int]:
    """Number of nodes that a group of expert-parallel ranks lies on, and of its ranks on each of them.

    Args:
        ep: Expert-parallel ranks.
        etp: Ranks that an expert is split over, which are next to each other.
        ranks_per_node: Ranks of a node.

    Raises:
        ConfigError: not as many on each node.
    """
    ranks = ep * etp
    if ranks_per_node % ranks == 0:
        return 1, ep
    if ranks % ranks_per_node == 0 and (ranks_per_node % etp == 0 or etp % ranks_per_node == 0):
        size = max(1, ranks_per_node // etp)
        return ep // size, size
    names = f"expert_model_parallel_size={ep}" + f" x expert_tensor_parallel_size={etp}" * (etp > 1)
    raise ConfigError(
        f"{names} = {ranks} ranks do not lie evenly on nodes of ranks_per_node={ranks_per_node}: one number must "
        f"divide the other; try ranks_per_node={divisors(ranks, near=ranks_per_node)}, or "
        "moe_token_dispatcher_type=alltoall, which asks for no nodes")


def resolve_dispatcher(requested: str, ep: int, etp: int, ranks_per_node: int) -> str:
    """Turn "auto" into "node" where the experts are on several nodes, else into "alltoall".

    On one node nothing crosses the network, and one exchange with a row for each expert costs fewer steps than it saves
    bytes.

    Raises:
        ConfigError: "node" was asked for, and the ranks are not as many on each node.
    """
    if requested not in ("auto", "node") or ep == 1:
        return requested if requested != "auto" else "alltoall"
    try:
        num_nodes, _size = members_of_nodes(ep, etp, ranks_per_node)
    except ConfigError:
        if requested == "node":
            raise
        return "alltoall"
    return "node" if requested == "node" or num_nodes > 1 else "alltoall"
