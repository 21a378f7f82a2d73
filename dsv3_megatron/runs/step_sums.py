"""All that ranks add up of a training step, in one collective: losses, loads of experts, the gradient's norm.

They are ready at the same time, when gradients have been reduced, and the host reads them at once: it waits for the
device once a step here, where it would for each number.

Shapes: L layers with MTP modules, E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.guards.step_losses import StepLosses
from dsv3_megatron.metrics.shared_numbers import SharedNumbers
from dsv3_megatron.model.losses import sum_reports
from dsv3_megatron.optim.router_bias import collect_expert_loads
from dsv3_megatron.optim.update import nonfinite_copies, squared_norm
from dsv3_megatron.platform import Device


@dataclass(frozen=True)
class StepSums:
    """Sums of a step over micro-batches and ranks, the same on every rank.

    Attributes:
        losses: Mean losses of the step's tokens.
        extras: Means of the further sums of a loss of its own kind, over what its losses are means of.
        balance_loss: Balance loss, alpha included, summed over sequences and layers.
        loads_LE: int64, on the host: tokens that each expert got; rows of dense layers are zero.
        loads_on_device_LE: int64, on the device of this process: as many.
        grad_norm: Global L2 norm of the gradient before clipping.
        has_nonfinite_copy: NaN or Inf is in a gradient that the norm leaves out, on some rank.
    """

    losses: StepLosses
    extras: tuple[float, ...]
    balance_loss: float
    loads_LE: torch.Tensor
    loads_on_device_LE: torch.Tensor
    grad_norm: float
    has_nonfinite_copy: bool


def sum_step(model: ModelConfig, chunks: Sequence[torch.nn.Module], optimizer: MegatronOptimizer,
             collected: list[dict[str, Any]], groups: ProcessGroupCollection, device: Device, *, num_extras: int = 0
             ) -> StepSums:
    """Add up a step's numbers over all ranks, all of which call; makes gradients ready for the update.

    Counts of tokens are whole numbers, which fp64 holds exactly up to 2^53.

    Args:
        model: The run's model.
        chunks: This rank's stages; their routers' counters are reset.
        optimizer: Distributed optimizer over them, whose gradients have been reduced.
        collected: This rank's reports of its micro-batches.
        groups: The run's process groups.
        device: Device of this process.
        num_extras: Further sums in a report, of a loss of its own kind.
    """
    rows = model.num_layers + model.mtp_num_layers
    numbers = SharedNumbers({"losses": (2 + model.mtp_num_layers + num_extras,), "balance": (rows,),
                             "loads": (rows, model.num_experts), "squares": (), "copies": ()}, device.torch_device)
    loads_LE, balance_L = collect_expert_loads(
        chunks, num_layers=model.num_layers, num_mtp_layers=model.mtp_num_layers, num_experts=model.num_experts,
        device=device.torch_device)
    numbers["losses"].copy_(sum_reports(collected, groups, device, num_mtp_layers=model.mtp_num_layers,
                                        num_extras=num_extras))
    numbers["balance"].copy_(balance_L)
    numbers["loads"].copy_(loads_LE)
    numbers["squares"].copy_(squared_norm(optimizer))
    if groups.tp.size() > 1 or groups.expt_tp.size() > 1:
        numbers["copies"].copy_(nonfinite_copies(optimizer))
    numbers.reduce(torch.distributed.ReduceOp.SUM)
    tokens, *sums = numbers["losses"].tolist()
    own = 1 + model.mtp_num_layers
    # Rounded to fp32, in which Megatron-Core adds squares up.
    square = numbers["squares"].float().item()
    return StepSums(
        losses=StepLosses.of_sums(tokens, sums[:own]),
        extras=tuple(value / tokens if tokens else 0.0 for value in sums[own:]),
        balance_loss=float(numbers["balance"].sum()),
        loads_LE=numbers["loads"].long(), loads_on_device_LE=numbers.on_device("loads").long(),
        grad_norm=square ** 0.5 if square >= 0 else math.nan,
        has_nonfinite_copy=math.isnan(numbers["copies"].item()))
