"""The frozen weights that a policy's divergence is measured from.

They are kept as the moving average of a pre-training is (optim/ema.py): each rank has the shard of its optimizer's fp32
weights in CPU memory, a checkpoint has them whole under any layout, and the model computes with them while they are
swapped in. Here they do not follow the weights; they are replaced when the run says so.
"""

from __future__ import annotations

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.optim.ema import WeightAverage


class ReferenceWeights(WeightAverage):
    """The weights as they were when `take` was called last.

    Args:
        optimizer: The distributed optimizer of the weights.
        chunks: The wrapped stages that it trains.
        groups: The run's process groups.
    """

    def __init__(self, optimizer: MegatronOptimizer, chunks: list[torch.nn.Module], groups: ProcessGroupCollection
                 ) -> None:
        super().__init__(optimizer, chunks, groups, decay=0.0)

    def update(self) -> None:
        """Stay as it is: a step of the policy is none of the reference's."""

    def take(self) -> None:
        """Become the weights as they are now; an average with a decay of 0 is the last that it took in."""
        super().update()
        self.wait()
