"""Cross-entropy per token, alone and together with the output head, whose logits of all tokens never exist.

The head with its loss has two ways: "fused", of Triton kernels that keep logits in registers, and "chunked", the
reference, of torch alone. Both can have the vocabulary split over tensor-parallel ranks, which then tell one another
three numbers a token. The main head and the MTP modules' are calls of one function with one weight.

Shapes: T tokens, H hidden, V vocabulary, v its part on this tensor-parallel rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dsv3_megatron.ops.backend import choose_product_backend, log_choice, unknown_backend, wide_dtype
from dsv3_megatron.ops.chunked_head_loss import ChunkedGradients, chunked_scores
from dsv3_megatron.ops.fused_head_loss import fused_gradients, fused_scores
from dsv3_megatron.ops.head_loss_choices import BACKENDS, KEPT_BYTES, choose_head_loss, chunk_tokens_on
from dsv3_megatron.ops.linear import (
    DeferredWeightGrad,
    WeightGradDeferral,
    add_to_grad,
    main_grad_of,
    mark_added_to_main_grad,
)
from dsv3_megatron.ops.local_scores import is_among, over_ranks
from dsv3_megatron.ops.recompute import saving
from dsv3_megatron.ops.steady_sums import LEAST_ROWS

# A target that counts nothing, as torch has it.
IGNORED = -100
# On a CPU the tokens that count are chosen first where they are up to this share of all, so many at least.
_WORTH_CHOOSING, _ROWS_AT_ONCE = 0.75, LEAST_ROWS


@dataclass(frozen=True)
class _Plan:
    """How one call is computed.

    Attributes:
        is_fused: Whether the kernels compute it, which use none of the next three, nor `defer`.
        keep: Keep probabilities.
        chunk_tokens: Tokens at a time.
        dtype: Dtype of the products' operands.
        accumulate: Add the weight gradient to the main gradient.
        defer: Gets the weight gradient's computation.
        group: Ranks that the vocabulary is split over, or None.
    """

    is_fused: bool
    keep: bool
    chunk_tokens: int
    dtype: torch.dtype
    accumulate: bool
    defer: WeightGradDeferral | None
    group: Any

    def own(self, targets: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Targets counted from this rank's first row."""
        return targets if self.group is None else targets - self.group.rank() * weight.shape[0]


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight_vH: torch.Tensor,
    targets: torch.Tensor,
    *,
    backend: str = "auto",
    vocabulary_group: Any = None,
    keep_probabilities: bool | None = None,
    chunk_tokens: int | None = None,
    product_backend: str = "auto",
    accumulate_into_main_grad: bool = False,
    defer_weight_grad: WeightGradDeferral | None = None,
) -> torch.Tensor:
    """-log softmax(hidden W^T)[target] of each token, in nats.

    On a CPU, where many are ignored, the head multiplies the others alone; a GPU's host would wait for their number.

    Args:
        hidden: [..., H], bf16, fp32 or fp64; the same on all ranks of `vocabulary_group`.
        weight_vH: This rank's rows of the vocabulary, without a group all of them, same dtype.
        targets: int64 [...], 0..V-1, or -100: loss 0, no gradient. A token can also be masked by its loss's weight: a
            zero gradient costs nothing else.
        backend: "fused", "chunked" or "auto", which `head_loss_choices.choose_head_loss` resolves.
        vocabulary_group: Ranks over which the vocabulary's rows are split in order, as many on each; all of them call.
            The gradient of `hidden` is then this rank's part of a sum over them.
        keep_probabilities: Keep T v numbers of hidden's dtype for backward; None keeps up to 1 GiB, and nothing without
            gradients. "fused" never does.
        chunk_tokens: Tokens at a time of "chunked"; None takes the device's.
        product_backend: How "chunked" multiplies: "auto", "native" or "via_fp32", as `backend.choose_product_backend`
            takes it.
        accumulate_into_main_grad: Add the weight gradient to `weight_vH.main_grad`, as in `linear.linear`.
        defer_weight_grad: Gets the function that computes the weight gradient, as in `linear.linear`. What forward kept
            is held until then, and the gradients of the logits are computed a second time, from kept probabilities
            without a product. "fused" has it computed in backward all the same: to wait, it would have to make the
            logits a third time, a product as large as the one that waits.

    Returns:
        fp32 [...] (fp64 from fp64); NaN, on a GPU, for a target that is no token.

    Raises:
        ValueError: Targets and hidden states of different shape, a setting that does not exist, or, on a CPU, a target
            that is no token.
    """
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(
            f"linear_cross_entropy: targets {tuple(targets.shape)} must have the shape of hidden {tuple(hidden.shape)} "
            "without its last dimension; bring both into one layout"
        )
    rows, group = hidden.reshape(-1, hidden.shape[-1]), vocabulary_group
    if group is not None and group.size() == 1:
        group = None
    if targets.device.type == "cpu":
        _check_targets(targets, _vocabulary(weight_vH, group))
        counted = _rows_that_count(targets.reshape(-1))
        if counted is not None:
            losses = linear_cross_entropy(
                rows.index_select(0, counted), weight_vH, targets.reshape(-1)[counted], vocabulary_group=group,
                backend=backend, keep_probabilities=keep_probabilities, chunk_tokens=chunk_tokens,
                product_backend=product_backend, accumulate_into_main_grad=accumulate_into_main_grad,
                defer_weight_grad=defer_weight_grad)
            return losses.new_zeros(targets.numel()).index_copy(0, counted, losses).view(targets.shape)
    is_fused = _is_fused(backend, rows)
    device = "cpu" if rows.device.type == "cpu" else "cuda"
    if chunk_tokens is None:
        chunk_tokens = chunk_tokens_on(device)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1; the default is {chunk_tokens_on(device)}")
    if keep_probabilities is None:
        # Without a backward pass they are made in a buffer of one chunk.
        num_bytes = targets.numel() * weight_vH.shape[0] * hidden.element_size()
        keep_probabilities = torch.is_grad_enabled() and num_bytes <= KEPT_BYTES
    is_wide = choose_product_backend(product_backend, hidden.device, hidden.dtype) == "via_fp32"
    dtype = wide_dtype(hidden.dtype) if is_wide else hidden.dtype
    plan = _Plan(is_fused, keep_probabilities, chunk_tokens, dtype, accumulate_into_main_grad, defer_weight_grad, group)
    with saving():
        losses = _LinearCrossEntropy.apply(rows, weight_vH, targets.reshape(-1), plan)
    return losses.view(targets.shape)


def _vocabulary(weight: torch.Tensor, group: Any) -> int:
    return weight.shape[0] * (1 if group is None else group.size())


def _check_targets(targets: torch.Tensor, vocabulary: int) -> None:
    is_wrong = ~is_among(targets, vocabulary) & (targets != IGNORED)
    if bool(is_wrong.any()):
        raise ValueError(f"linear_cross_entropy: target {int(targets[is_wrong][0])} must be a token of the vocabulary, "
                         f"0..{vocabulary - 1}, or {IGNORED}, which counts nothing; check the labels' tokenizer")


def _rows_that_count(targets_T: torch.Tensor) -> torch.Tensor | None:
    """Indices of the tokens that are not ignored, or None where nearly all count.

    Others fill their number up to a multiple of what a product needs to have the bits of one of many rows.
    """
    is_counted_T = targets_T != IGNORED
    num_rows = max(1, -(-int(is_counted_T.sum()) // _ROWS_AT_ONCE)) * _ROWS_AT_ONCE
    if num_rows > _WORTH_CHOOSING * len(targets_T):
        return None
    return is_counted_T.logical_not().to(torch.uint8).argsort(stable=True)[:num_rows]


def _is_fused(backend: str, rows: torch.Tensor) -> bool:
    if backend not in BACKENDS:
        raise unknown_backend("linear_cross_entropy", backend, BACKENDS)
    if backend != "auto":
        return backend == "fused"
    device = rows.device.type
    capability = torch.cuda.get_device_capability(rows.device)[0] if device == "cuda" else 0
    chosen, reason = choose_head_loss(device, capability=capability, value_bytes=rows.element_size(),
                                      hidden=rows.shape[1])
    log_choice("linear_cross_entropy", chosen, reason)
    return chosen == "fused"


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


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, plan: _Plan
    ) -> torch.Tensor:
        own, kept = plan.own(targets, weight), None
        if plan.is_fused:
            scores = fused_scores(hidden, weight, own)
        else:
            scores, kept = chunked_scores(hidden, weight, own, chunk_tokens=plan.chunk_tokens, keep=plan.keep,
                                          dtype=plan.dtype)
        whole = over_ranks(scores, is_among(own, weight.shape[0]), plan.group)
        log_sums = whole.sums.log()
        # Of a rank's own sum, relative to which probabilities are kept, the part in that of all ranks.
        shares = None
        if kept is not None and plan.group is not None:
            shares = torch.exp(scores.largest - whole.largest - log_sums)
        losses = log_sums - whole.margins
        if losses.device.type != "cpu":
            losses.masked_fill_(~is_among(targets, _vocabulary(weight, plan.group)), float("nan"))
        ctx.save_for_backward(hidden, weight, targets, whole.largest, log_sums, kept, shares)
        ctx.plan, ctx.weight = plan, weight
        return losses.masked_fill_(targets == IGNORED, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        hidden, weight, targets, largest, log_sums, kept, shares = ctx.saved_tensors
        plan: _Plan = ctx.plan
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        own = plan.own(targets, weight)
        grad_losses = grads[0].to(log_sums.dtype).masked_fill(targets == IGNORED, 0.0)
        main_grad = main_grad_of(ctx.weight, plan.accumulate)
        if plan.is_fused:
            grad_hidden, grad_weight = fused_gradients(
                hidden, weight, own, largest, log_sums, grad_losses, main_grad, needs_hidden=needs_hidden,
                needs_weight=needs_weight)
        else:
            chunks = ChunkedGradients(hidden, weight, own, largest + log_sums, kept, shares, grad_losses,
                                      plan.chunk_tokens, plan.dtype)
            waits = needs_weight and plan.defer is not None
            grad_hidden, grad_weight = chunks.of_hidden_and_weight(
                main_grad, needs_hidden=needs_hidden, needs_weight=needs_weight and not waits)
            if waits:
                assert plan.defer is not None
                plan.defer(DeferredWeightGrad(_add_deferred, chunks, ctx.weight, plan.accumulate))
                return grad_hidden, None, None, None
        if needs_weight and main_grad is not None:
            mark_added_to_main_grad(ctx.weight)
        return grad_hidden, grad_weight, None, None


def _add_deferred(chunks: ChunkedGradients, weight: torch.Tensor, accumulate: bool) -> None:
    main_grad = main_grad_of(weight, accumulate)
    add_to_grad(weight, chunks.of_hidden_and_weight(main_grad, needs_hidden=False, needs_weight=True)[1])


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
