"""Which stages sum so that a token's numbers have the bits that generation gives them (ops/steady_sums.py).

A run of GRPO whose rollouts keep training's bits does. Other runs do not: attention over more than 256 keys would take
a little longer, and have other bits than before.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from dsv3_megatron.model.attention import LocalMLASelfAttention
from dsv3_megatron.model.experts import GroupedExperts
from dsv3_megatron.model.router import DeepSeekRouter


def set_steady(stages: Iterable[torch.nn.Module], is_steady: bool = True) -> None:
    """Have attention, routers and experts of stages sum so, or as is fastest.

    Args:
        stages: Local modules, bare or wrapped.
        is_steady: Whether the modules sum so.
    """
    for stage in stages:
        for module in stage.modules():
            if isinstance(module, LocalMLASelfAttention | GroupedExperts | DeepSeekRouter):
                module.is_steady = is_steady
