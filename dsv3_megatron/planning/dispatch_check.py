"""Whether tokens can get to their experts the way that a run asks for, and what its nodes make of the router's groups.
"""

from __future__ import annotations

from dsv3_megatron.config.expert_dispatch import members_of_nodes
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.planning.precheck import Told
from dsv3_megatron.planning.time.dispatch_bytes import Carried, bytes_of_row, bytes_of_straddling_groups


def check_dispatch(run: RunConfig, ranks_per_node: int | None) -> list[Told]:
    """How tokens get to their experts, with a warning where the router's groups are not whole on nodes.

    Args:
        run: A valid run.
        ranks_per_node: Ranks of a node where the run does not say it; None: not known.

    Raises:
        ConfigError: the ranks are not spread evenly over nodes, or a library is not installed.
    """
    parallel = run.parallel
    if parallel.moe_token_dispatcher_type == "flex":
        require_flex(parallel.moe_flex_dispatcher_backend)
    node = parallel.ranks_per_node or ranks_per_node
    if parallel.expert_model_parallel_size == 1 or node is None:
        return []
    dispatcher = parallel.token_dispatcher(node)
    told = [Told(f"experts: on {parallel.expert_model_parallel_size} ranks, dispatcher {dispatcher}, {node} ranks a "
                 "node")]
    if dispatcher != "node":
        return told
    num_nodes, _size = members_of_nodes(parallel.expert_model_parallel_size, parallel.expert_tensor_parallel_size,
                                        node)
    beyond = bytes_of_straddling_groups(run.model, num_nodes, _bytes_of_a_row(run))
    if beyond:
        groups = run.model.moe_router_num_groups
        told.append(Told(
            f"the router's {groups} groups of experts are not whole on {num_nodes} nodes: a token goes to more nodes, "
            f"which is {beyond:,.0f} bytes of a token more over the network in each MoE layer, forward and backward; "
            f"use as many nodes of experts as divide moe_router_num_groups={groups}", is_warning=True))
    return told


def require_flex(backend: str) -> None:
    """Check that the library of Megatron-Core's flexible dispatcher is there.

    Raises:
        ConfigError: the library is not installed.
    """
    if not is_installed("deep_ep"):
        raise ConfigError(
            f"moe_token_dispatcher_type=flex with moe_flex_dispatcher_backend={backend} needs the package deep_ep, "
            "which is not installed; install DeepEP (its branch hybrid-ep for hybridep), or set "
            "moe_token_dispatcher_type=node")


def _bytes_of_a_row(run: RunConfig) -> float:
    """What a token's row is over the network, out and home, forward and backward."""
    hidden, top_k = run.model.hidden_size, run.model.moe_router_topk
    home = hidden * (4 if run.training.precision == "fp32" else 2)
    out = record_bytes(hidden) if run.fp8.dispatches_fp8 else home
    return (bytes_of_row("node", out, Carried.ROUTING, top_k) + out + home
            + bytes_of_row("node", home, Carried.GATES, top_k))
