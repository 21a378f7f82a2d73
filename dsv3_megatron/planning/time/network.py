"""Bytes on the wire and how long they take: which ranks of a group share a node, and what a node's links carry.

Ranks are numbered as Megatron-Core does: tensor-parallel ranks next to each other, then data-parallel ones, pipeline
ranks outermost; expert-parallel ranks are next to each other within the data-parallel ones. A node's ranks are a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.planning.machine.hardware import Hardware


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in an all-to-all."""

    network: float
    nvlink: float


@dataclass(frozen=True)
class Network:
    """The groups of a layout on a machine.

    Attributes:
        parallel: The layout.
        hardware: The machine.
        num_devices: Devices of the whole run.
        sends_once_per_node: Rows travel once per node and rank, not once per expert, as in `step_time.Setting`.
    """

    parallel: ParallelConfig
    hardware: Hardware
    num_devices: int
    sends_once_per_node: bool

    @property
    def node(self) -> int:
        """Devices of a node."""
        return int(self.hardware["gpus_per_node"])

    @property
    def num_expert_nodes(self) -> int:
        """Nodes that an expert-parallel group lies on."""
        return max(1, self.parallel.expert_model_parallel_size * self.parallel.expert_tensor_parallel_size // self.node)

    def exchange_traffic(self, model: ModelConfig, tokens: float, row_bytes: float) -> Traffic:
        """What one rank sends of `tokens` to their experts, each row once per node and rank or once per expert.

        Tokens are spread evenly, so the part of a rank or a node that stays at home is its part of the whole.
        """
        ranks = self.parallel.expert_model_parallel_size
        if ranks * self.parallel.expert_tensor_parallel_size == 1:
            return Traffic(0.0, 0.0)
        nodes = self.num_expert_nodes
        to_ranks = expected_destinations(model, ranks) if self.sends_once_per_node else float(model.moe_router_topk)
        to_nodes = expected_destinations(model, nodes) if self.sends_once_per_node else float(model.moe_router_topk)
        to_ranks *= self.parallel.expert_tensor_parallel_size
        network = tokens * row_bytes * to_nodes * (1 - 1 / nodes) if nodes > 1 else 0.0
        own = 1 / ranks if nodes == 1 else 1 / self.node
        return Traffic(network, tokens * row_bytes * to_ranks * (1 - own))

    def exchange_seconds(self, model: ModelConfig, tokens: float, row_bytes: float) -> float:
        """An all-to-all among the ranks of the experts: its slower link, for the two work at once, and one latency."""
        traffic = self.exchange_traffic(model, tokens, row_bytes)
        if not traffic.network and not traffic.nvlink:
            return 0.0
        hardware = self.hardware
        latency = hardware["network_latency"] if traffic.network else hardware["nvlink_latency"]
        return latency + max(traffic.network / hardware["all_to_all_network_bandwidth"],
                             traffic.nvlink / hardware["all_to_all_nvlink_bandwidth"])

    def tensor_parallel_seconds(self, num_bytes: float) -> float:
        """An all-gather or a reduce-scatter of so many bytes in all over the tensor-parallel ranks."""
        return self._ring(num_bytes, self.parallel.tensor_model_parallel_size, stride=1)

    def p2p_seconds(self, num_bytes: float) -> float:
        """Seconds that a message takes between one pipeline rank and the next."""
        stride = self.num_devices // self.parallel.pipeline_model_parallel_size
        if stride >= self.node:
            return self.hardware["network_latency"] + num_bytes / self.hardware["network_bandwidth"]
        return self.hardware["nvlink_latency"] + num_bytes / self.hardware["nvlink_bandwidth"]

    def reduction_seconds(self, dense_bytes: float, expert_bytes: float) -> float:
        """Reduce-scatter or all-gather, over their data-parallel ranks, of a rank's dense weights and its experts'.

        Under DualPipe the ranks of both copies of the model are one group.
        """
        parallel, copies = self.parallel, self.parallel.num_model_copies
        dense_ranks = parallel.data_parallel_size(self.num_devices) * copies
        expert_ranks = parallel.expert_data_parallel_size(self.num_devices) * copies
        return (self._ring(dense_bytes, dense_ranks, stride=parallel.tensor_model_parallel_size)
                + self._ring(expert_bytes, expert_ranks, stride=parallel.expert_model_parallel_size
                             * parallel.expert_tensor_parallel_size))

    def _ring(self, num_bytes: float, num_ranks: int, *, stride: int) -> float:
        """Reduce-scatter or all-gather of `num_bytes` over ranks `stride` apart.

        Each rank passes on all parts but one. Where several ranks of a group share a node, each has a ring through its
        own card, so that the node's cards carry the group's data together, up to what NVLink takes.
        """
        if num_ranks <= 1:
            return 0.0
        hardware = self.hardware
        on_node = min(num_ranks, max(1, self.node // stride))
        bandwidth, latency = hardware["nvlink_bandwidth"], hardware["nvlink_latency"]
        if on_node < num_ranks:
            across = hardware["network_bandwidth"] * on_node
            bandwidth = min(bandwidth, across) if on_node > 1 else across
            latency = hardware["network_latency"]
        return num_bytes * (num_ranks - 1) / num_ranks / bandwidth + latency * math.ceil(math.log2(num_ranks))


@lru_cache(maxsize=1024)
def expected_destinations(model: ModelConfig, num_parts: int) -> float:
    """Number of the `num_parts` equal parts of the experts that a token goes to on average, its own part among them.

    Experts are chosen evenly among those of the groups that are kept, and groups evenly. Parts are nodes, or ranks.

    Source: DeepSeek-V3 report, section 2.1.2: a token goes to at most `moe_router_group_topk` groups.
    """
    experts, groups, kept, top = (model.num_experts, model.moe_router_num_groups, model.moe_router_group_topk,
                                  model.moe_router_topk)
    if num_parts <= 1:
        return 1.0
    size, part = experts // groups, experts // num_parts
    in_reach = size * kept
    if part <= size:  # within one group, which is kept with probability kept / groups
        return num_parts * kept / groups * (1 - _none(part, in_reach, top))
    held = part // size  # groups of a part
    touched = 0.0
    for of_part in range(1, min(held, kept) + 1):
        chance = math.comb(held, of_part) * math.comb(groups - held, kept - of_part) / math.comb(groups, kept)
        touched += chance * (1 - _none(of_part * size, in_reach, top))
    return num_parts * touched


def _none(marked: int, total: int, draws: int) -> float:
    """Probability that none of `draws` without replacement is among the marked."""
    return math.comb(total - marked, draws) / math.comb(total, draws) if total - marked >= draws else 0.0
