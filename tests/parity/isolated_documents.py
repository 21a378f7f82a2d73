"""What isolated documents must give: the reference on each document alone, put together.

The sequences' balance losses and the routing are those of the packed sequence, from the scores of its documents in
their order.

Legend: B sequences, S positions, T tokens of a document, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_megatron.config.model import ModelConfig
from tests.parity.architectures import BALANCE_LOSS_ALPHA, MTP_LAMBDA
from tests.reference import Routing, Weights, losses, sequence_balance_loss

Bounds = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DocumentStep:
    """Sums over the tokens of a batch, and what its routers chose.

    Attributes:
        main: Main loss.
        mtp: MTP losses by depth, before their weight.
        balance: Balance losses of all sequences, alpha included, by layer; MTP modules at num_layers + depth - 1.
        experts: Chosen experts [B, S, K] in ascending order, by layer.
        total: What a step differentiates, times the tokens that the mask counts: main loss + lambda / D * MTP losses of
            the tokens, and the balance losses as their mean over sequences, whatever is masked (eq. 20).
    """

    main: torch.Tensor
    mtp: list[torch.Tensor]
    balance: dict[int, torch.Tensor]
    experts: dict[int, torch.Tensor]
    total: torch.Tensor


def document_step(weights: Weights, model: ModelConfig, tokens_BS: torch.Tensor, labels_BS: torch.Tensor,
                  mask_BS: torch.Tensor, bounds: Bounds) -> DocumentStep:
    """The reference's forward passes of every document by itself."""
    main, mtp = torch.zeros((), dtype=torch.float64), [torch.zeros((), dtype=torch.float64)] * model.mtp_num_layers
    routings: list[list[dict[int, Routing]]] = []
    for row, starts in enumerate(bounds):
        routings.append([])
        for start, end in zip(starts, starts[1:], strict=False):
            part = (slice(row, row + 1), slice(start, end))
            result = losses(weights, model, tokens_BS[part], labels_BS[part], mask_BS[part], balance_loss_alpha=0.0,
                            mtp_mean_over="main")
            count = mask_BS[part].sum().clamp(min=1)  # the reference divides by it
            main = main + result.lm_loss * count
            mtp = [total + loss * count for total, loss in zip(mtp, result.mtp_losses, strict=True)]
            routings[-1].append(result.routings)
    layers = routings[0][0].keys()
    scores = {layer: torch.stack([torch.cat([part[layer].scores_TE for part in row]) for row in routings])
              for layer in layers}
    experts = {layer: torch.stack([torch.cat([part[layer].expert_ids_TK for part in row]) for row in routings])
               for layer in layers}
    batch = len(tokens_BS)
    balance = {layer: batch * sequence_balance_loss(scores_BSE, top_k=model.moe_router_topk, alpha=BALANCE_LOSS_ALPHA)
               for layer, scores_BSE in scores.items()}
    total = main + MTP_LAMBDA / max(1, len(mtp)) * sum(mtp) + mask_BS.sum() * sum(balance.values()) / batch
    return DocumentStep(main, mtp, balance, {layer: ids.sort(-1).values for layer, ids in experts.items()}, total)
