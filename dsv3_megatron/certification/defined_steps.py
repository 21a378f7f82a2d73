"""Optimizer steps by definition, in float64 and plain torch: what one process of the library must compute.

The loss of a step is the mean main cross entropy over the tokens that count, plus lambda / D times the sum of the MTP
losses (each summed over its targets that count and divided by the tokens that count), plus the balance losses as their
mean over sequences. The gradient is clipped by its norm over all parameters, AdamW decays matrices, and the routers'
biases move by the sign of their experts' load. Source: DeepSeek-V3 report, sections 2.1.2, 2.2 and 4.2.

Nothing of how the library computes is used here but the samples and the names of what is noted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dsv3_megatron.certification.defined_update import GradientOfStep, adamw_update
from dsv3_megatron.certification.document_step import DocumentStep, document_step
from dsv3_megatron.certification.random_samples import RandomSamples
from dsv3_megatron.certification.reference import updated_router_bias
from dsv3_megatron.certification.reference_weights import Weights, is_router_bias
from dsv3_megatron.certification.routing_notes import ChoiceKind, Choices, Notes
from dsv3_megatron.certification.weight_names import router_bias_name
from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.config.run import RunConfig


@dataclass(frozen=True)
class DefinedStep:
    """What a step must give. Weights are under the reference's names, rows are those of the load table.

    Attributes:
        lm_loss: Mean main loss over the tokens that count.
        mtp_losses: Sums of the MTP losses over the tokens that count, by depth.
        balance_loss: Balance loss before alpha, mean over sequences and MoE layers; None where there is none.
        grad_norm: Norm of the whole gradient, before it is clipped.
        gradients: float64, not clipped.
        values: Parameters after the step, float64.
        loads: Tokens of each expert, by row.
        biases: fp32, router biases after the step, by row.
    """

    lm_loss: float
    mtp_losses: list[float]
    balance_loss: float | None
    grad_norm: float
    gradients: Weights
    values: Weights
    loads: dict[int, list[int]]
    biases: dict[int, torch.Tensor]


def has_definition(run: RunConfig) -> bool:
    """Whether the plain model covers the run: attention across documents whose positions restart it does not."""
    return run.data.isolates_documents or not run.data.restarts_positions


def defined_steps(run: RunConfig, samples: RandomSamples, weights: Weights, num_steps: int, *, first: int = 1
                  ) -> tuple[list[DefinedStep], Notes]:
    """Take steps from the given weights.

    Args:
        run: A run, of which model, data switches, batch, losses and optimizer count.
        samples: Samples, in the order in which the run takes them.
        weights: float64 weights and router biases before the first of them.
        num_steps: Number of steps to take.
        first: Number of the first of them in the run, counted from 1: its samples are taken. AdamW's moments are zero
            before it.

    Returns:
        The steps, and what their routers saw and chose.
    """
    model, training = run.model, run.training
    history: dict[str, list[GradientOfStep]] = {}
    steps, notes = [], Notes()
    for number in range(first, first + num_steps):
        rows = range((number - 1) * training.global_batch_size, number * training.global_batch_size)
        leaves = {name: value.detach().clone().requires_grad_(not is_router_bias(name))
                  for name, value in weights.items()}
        batch = slice(rows.start, rows.stop)
        result = document_step(
            leaves, model, samples.tokens[batch, :-1], samples.tokens[batch, 1:], samples.mask[batch],
            samples.document_bounds(rows, is_isolated=run.data.isolates_documents),
            mtp_weight=training.mtp_loss_scaling_factor, balance_loss_alpha=training.moe_aux_loss_coeff)
        count = float(samples.mask[batch].sum())
        (result.total / count).backward()
        gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        notes |= _notes(run, result, weights, number, rows)
        norm = float(torch.stack([gradient.norm() for gradient in gradients.values()]).norm())
        weights = dict(weights)
        for name, gradient in gradients.items():
            history.setdefault(name, []).append(GradientOfStep(gradient, norm))
            weights[name] = adamw_update(training, weights[name], history[name], is_decayed=gradient.dim() > 1).value
        loads = {}
        for row, ids_BSK in result.experts.items():
            loads[row] = torch.bincount(ids_BSK.flatten(), minlength=model.num_experts).tolist()
            name = router_bias_name(row)
            weights[name] = updated_router_bias(weights[name].float(), ids_BSK.flatten(0, 1),
                                                training.moe_router_bias_update_rate).double()
        steps.append(DefinedStep(
            lm_loss=float(result.main.detach()) / count,
            mtp_losses=[float(loss.detach()) / count for loss in result.mtp],
            balance_loss=_balance_loss(run, result), grad_norm=norm, gradients=gradients, values=weights, loads=loads,
            biases={row: weights[router_bias_name(row)].float() for row in loads}))
    return steps, notes


def _balance_loss(run: RunConfig, result: DocumentStep) -> float | None:
    alpha = run.training.moe_aux_loss_coeff
    if not alpha or not result.balance:
        return None
    total = float(sum(loss.detach() for loss in result.balance.values()))
    return total / alpha / run.training.global_batch_size / len(result.balance)


def _notes(run: RunConfig, result: DocumentStep, weights: Weights, number: int, rows: range) -> Notes:
    """What `RoutingWatch` would note of this step."""
    model, notes = run.model, Notes()
    for row, scores_BSE in result.scores.items():
        depth = row - model.num_layers
        name = f"MTP layer {depth + 1}" if depth >= 0 else f"layer {row + 1}"
        bias_E = weights[router_bias_name(row)].float()
        kinds = {"experts": (choice_kind(model), bias_E, result.experts[row])}
        if run.training.moe_aux_loss_coeff:
            kinds["balance"] = (ChoiceKind(model.moe_router_topk), torch.zeros_like(bias_E),
                                scores_BSE.detach().topk(model.moe_router_topk, dim=-1).indices)
        for what, (kind, added_E, ids_BSK) in kinds.items():
            noted = notes[f"step {number}", f"{what} of {name}"] = Choices(kind, added_E)
            for index, sample in enumerate(rows):
                for position in range(scores_BSE.shape[1]):
                    noted.scores[sample, position] = scores_BSE[index, position].detach().float()
                    noted.ids[sample, position] = ids_BSK[index, position]
    return notes


def choice_kind(model: ModelConfig) -> ChoiceKind:
    """The way in which the model's routers choose experts."""
    kept = model.moe_router_group_topk
    return ChoiceKind(model.moe_router_topk, model.moe_router_num_groups, kept,
                      model.moe_router_group_score_topk or max(1, model.moe_router_topk // kept))
