"""What routers compute by name: affinities of logits, and balance losses. A new one is one function here.

A function is written in methods of its arguments, which are torch's tensors, so that the settings, which are read
without torch, know what there is. Everything else takes the functions from here, by their names:

    affinities       `moe_router_score_function`: training, generation, the planner's measurements, and the export,
                     which asks whether `config.json` can express the function
    balance losses   `moe_router_load_balancing_type`: training; their weight is `moe_aux_loss_coeff`

Shapes: T tokens, E experts, B sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SCORE_FUNCTIONS: dict[str, Callable[[Any], Any]] = {}
BALANCE_LOSSES: dict[str, Callable[[Any, Any], Any]] = {}


def score_function(function: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Make a function a choice for affinities, under its own name.

    Args:
        function: Takes logits_TE in fp32 or fp64, products of tokens and experts' centroids. Returns affinities in
            their dtype, in 0..1: the choice's bias, the gates (affinities of the chosen experts divided by their sum)
            and the histograms count on it; a sum over experts of 1 is not needed. Its backward pass keeps the result
            and nothing else of this size, which is what the memory estimate has.
    """
    SCORE_FUNCTIONS[function.__name__] = function
    return function


def balance_loss(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Make a function a choice for the balance loss, under its own name.

    Args:
        function: Takes load_BE and share_BE, and returns loss_B, one number a sequence, before its weight. load_BE has
            no gradient: how many of a sequence's tokens have an expert among their best, as a multiple of the mean, so
            that its mean over the experts is 1. share_BE has one: the mean over a sequence's tokens of an expert's
            share of the affinities, so that its sum over the experts is 1. Both are of whole sequences, whatever ranks
            hold parts of them, and fp32 or fp64.
    """
    BALANCE_LOSSES[function.__name__] = function
    return function


@score_function
def sigmoid(logits_TE: Any) -> Any:
    """Sigmoid of each logit. Source: DeepSeek-V3 report, eq. 15."""
    return logits_TE.sigmoid()


@score_function
def softmax(logits_TE: Any) -> Any:
    """Softmax over all experts, before any are chosen. Source: DeepSeek-V2 report, eq. 22."""
    return logits_TE.softmax(-1)


@balance_loss
def seq_aux_loss(load_BE: Any, share_BE: Any) -> Any:
    """Sum over experts of load times share; 1 in perfect balance. Source: DeepSeek-V3 report, eq. 17-20."""
    return (load_BE * share_BE).sum(-1)
