"""Bytes on the wire and how long they take: which ranks of a group share a node, and what a node's links carry.

Ranks are numbered as Megatron-Core does: tensor-parallel ranks next to each other, then those that share a sequence,
then data-parallel ones, pipeline ranks outermost; expert-parallel ranks are next to each other within both of the
latter. A node's ranks are a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dsv3_megatron.config.expert_dispatch import LEGS_ON_GPU, members_of_nodes
from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.planning.machine.hardware import Hardware
from dsv3_megatron.planning.time.dispatch_bytes import Carried, bytes_of_row, destinations, rows_of_a_token


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
    """

    parallel: ParallelConfig
    hardware: Hardware
    num_devices: int

    @property
    def node(self) -> int:
        """Devices of a node, or of an NVLink domain, that the run has in each."""
        return self.hardware.ranks_per_node(self.num_devices)

    @property
    def dispatcher(self) -> str:
        """How tokens get to their experts, by the run's setting.

        Raises:
            ConfigError: the experts' ranks are not spread evenly over nodes, and "node" was asked for.
        """
        return self.parallel.token_dispatcher(self.node)

    @property
    def expert_nodes(self) -> tuple[int, int]:
        """Nodes that an expert-parallel group lies on, and its ranks on each of them."""
        ep, etp = self.parallel.expert_model_parallel_size, self.parallel.expert_tensor_parallel_size
        node = self.parallel.ranks_per_node or self.node
        try:
            return members_of_nodes(ep, etp, node)
        except ConfigError:  # not evenly, which only a dispatcher that counts nodes refuses
            nodes = math.gcd(ep, max(1, ep * etp // node))
            return nodes, ep // nodes

    def exchange_traffic(self, model: ModelConfig, tokens: float, row_bytes: int,
                         carried: Carried = Carried.NOTHING) -> Traffic:
        """What one rank sends of `tokens` to their experts, or passes on for others; on average the same.

        Args:
            model: The model.
            tokens: Tokens of the rank.
            row_bytes: Bytes of a row's values.
            carried: What travels with the rows.
        """
        ranks, etp = self.parallel.expert_model_parallel_size, self.parallel.expert_tensor_parallel_size
        if ranks == 1 and etp == 1:
            return Traffic(0.0, 0.0)
        of_one = tokens * bytes_of_row(self.dispatcher, row_bytes, carried, model.moe_router_topk)
        sent = destinations(model, self.dispatcher, *self.expert_nodes)
        # Ranks that an expert is split over gather what has come to each of them.
        gathered = rows_of_a_token(model, self.dispatcher, ranks) * (etp - 1)
        return Traffic(of_one * sent.network, of_one * (sent.node + gathered))

    def exchange_seconds(self, model: ModelConfig, tokens: float, row_bytes: int,
                         carried: Carried = Carried.NOTHING) -> float:
        """An exchange among the ranks of the experts, over links that work at once.

        Rows for each expert take the slower link and one latency. Rows that are passed on within the node wait for the
        network first: of the faster link the last leg's part is added, and both latencies.
        """
        traffic = self.exchange_traffic(model, tokens, row_bytes, carried)
        hardware, way = self.hardware, self.dispatcher
        network, nvlink = (hardware.for_dispatcher(f"all_to_all_{link}_bandwidth", way)
                           for link in ("network", "nvlink"))
        seconds = [(traffic.network / network, hardware["network_latency"]),
                   (traffic.nvlink / nvlink, hardware["nvlink_latency"])]
        used = sorted(((taken, latency) for taken, latency in seconds if taken), reverse=True)
        if not used:
            return 0.0
        longest, latency = used[0]
        if way != "node" or len(used) == 1:
            return longest + max(latency for _, latency in used)
        return longest + LEGS_ON_GPU * latency + used[1][0] / LEGS_ON_GPU + used[1][1]

    def tensor_parallel_seconds(self, num_bytes: float) -> float:
        """An all-gather or a reduce-scatter of so many bytes in all over the tensor-parallel ranks."""
        return self._ring(num_bytes, self.parallel.tensor_model_parallel_size, stride=1)

    def sequence_exchange_seconds(self, num_bytes: float) -> float:
        """A message of so many bytes out of each rank, to the others of its sequence."""
        return self._sequence_seconds(num_bytes, self.parallel.context_parallel_size)

    def ring_step_seconds(self, num_bytes: float) -> float:
        """Bytes from each rank to the next of its sequence.

        Some pair of neighbours is on two nodes where the ranks are, and all wait for it; each has a card of its own.
        """
        return self._sequence_seconds(num_bytes, 1)

    def _sequence_seconds(self, num_bytes: float, num_messages: int) -> float:
        """Ranks of a sequence are as far apart as its tensor-parallel ranks are many."""
        parallel, hardware = self.parallel, self.hardware
        span = parallel.context_parallel_size * parallel.tensor_model_parallel_size
        link = "nvlink" if span <= self.node else "network"
        latency = hardware[f"{link}_latency"] * math.ceil(math.log2(num_messages + 1))
        return latency + num_bytes / hardware[f"{link}_bandwidth"]

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
        parallel = self.parallel
        dense_ranks = parallel.replicas_of_weights(self.num_devices)
        expert_ranks = parallel.expert_data_parallel_size(self.num_devices) * parallel.num_model_copies
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
