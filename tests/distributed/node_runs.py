"""Steps under dispatchers that know of nodes, with the bytes that went over the network and within nodes.

A node is some of the test's processes. What crosses which link is counted where torch is asked to send it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer

from dsv3_megatron.certification.rank_step import RankStep, StepHooks
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.node_dispatcher import NodeDispatcher
from dsv3_megatron.model.router import DeepSeekRouter
from tests.distributed.layout_step import FAULTS, Layout, run_layouts


@dataclass(frozen=True)
class NodeLayout(Layout):
    """A layout with other settings of the run.

    Attributes:
        settings: Fields of the run that differ.
    """

    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def run(self) -> RunConfig:
        """The layout's, with the settings."""
        return super().run.override(**dict(self.settings))


class Skewed(StepHooks):
    """Routers that prefer some experts whatever the token.

    Args:
        bias: Added to the balancing bias of the first experts.
    """

    def __init__(self, *bias: float) -> None:
        self.bias = torch.tensor(bias)

    def before_step(self, trainer: Any) -> None:
        for chunk in trainer.chunks:
            for module in chunk.modules():
                if isinstance(module, DeepSeekRouter):
                    module.expert_bias[:len(self.bias)] += self.bias


class InLegs(StepHooks):
    """Tokens that go out in several legs, as on a GPU.

    Args:
        num_legs: Legs.
    """

    def __init__(self, num_legs: int) -> None:
        self.num_legs = num_legs

    def before_step(self, trainer: Any) -> None:
        for chunk in trainer.chunks:
            for module in chunk.modules():
                if isinstance(module, MoELayer) and isinstance(module.token_dispatcher, NodeDispatcher):
                    module.token_dispatcher.num_legs = self.num_legs


# Two groups of three get every token, six experts none; and one expert gets every token.
FAULTS |= {"empty experts": Skewed(*[10.0] * 6), "one expert": Skewed(10.0), "three legs": InLegs(3)}


@dataclass
class Sent:
    """What one rank sent, and what its routers chose.

    Attributes:
        rows: Rows to other ranks by link, "network" or "node", bytes of a row and dtype.
        num_calls: All-to-alls.
        maps: Routing maps in the order of their making, those of recomputed layers too.
    """

    rows: Counter[tuple[str, int, str]] = field(default_factory=Counter)
    num_calls: int = 0
    maps: list[torch.Tensor] = field(default_factory=list)

@contextmanager
def counting(ranks_per_node: int) -> Iterator[Sent]:
    """Count what this rank sends in all-to-alls, and note routing maps, meanwhile."""
    sent, own = Sent(), torch.distributed.get_rank()
    original, forward = torch.distributed.all_to_all_single, DeepSeekRouter.forward

    def send(output: torch.Tensor, rows: torch.Tensor, output_split_sizes: Any = None, input_split_sizes: Any = None,
             group: Any = None, async_op: bool = False) -> Any:
        sent.num_calls += 1
        row_bytes = rows.element_size() * rows[:1].numel() // max(1, len(rows[:1])) if len(rows) else 0
        for rank, count in zip(torch.distributed.get_process_group_ranks(group), input_split_sizes, strict=True):
            link = "node" if rank // ranks_per_node == own // ranks_per_node else "network"
            sent.rows[link, row_bytes, str(rows.dtype)] += int(count) * (rank != own)
        return original(output, rows, output_split_sizes, input_split_sizes, group, async_op)

    def route(self: DeepSeekRouter, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = forward(self, *args, **kwargs)
        sent.maps.append(routing_map.clone())
        return probs, routing_map

    torch.distributed.all_to_all_single, DeepSeekRouter.forward = send, route
    try:
        yield sent
    finally:
        torch.distributed.all_to_all_single, DeepSeekRouter.forward = original, forward


def steps(layouts: list[Layout]) -> dict[str, tuple[RankStep, Sent]]:
    """This rank's part of a step under each layout, and what it sent."""
    found = {}
    for layout in layouts:
        with counting(layout.parallel.ranks_per_node or layout.num_ranks) as sent:
            found[layout.name] = run_layouts([layout])[layout.name], sent
    return found
