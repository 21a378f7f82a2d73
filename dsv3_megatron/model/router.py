"""DeepSeek-V3's router: affinities (sigmoid in V3), biased choice, node-limited groups, unbiased gates.

Differs from Megatron-Core's router in that expert loads are counted in integers (a rounded count can
flip the sign of a bias update), and in that the balance loss of a sequence that is split over ranks is a function of
the whole sequence's loads and affinities, any function of them, without a factor to undo.

Shapes: T tokens of this rank, E experts, K top-k, G groups, B micro-batch, s local sequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from dsv3_megatron.config.router_functions import BALANCE_LOSSES
from dsv3_megatron.config.run import RunConfig
from dsv3_megatron.model.observation import RouterObserver
from dsv3_megatron.ops.recompute import recomputed, saving
from dsv3_megatron.ops.router_scores import router_scores
from dsv3_megatron.ops.steady_sums import in_whole_vectors
from dsv3_megatron.parallel.sequence_parts import SequenceParts


@dataclass(frozen=True)
class RouterOptions:
    """What Megatron-Core's configuration has no field for, or what its own router would apply a second time.

    Attributes:
        balance_loss_coeff: alpha of the balance loss.
        balance_loss: Name of the balance loss in `config/router_functions.py`.
        group_score_topk: Best experts summed to a group's score; None: top-k / groups kept.
        group_mask: "exclude" or "zero", see `choose_experts`.
        score_function: Name of the function that makes affinities of logits, in `config/router_functions.py`.
    """

    balance_loss_coeff: float = 0.0
    balance_loss: str = "seq_aux_loss"
    group_score_topk: int | None = None
    group_mask: str = "exclude"
    score_function: str = "sigmoid"

    @classmethod
    def of(cls, run: RunConfig) -> RouterOptions:
        """The options that a run's configuration asks for."""
        return cls(run.training.moe_aux_loss_coeff, run.training.moe_router_load_balancing_type,
                   run.model.moe_router_group_score_topk, run.model.moe_router_group_mask,
                   run.model.moe_router_score_function)


class _AttachLoss(torch.autograd.Function):
    """Pass an activation through; in backward, also run the backward of a scalar loss with weight 1."""

    @staticmethod
    def forward(ctx: Any, activation: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
        ctx.loss_dtype = loss.dtype
        return activation.view_as(activation)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return grads[0], torch.ones((), dtype=ctx.loss_dtype, device=grads[0].device)


def choose_experts(
    scores_TE: torch.Tensor, bias_E: torch.Tensor, *, top_k: int, num_groups: int, group_top_k: int,
    group_score_topk: int | None = None, group_mask: str = "exclude",
) -> torch.Tensor:
    """Choose each token's experts by their biased affinities, from its best groups.

    Args:
        scores_TE: fp32 affinities in 0..1.
        bias_E: fp32 balancing bias.
        top_k: Experts per token, 1..E.
        num_groups: Groups of experts; 1: no node limit.
        group_top_k: Groups a token may go to.
        group_score_topk: Biased affinities, a group's best, that are summed to its score. None: top_k / group_top_k,
            at least 1, as in the report; Transformers and DeepSeek's code always sum 2, which is V3's 8 / 4.
        group_mask: "exclude" keeps the experts of other groups out whatever their affinity, as DeepSeek's code and
            Megatron-Core do. "zero" ranks them with a biased affinity of 0, as Transformers did before its change
            45441 of 2026: where a kept group's is negative they are chosen before it, and the node limit is broken.

    Returns:
        expert_ids_TK: int64, global ids, best biased affinity first; without gradient.

    Source: DeepSeek-V3 report, section 2.1.2, eq. 14 and 16; biased group scores as in the published code.
    """
    with torch.no_grad():
        biased_TE = scores_TE + bias_E
        if num_groups > 1:
            biased_TGE = biased_TE.view(len(biased_TE), num_groups, -1)
            best = group_score_topk or max(1, top_k // group_top_k)
            group_scores_TG = biased_TGE.topk(best, dim=-1).values.sum(-1)
            kept_ids = group_scores_TG.topk(group_top_k, dim=-1).indices
            dropped_TG = torch.ones_like(group_scores_TG, dtype=torch.bool).scatter_(1, kept_ids, False)
            fill = {"exclude": float("-inf"), "zero": 0.0}[group_mask]
            biased_TGE.masked_fill_(dropped_TG.unsqueeze(-1), fill)
        return biased_TE.topk(top_k, dim=-1).indices


def weigh_experts(scores_TE: torch.Tensor, expert_ids_TK: torch.Tensor, route_scale: float) -> torch.Tensor:
    """Weights of the chosen experts: their affinities, without bias, divided by their sum.

    Args:
        scores_TE: fp32 affinities in 0..1.
        expert_ids_TK: int64, the chosen experts.
        route_scale: Dimensionless gate multiplier.

    Returns:
        gates_TK: fp32; each row sums to route_scale.

    Source: DeepSeek-V3 report, section 2.1.2, eq. 13.
    """
    chosen_TK = scores_TE.gather(1, expert_ids_TK)
    return chosen_TK / (chosen_TK.sum(-1, keepdim=True) + 1e-20) * route_scale


def select_experts(scores_TE: torch.Tensor, bias_E: torch.Tensor, *, route_scale: float, **choice: Any
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts and weigh them; the bias affects the choice, not the weight.

    Args:
        scores_TE: fp32 affinities in 0..1.
        bias_E: fp32 balancing bias, no gradient.
        route_scale: Dimensionless gate multiplier.
        choice: Settings of `choose_experts`.

    Returns:
        gates_TK: fp32; each row sums to route_scale.
        expert_ids_TK: int64, global ids, best biased affinity first.

    Source: DeepSeek-V3 report, section 2.1.2, eq. 12-16.
    """
    expert_ids_TK = choose_experts(scores_TE, bias_E, **choice)
    return weigh_experts(scores_TE, expert_ids_TK, route_scale), expert_ids_TK


class DeepSeekRouter(MegatronModule):
    """Gate of one MoE layer, with its balancing bias and the load it has seen since the last update.

    Attributes:
        weight: [E, H], one centroid per expert.
        expert_bias: fp32 [E], changed by `optim/router_bias.py` only, saved with the model.
        tokens_per_expert: int64 [E], tokens routed in training forwards since the last update.
        balance_loss_sum: fp32 scalar, balance loss (alpha included) of the sequences seen since then;
            this rank's term where it has a part of the sequences.
        tokens_per_sequence: What a sequence's balance loss is multiplied by in backward, so that it counts as the mean
            over sequences where gradients of a sum over tokens are divided by the number of tokens: these tokens over
            all sequences, by `weigh_balance_losses`. None: the sequence's length, where every token
            counts.
        observer: Looks at the training forwards while it is set; no part of the model.
        is_steady: A token's affinities have the bits that generation gives them, as they do without gradients.
    """

    is_steady = False
    expert_bias: torch.Tensor
    tokens_per_expert: torch.Tensor
    balance_loss_sum: torch.Tensor

    def __init__(self, config: TransformerConfig, pg_collection: ProcessGroupCollection | None = None,
                 is_mtp_layer: bool = False, *, options: RouterOptions | None = None) -> None:
        super().__init__(config=config)
        assert pg_collection is not None, "process groups are passed, never global"
        # The ranks that have a part of each sequence.
        self.parts, self.tp_group = SequenceParts.of(pg_collection), pg_collection.tp
        self.sequence_group = pg_collection.tp_cp if self.parts.size > 1 else self.tp_group
        self.is_mtp_layer = is_mtp_layer
        self.options = options or RouterOptions()
        self.balance_loss_coeff = self.options.balance_loss_coeff
        self.tokens_per_sequence: float | None = None
        self.layer_number: int | None = None
        self.observer: RouterObserver | None = None
        # The CPU in a run without CUDA (platform/cpu.py), and meta inside platform.meta_device().
        device, experts = torch.cuda.current_device(), config.num_moe_experts
        self.weight = torch.nn.Parameter(
            torch.empty(experts, config.hidden_size, dtype=config.params_dtype, device=device))
        # Each tensor-parallel rank sees a part of the sequence. Megatron-Core adds up, over these ranks, the gradients
        # of parameters with this mark.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32, device=device))
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=torch.int64, device=device),
                             persistent=False)
        self.register_buffer("balance_loss_sum", torch.zeros((), dtype=torch.float32, device=device),
                             persistent=False)

    def set_layer_number(self, layer_number: int) -> None:
        """Called by Megatron-Core's layer with its 1-based number (of the MTP depth in an MTP module)."""
        self.layer_number = layer_number

    def forward(self, x_sBH: torch.Tensor, padding_mask: torch.Tensor | None = None
                ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose the experts and the gates of each token.

        Returns:
            probs_TE: gates at the chosen experts, 0 elsewhere; fp32.
            routing_map_TE: bool, the chosen experts.
        """
        assert padding_mask is None, "padded tokens are not supported"
        length, batch = x_sBH.shape[:2]
        scores_TE, gates_TK, ids_TK = self.choose(x_sBH.flatten(0, 1))
        routing_map_TE = torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, ids_TK, True)
        probs_TE = torch.zeros_like(scores_TE).scatter(1, ids_TK, gates_TK)
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                # Not bincount: on a GPU the host waits for the largest id.
                one = self.tokens_per_expert.new_ones(())
                self.tokens_per_expert.index_add_(0, ids_TK.flatten(), one.expand(ids_TK.numel()))
            if self.observer is not None:
                self.observer.observe(scores_TE, ids_TK)
            if self.balance_loss_coeff > 0:
                loss = self._balance_loss(scores_TE.unflatten(0, (length, batch)))
                # The run's loss is a sum over tokens, which is divided by their number; this is a sum over sequences.
                weight = self.tokens_per_sequence
                probs_TE = _AttachLoss.apply(
                    probs_TE, loss * (length * self.sequence_group.size() if weight is None else weight))
                # Ranks that share a sequence have the loss of all of it, and are added up.
                self.balance_loss_sum += loss.detach() / self.sequence_group.size()
        return probs_TE, routing_map_TE

    def choose(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Affinities of tokens to all experts, and the choice by `choose_experts`.

        Returns:
            scores_TE: fp32 (fp64 for fp64 x), in 0..1.
            gates_TK: Likewise; weights of the chosen experts.
            ids_TK: int64, the chosen experts.
        """
        wide = torch.promote_types(x_TH.dtype, torch.float32)
        # Wide copies of narrow tensors are made again in backward rather than kept beside them.
        widen = partial(torch.Tensor.to, dtype=wide)
        wide_TH, weight_EH = (narrow if narrow.dtype == wide else recomputed(widen, narrow)
                              for narrow in (x_TH, self.weight))
        with saving():
            scores_TE = self.scores(torch.nn.functional.linear(wide_TH, weight_EH))
        return scores_TE, *self.select(scores_TE)

    def scores(self, logits_TE: torch.Tensor) -> torch.Tensor:
        """scores_TE of logits, by the model's score function."""
        scores = partial(router_scores, score_function=self.options.score_function)
        if self.is_steady or not torch.is_grad_enabled():
            return in_whole_vectors(scores, logits_TE)
        return scores(logits_TE)

    def select(self, scores_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """gates_TK and ids_TK of affinities: the choice and its weights."""
        ids_TK = self.best_experts(scores_TE)
        return weigh_experts(scores_TE, ids_TK, self.config.moe_router_topk_scaling_factor or 1.0), ids_TK

    def best_experts(self, scores_TE: torch.Tensor) -> torch.Tensor:
        """ids_TK: the experts that tokens go to, by `choose_experts`."""
        config = self.config
        return choose_experts(
            scores_TE, self.expert_bias.float(), top_k=config.moe_router_topk,
            num_groups=config.moe_router_num_groups or 1, group_top_k=config.moe_router_group_topk or 1,
            group_score_topk=self.options.group_score_topk, group_mask=self.options.group_mask)

    def best_unbiased(self, scores_sBE: torch.Tensor) -> torch.Tensor:
        """ids_sBK: the experts that the balance loss counts, without bias and group limit; no gradient."""
        with torch.no_grad():
            return scores_sBE.topk(self.config.moe_router_topk, dim=-1).indices

    def _balance_loss(self, scores_sBE: torch.Tensor) -> torch.Tensor:
        """Sum over the micro-batch's sequences of alpha times their balance loss; gradients go to this rank's tokens.

        Loads count plain top-k of the unbiased affinities, without the group limit, and have no gradient.
        Source: DeepSeek-V3 report, eq. 18-20; `config/router_functions.py` has what is made of them, eq. 17.
        """
        config, num_ranks = self.config, self.sequence_group.size()
        total_length = scores_sBE.shape[0] * num_ranks
        share_BE = (scores_sBE / (scores_sBE.sum(-1, keepdim=True) + 1e-20)).sum(0) / total_length
        with torch.no_grad():
            chosen_BE = torch.zeros_like(scores_sBE).scatter_(-1, self.best_unbiased(scores_sBE), 1.0).sum(0)
            if num_ranks > 1:
                both_2BE = torch.stack((chosen_BE, share_BE))
                torch.distributed.all_reduce(both_2BE, group=self.sequence_group)
                chosen_BE, whole_BE = both_2BE
            load_BE = chosen_BE * (config.num_moe_experts / (config.moe_router_topk * total_length))
        if num_ranks > 1:
            # The value is the whole sequence's; each rank's tokens get the gradient through their own part of the sum.
            share_BE = whole_BE + (share_BE - share_BE.detach())
        loss_B = BALANCE_LOSSES[self.options.balance_loss](load_BE, share_BE)
        return self.balance_loss_coeff * loss_B.sum()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Keep the bias and the sums in fp32 when the model is converted to bf16."""
        bias, losses = self.expert_bias, self.balance_loss_sum
        super()._apply(fn, recurse)
        if self.expert_bias.dtype != torch.float32:
            self.expert_bias = bias.to(self.expert_bias.device)
            self.balance_loss_sum = losses.to(self.expert_bias.device)
        return self


def weigh_balance_losses(chunks: Iterable[torch.nn.Module], *, num_tokens: int, num_sequences: int) -> None:
    """Let the balance losses of the step to come count as their mean over sequences.

    A step's gradients are those of a sum over tokens, divided by the tokens that count. So a sequence's balance loss is
    multiplied by these tokens and divided by the sequences, whatever is masked in it or in others.

    Args:
        chunks: This rank's stages.
        num_tokens: Tokens of the step that its gradients are divided by, over all ranks; where there are none, it is 1.
        num_sequences: Sequences of the step, over all ranks.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, DeepSeekRouter):
                module.tokens_per_sequence = max(num_tokens, 1) / num_sequences
