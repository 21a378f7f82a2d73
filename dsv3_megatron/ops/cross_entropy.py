"""Cross-entropy per token, alone and fused with the output head in chunks of tokens.

Fused, the fp32 logits of all tokens never exist: each chunk's logits are computed, turned into probabilities in place
and, for backward, kept in the hidden state's dtype (as many bytes as the logits of an unfused head) or recomputed.
Keeping saves one of four products over the vocabulary and the exponentials of backward; above `_KEPT_BYTES` "auto"
recomputes.

Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype
from dsv3_megatron.ops.linear import (
    DeferredWeightGrad,
    WeightGradDeferral,
    add_product_,
    add_to_grad,
    main_grad_of,
    mark_added_to_main_grad,
)
from dsv3_megatron.ops.recompute import saving
from dsv3_megatron.ops.softmax import softmax_and_logsumexp_

# Tokens at a time, whether to keep probabilities, backend of the products, accumulation, deferral.
_Plan = tuple[int, bool, str, bool, WeightGradDeferral | None]

_CHUNK_TOKENS = 256
_KEPT_BYTES = 1 << 30


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight_VH: torch.Tensor,
    targets: torch.Tensor,
    *,
    keep_probabilities: bool | None = None,
    chunk_tokens: int = _CHUNK_TOKENS,
    product_backend: str = "auto",
    accumulate_into_main_grad: bool = False,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """-log softmax(hidden W^T)[target] of each token, in nats.

    Args:
        hidden: [..., H], bf16, fp32 or fp64.
        weight_VH: The whole vocabulary's rows, same dtype.
        targets: int64 [...], 0..V-1. Mask a token by its loss's weight: a zero gradient costs nothing else.
        keep_probabilities: Keep T V numbers of hidden's dtype for backward; None keeps up to 1 GiB.
        chunk_tokens: Tokens at a time; a chunk's fp32 logits should stay in the last-level cache.
        product_backend: "auto", "native" or "via_fp32", as `backend.choose_product_backend` takes it.
        accumulate_into_main_grad: Add the weight gradient to `weight_VH.main_grad`, as in `linear.linear`.
        defer_weight_grad: Gets the function that computes the weight gradient, as in `linear.linear`. What forward kept
            is held until then, and the gradients of the logits are computed a second time, from kept probabilities
            without a product.

    Returns:
        fp32 [...] (fp64 from fp64).

    Raises:
        ValueError: Targets and hidden states of different shape, or `chunk_tokens` below 1.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} must have the shape of hidden {tuple(hidden.shape)} "
            "without its last dimension; bring both into one layout"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; the default is {_CHUNK_TOKENS}")
    if keep_probabilities is None:
        keep_probabilities = targets.numel() * weight_VH.shape[0] * hidden.element_size() <= _KEPT_BYTES
    backend = choose_product_backend(product_backend, hidden.device, hidden.dtype)
    plan = (chunk_tokens, keep_probabilities, backend, accumulate_into_main_grad, defer_weight_grad)
    with saving():
        losses = _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight_VH, targets.reshape(-1), plan)
    return losses.view(targets.shape)


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each token, in nats: fp32 [...] (fp64 from fp64).

    Keeps the logits as they are and one number a token for backward.

    Args:
        logits: [..., V], any float dtype.
        targets: Id of the right token at each place, int64 [...].
    """
    return _TokenCrossEntropy.apply(logits, targets)


def reference_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The formula, in fp32 or fp64."""
    log_probabilities = logits.to(wide_dtype(logits.dtype)).log_softmax(dim=-1)
    return -log_probabilities.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _logits(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == rows.dtype:
        return torch.mm(rows, weight.t(), out=out)
    return out.copy_(torch.mm(rows, weight.t()))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, plan: _Plan
    ) -> torch.Tensor:
        chunk_tokens, keep, backend, _accumulate, _defer = plan
        wide = wide_dtype(hidden.dtype)
        dtype = wide if backend == "via_fp32" else hidden.dtype
        rows, wide_weight = hidden.to(dtype), weight.to(dtype)
        num_tokens, vocab = hidden.shape[0], weight.shape[0]
        losses = torch.empty(num_tokens, dtype=wide, device=hidden.device)
        kept = torch.empty((num_tokens, vocab), dtype=hidden.dtype, device=hidden.device) if keep else None
        # Kept probabilities of the wide dtype are computed where they stay, others in one buffer for all chunks.
        in_place = kept is not None and kept.dtype == wide
        scratch = kept if in_place else losses.new_empty((min(chunk_tokens, num_tokens), vocab))
        assert scratch is not None
        logsumexps = torch.empty_like(losses)
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, min(start + chunk_tokens, num_tokens))
            scores = _logits(rows[part], wide_weight, scratch[part] if in_place else scratch[: part.stop - start])
            losses[part] = scores.gather(1, targets[part, None]).squeeze(1)
            logsumexps[part] = softmax_and_logsumexp_(scores)
            if kept is not None and not in_place:
                kept[part] = scores
        ctx.save_for_backward(hidden, weight, targets, logsumexps, kept)
        ctx.plan, ctx.dtype, ctx.weight = plan, dtype, weight
        return torch.sub(logsumexps, losses, out=losses)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, logsumexps, kept = ctx.saved_tensors
        chunk_tokens, _keep, _backend, accumulate, defer = ctx.plan
        logits = _LogitGradients(hidden, weight, targets, logsumexps, kept, grads[0], chunk_tokens, ctx.dtype)
        needs_weight = ctx.needs_input_grad[1]
        if needs_weight and defer is None:
            grad_hidden, grad_weight = _hidden_and_weight_grad(logits, ctx.weight, accumulate, needs_hidden=True)
            if grad_weight is None:
                mark_added_to_main_grad(ctx.weight)
            return grad_hidden, grad_weight, None, None
        grad_hidden, _ = _hidden_and_weight_grad(logits, None, accumulate, needs_hidden=True)
        if needs_weight:
            defer(DeferredWeightGrad(_add_deferred, logits, ctx.weight, accumulate))
        return grad_hidden, None, None, None


@dataclass(frozen=True)
class _LogitGradients:
    """Gradients of the logits, a chunk of tokens at a time, from what forward kept."""

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    logsumexps: torch.Tensor
    kept: torch.Tensor | None
    grad_losses: torch.Tensor
    chunk_tokens: int
    dtype: torch.dtype

    def chunks(self, rows: torch.Tensor, wide_weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(tokens, their gradients [tokens, V] in the products' dtype, in a buffer that the next chunk overwrites).

        Args:
            rows: Hidden states in the products' dtype.
            wide_weight: Weight in the products' dtype, [V, H].
        """
        num_tokens, vocab = self.hidden.shape[0], self.weight.shape[0]
        grad_losses = self.grad_losses.to(self.logsumexps.dtype).unsqueeze(1)
        buffer = self.logsumexps.new_empty((min(self.chunk_tokens, num_tokens), vocab))
        for start in range(0, num_tokens, self.chunk_tokens):
            part = slice(start, min(start + self.chunk_tokens, num_tokens))
            grad_logits = buffer[: part.stop - start]
            if self.kept is not None and self.kept.dtype != grad_logits.dtype:
                grad_logits.copy_(self.kept[part]).mul_(grad_losses[part])  # `mul` would make a wide copy
            elif self.kept is not None:
                torch.mul(self.kept[part], grad_losses[part], out=grad_logits)
            else:
                _logits(rows[part], wide_weight, grad_logits).sub_(self.logsumexps[part, None]).exp_()
                grad_logits.mul_(grad_losses[part])
            grad_logits.scatter_add_(1, self.targets[part, None], -grad_losses[part])
            yield part, grad_logits.to(self.dtype)


def _hidden_and_weight_grad(
    logits: _LogitGradients, weight: torch.Tensor | None, accumulate: bool, *, needs_hidden: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the hidden states and of `weight`, if given: None where its `main_grad` took it."""
    rows, wide_weight = logits.hidden.to(logits.dtype), logits.weight.to(logits.dtype)
    grad_rows = torch.empty_like(rows) if needs_hidden else None
    main_grad = None if weight is None else main_grad_of(weight, accumulate)
    total = main_grad
    if weight is not None and main_grad is None:
        total = logits.logsumexps.new_zeros(weight.shape)
    for part, narrow in logits.chunks(rows, wide_weight):
        if grad_rows is not None:
            torch.mm(narrow, wide_weight, out=grad_rows[part])
        if total is not None:
            add_product_(total, narrow.t(), rows[part])
    grad_hidden = None if grad_rows is None else grad_rows.to(logits.hidden.dtype)
    own = None if weight is None or main_grad is not None or total is None else total.to(weight.dtype)
    return grad_hidden, own


def _add_deferred(logits: _LogitGradients, weight: torch.Tensor, accumulate: bool) -> None:
    add_to_grad(weight, _hidden_and_weight_grad(logits, weight, accumulate, needs_hidden=False)[1])


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        wide = logits.to(wide_dtype(logits.dtype))
        logsumexps = wide.logsumexp(dim=-1)
        ctx.save_for_backward(logits, targets, logsumexps)
        return logsumexps - wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        logits, targets, logsumexps = ctx.saved_tensors
        grad_losses = grads[0].to(logsumexps.dtype).unsqueeze(-1)
        grad = logits.to(logsumexps.dtype).sub(logsumexps.unsqueeze(-1)).exp_().mul_(grad_losses)
        grad.scatter_add_(-1, targets.unsqueeze(-1), -grad_losses)
        return grad.to(logits.dtype), None
