"""Auxiliary-loss-free balancing: one update of every router's bias per optimizer step.

Source: DeepSeek-V3 report, section 2.1.2; Loss-Free Balancing, arXiv 2408.15664.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from dsv3_megatron.model.router import DeepSeekRouter


def routers(chunks: Iterable[torch.nn.Module], num_layers: int) -> Iterator[tuple[int, DeepSeekRouter]]:
    """This rank's routers with their row in the load table: the layer's global 0-based id, MTP depths after them."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DeepSeekRouter):
                assert module.layer_number is not None
                yield module.layer_number - 1 + (num_layers if module.is_mtp_layer else 0), module


def collect_expert_loads(
    chunks: Iterable[torch.nn.Module], *, num_layers: int, num_mtp_layers: int, num_experts: int,
    device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens each expert got on this rank, and balance losses, since the last call; resets the counters.

    To be added up over all ranks. Each token is counted once: ranks of a tensor-parallel group route different parts
    of the sequence, and each layer lives on one pipeline stage.

    Returns:
        loads_LE: int64 [num_layers + num_mtp_layers, E]; rows of dense layers are zero.
        balance_losses_L: fp64 [num_layers + num_mtp_layers], summed over sequences.
    """
    loads_LE = torch.zeros(num_layers + num_mtp_layers, num_experts, dtype=torch.int64, device=device)
    losses_L = torch.zeros(num_layers + num_mtp_layers, dtype=torch.float64, device=device)
    for row, router in routers(chunks, num_layers):
        loads_LE[row] = router.tokens_per_expert
        losses_L[row] = router.balance_loss_sum
        router.tokens_per_expert.zero_()
        router.balance_loss_sum.zero_()
    return loads_LE, losses_L


def update_router_biases(
    chunks: Iterable[torch.nn.Module], loads_LE: torch.Tensor, *, num_layers: int, update_rate: float
) -> None:
    """b_i += rate * sign(mean load - load_i) for every router of this rank; exact, in integers.

    Args:
        chunks: This rank's stages.
        loads_LE: int64, on the stages' device, from `collect_expert_loads`, added up over all ranks.
        num_layers: Transformer layers of the main model, without MTP modules.
        update_rate: gamma; at 0 the biases keep every bit.
    """
    if update_rate == 0:
        return
    with torch.no_grad():
        for row, router in routers(chunks, num_layers):
            load_E = loads_LE[row]
            # sign(mean - load) without a division: E * load against the total.
            direction_E = torch.sign(load_E.sum() - load_E * load_E.numel())
            router.expert_bias += update_rate * direction_E.to(router.expert_bias.dtype)
