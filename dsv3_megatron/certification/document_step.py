"""What a global batch must give by definition: the reference on each document alone, put together.

A document is a whole sequence where documents are not kept apart.

The sequences' balance losses and the routing are those of the packed sequence, from the scores of its documents in
their order.

Legend: B sequences, S positions, T tokens of a document, E experts, K experts per token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_megatron.certification.reference import Weights, losses, sequence_balance_loss
from dsv3_megatron.config.model import ModelConfig

Bounds = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class DocumentStep:
    """Sums over the tokens of a batch, and what its routers saw and chose.

    Attributes:
        main: Main loss.
        mtp: MTP losses by depth, not yet weighed.
        balance: Balance losses of all sequences, alpha included, by layer; MTP modules at num_layers + depth - 1.
        experts: Chosen experts [B, S, K] in ascending order, by layer.
        scores: Affinities [B, S, E] likewise.
        total: Sum that a step differentiates, times the tokens that the mask counts: main loss + lambda / D * MTP
            losses of the tokens, and the balance losses as their mean over sequences, whatever is masked (eq. 20).
    """

    main: torch.Tensor
    mtp: list[torch.Tensor]
    balance: dict[int, torch.Tensor]
    experts: dict[int, torch.Tensor]
    scores: dict[int, torch.Tensor]
    total: torch.Tensor


def document_step(weights: Weights, model: ModelConfig, tokens_BS: torch.Tensor, labels_BS: torch.Tensor,
                  mask_BS: torch.Tensor, bounds: Bounds, *, mtp_weight: float, balance_loss_alpha: float
                  ) -> DocumentStep:
    """Compute the reference's forward passes of every document by itself; those of one length go together.

    Args:
        weights: Weights under the names of the published checkpoint.
        model: Architecture of the model.
        tokens_BS: int64 token ids.
        labels_BS: int64, the token after each.
        mask_BS: 1 where a label counts.
        bounds: Ends of the documents of each sequence: 0 = b_0 < ... < b_n = S.
        mtp_weight: Weight lambda of the MTP losses.
        balance_loss_alpha: Weight alpha of the balance losses.
    """
    main, mtp = torch.zeros((), dtype=torch.float64), [torch.zeros((), dtype=torch.float64)] * model.mtp_num_layers
    by_length: dict[int, list[tuple[int, int]]] = {}
    for row, starts in enumerate(bounds):
        for start, end in zip(starts, starts[1:], strict=False):
            by_length.setdefault(end - start, []).append((row, start))
    # Of each layer, affinities and choices by the place of a document.
    scores: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
    experts: dict[int, dict[tuple[int, int], torch.Tensor]] = {}
    for length, places in by_length.items():
        def parts(values_BS: torch.Tensor, length: int = length, places: list[tuple[int, int]] = places
                  ) -> torch.Tensor:
            return torch.stack([values_BS[row, start:start + length] for row, start in places])

        mask = parts(mask_BS)
        result = losses(weights, model, parts(tokens_BS), parts(labels_BS), mask, balance_loss_alpha=0.0,
                        mtp_mean_over="main")
        count = mask.sum().clamp(min=1)  # the reference divides by it
        main = main + result.lm_loss * count
        mtp = [total + loss * count for total, loss in zip(mtp, result.mtp_losses, strict=True)]
        for layer, routing in result.routings.items():
            for place, scores_SE, ids_SK in zip(places, routing.scores_TE.unflatten(0, (len(places), length)),
                                                routing.expert_ids_TK.unflatten(0, (len(places), length)), strict=True):
                scores.setdefault(layer, {})[place] = scores_SE
                experts.setdefault(layer, {})[place] = ids_SK
    batch = len(tokens_BS)
    whole_scores = {layer: _packed(found, batch) for layer, found in sorted(scores.items())}
    balance = {layer: batch * sequence_balance_loss(scores_BSE, top_k=model.moe_router_topk, alpha=balance_loss_alpha)
               for layer, scores_BSE in whole_scores.items()}
    total = main + mtp_weight / max(1, len(mtp)) * sum(mtp) + mask_BS.sum() * sum(balance.values()) / batch
    return DocumentStep(main, mtp, balance,
                        {layer: _packed(found, batch).sort(-1).values for layer, found in sorted(experts.items())},
                        whole_scores, total)


def _packed(documents: dict[tuple[int, int], torch.Tensor], batch: int) -> torch.Tensor:
    """Values [B, S, ...] of sequences from those of their documents [S, ...], by row and start."""
    return torch.stack([torch.cat([documents[place] for place in sorted(documents) if place[0] == row])
                        for row in range(batch)])
