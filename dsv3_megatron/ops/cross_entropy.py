"""Cross-entropy per token, alone and fused with the output head in chunks of tokens.

Fused, the fp32 logits of all tokens never exist: each chunk's logits are computed, turned into probabilities in place
and, for backward, kept in the hidden state's dtype (as many bytes as the logits of an unfused head) or recomputed.
Keeping saves one of four products over the vocabulary and the exponentials of backward; above `_KEPT_BYTES` "auto"
recomputes.

Shapes: T tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch

from dsv3_megatron.ops.backend import choose_product_backend, wide_dtype
from dsv3_megatron.ops.linear import add_product_, main_grad_of, mark_added_to_main_grad
from dsv3_megatron.ops.recompute import saving
from dsv3_megatron.ops.softmax import softmax_and_logsumexp_

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
) -> torch.Tensor:
    """-log softmax(hidden W^T)[target] of each token, in nats.

    Args:
        hidden: [..., H], bf16, fp32 or fp64.
        weight_VH: The whole vocabulary's rows, same dtype.
        targets: int64 [...], 0..V-1. Mask a token by its loss's weight: a zero gradient costs nothing else.
        keep_probabilities: Keep T V numbers of hidden's dtype for backward; None keeps up to 1 GiB.
        chunk_tokens: Tokens at a time; a chunk's fp32 logits should stay in the last-level cache.
        product_backend: See `backend.choose_product_backend`.
        accumulate_into_main_grad: As for `linear.linear`.

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
    plan = (chunk_tokens, keep_probabilities, backend, accumulate_into_main_grad)
    with saving():
        losses = _LinearCrossEntropy.apply(hidden.reshape(-1, hidden.shape[-1]), weight_VH, targets.reshape(-1), plan)
    return losses.view(targets.shape)


def token_cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """-log softmax(logits)[target] of each token, in nats: fp32 [...] (fp64 from fp64).

    Keeps the logits as they are and one number a token for backward.

    Args:
        logits: [..., V], any float dtype.
        targets: int64 [...].
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
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, plan: tuple[int, bool, str, bool]
    ) -> torch.Tensor:
        chunk_tokens, keep, backend, _ = plan
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
        chunk_tokens, _, _, accumulate = ctx.plan
        rows, wide_weight = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        num_tokens, vocab = hidden.shape[0], weight.shape[0]
        grad_losses = grads[0].to(logsumexps.dtype).unsqueeze(1)
        main_grad = main_grad_of(ctx.weight, accumulate)
        total = logsumexps.new_zeros(weight.shape) if main_grad is None else main_grad
        grad_rows = torch.empty_like(rows)
        buffer = logsumexps.new_empty((min(chunk_tokens, num_tokens), vocab))
        for start in range(0, num_tokens, chunk_tokens):
            part = slice(start, min(start + chunk_tokens, num_tokens))
            grad_logits = buffer[: part.stop - start]
            if kept is not None:
                torch.mul(kept[part], grad_losses[part], out=grad_logits)
            else:
                _logits(rows[part], wide_weight, grad_logits).sub_(logsumexps[part, None]).exp_()
                grad_logits.mul_(grad_losses[part])
            grad_logits.scatter_add_(1, targets[part, None], -grad_losses[part])
            narrow = grad_logits.to(ctx.dtype)
            torch.mm(narrow, wide_weight, out=grad_rows[part])
            if ctx.needs_input_grad[1]:
                add_product_(total, narrow.t(), rows[part])
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = total.to(weight.dtype) if main_grad is None else mark_added_to_main_grad(ctx.weight)
        return grad_rows.to(hidden.dtype), grad_weight, None, None


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
