"""Head and loss in chunks of tokens, with torch alone: the reference, and what a CPU runs.

The fp32 logits of all tokens never exist: each chunk's logits are computed, turned into probabilities in place and, for
backward, kept in the hidden state's dtype (as many bytes as the logits of an unfused head) or recomputed. Keeping saves
one of four products over the vocabulary and the exponentials of backward. Where they are kept as a CPU multiplies them,
backward makes no chunks: they are the logits' gradients but for one number a token, and a factor.

Shapes: T tokens, H hidden, V vocabulary, v its part on this tensor-parallel rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsv3_megatron.ops.backend import wide_dtype
from dsv3_megatron.ops.head_loss_choices import multiplies_kept
from dsv3_megatron.ops.linear import add_product_
from dsv3_megatron.ops.local_scores import LocalScores, is_among
from dsv3_megatron.ops.softmax import softmax_and_logsumexp_


def chunked_scores(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, chunk_tokens: int, keep: bool,
                   dtype: torch.dtype) -> tuple[LocalScores, torch.Tensor | None]:
    """Scores of each token over this rank's columns, and probabilities over them, if they are kept.

    Args:
        hidden: [T, H], bf16, fp32 or fp64.
        weight: [v, H], same dtype.
        targets: int64 [T], a row of `weight`, or anything else where the target is not among them.
        chunk_tokens: Tokens at a time.
        keep: Keep softmax over these columns, [T, v] in hidden's dtype.
        dtype: Dtype of the products' operands.
    """
    wide = wide_dtype(hidden.dtype)
    rows, wide_weight = hidden.to(dtype), weight.to(dtype)
    num_tokens, vocab = hidden.shape[0], weight.shape[0]
    is_here = is_among(targets, vocab)
    columns = targets.where(is_here, 0)
    found = torch.empty(num_tokens, dtype=wide, device=hidden.device)
    kept = torch.empty((num_tokens, vocab), dtype=hidden.dtype, device=hidden.device) if keep else None
    # Kept probabilities of the wide dtype are computed where they stay, others in one buffer for all chunks.
    in_place = kept is not None and kept.dtype == wide
    scratch = kept if in_place else found.new_empty((min(chunk_tokens, num_tokens), vocab))
    assert scratch is not None
    logsumexps = torch.empty_like(found)
    for start in range(0, num_tokens, chunk_tokens):
        part = slice(start, min(start + chunk_tokens, num_tokens))
        scores = _logits(rows[part], wide_weight, scratch[part] if in_place else scratch[: part.stop - start])
        found[part] = scores.gather(1, columns[part, None]).squeeze(1)
        logsumexps[part] = softmax_and_logsumexp_(scores)
        if kept is not None and not in_place:
            kept[part] = scores
    # Relative to its log-sum-exp, a token's exponentials add up to 1.
    return LocalScores(logsumexps, torch.ones_like(found), found.sub_(logsumexps).where(is_here, 0.0)), kept


def _logits(rows: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    if out.dtype == rows.dtype:
        return torch.mm(rows, weight.t(), out=out)
    return out.copy_(torch.mm(rows, weight.t()))


@dataclass(frozen=True)
class ChunkedGradients:
    """Gradients of the logits, a chunk of tokens at a time, from what forward kept.

    Attributes:
        hidden: Hidden states [T, H].
        weight: This rank's rows of the head, [v, H].
        targets: Each token's target, counted from this rank's first row; int64 [T].
        logsumexps: [T], over the columns of all ranks.
        kept: Probabilities [T, v] that sum to 1 over this rank's columns, or None.
        shares: [T], part of the probability that this rank's columns have; None where they have all of it.
        grad_losses: [T], gradients of the losses.
        chunk_tokens: Tokens at a time.
        dtype: Dtype of the products' operands.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    logsumexps: torch.Tensor
    kept: torch.Tensor | None
    shares: torch.Tensor | None
    grad_losses: torch.Tensor
    chunk_tokens: int
    dtype: torch.dtype

    def of_hidden_and_weight(self, main_grad: torch.Tensor | None, *, needs_hidden: bool, needs_weight: bool
                             ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Gradients of the hidden states and of the weight; None where not needed, or where `main_grad` took it."""
        if multiplies_kept(self.hidden.device.type, value_bytes=self.hidden.element_size(),
                           is_wide_product=self.dtype != self.hidden.dtype, is_kept=self.kept is not None,
                           is_split=self.shares is not None):
            return self._from_kept(main_grad, needs_hidden=needs_hidden, needs_weight=needs_weight)
        rows, wide_weight = self.hidden.to(self.dtype), self.weight.to(self.dtype)
        grad_rows = torch.empty_like(rows) if needs_hidden else None
        total = main_grad
        if needs_weight and main_grad is None:
            total = self.logsumexps.new_zeros(self.weight.shape)
        for part, narrow in self._chunks(rows, wide_weight):
            if grad_rows is not None:
                torch.mm(narrow, wide_weight, out=grad_rows[part])
            if total is not None and needs_weight:
                add_product_(total, narrow.t(), rows[part])
        grad_hidden = None if grad_rows is None else grad_rows.to(self.hidden.dtype)
        own = None if not needs_weight or main_grad is not None or total is None else total.to(self.weight.dtype)
        return grad_hidden, own

    def _from_kept(self, main_grad: torch.Tensor | None, *, needs_hidden: bool, needs_weight: bool
                   ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """`of_hidden_and_weight` in two products with what was kept.

        A token's gradients of the logits are its loss's gradient times (probabilities - 1 at the target). The 1 is
        taken away in place for the two products, and the factor is put on the products' other side.
        """
        assert self.kept is not None
        # Not a change of the saved tensor in autograd's eyes: it is as it was when this returns.
        less_target = self.kept.data
        num_tokens, vocab = less_target.shape
        is_here, scales = is_among(self.targets, vocab), self.grad_losses.unsqueeze(1)
        # In flat memory: a scatter into narrow numbers takes torch as long as a product here.
        places = torch.arange(0, num_tokens * vocab, vocab, device=self.targets.device) + self.targets.where(is_here, 0)
        at_target = less_target.take(places)
        grad_hidden = grad_weight = None
        try:
            less_target.put_(places, (at_target.to(scales.dtype) - is_here.to(scales.dtype)).to(self.dtype))
            if needs_hidden:
                grad_hidden = torch.mm(less_target, self.weight)
                grad_hidden = torch.mul(grad_hidden, scales, out=grad_hidden)
            if needs_weight:
                rows = torch.mul(self.hidden, scales).to(self.dtype)
                grad_weight = torch.mm(less_target.t(), rows)
                if main_grad is not None:
                    main_grad.add_(grad_weight)
        finally:
            less_target.put_(places, at_target)
        return grad_hidden, None if main_grad is not None else grad_weight

    def _chunks(self, rows: torch.Tensor, wide_weight: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """(tokens, their gradients [tokens, V] in the products' dtype, in a buffer that the next chunk overwrites)."""
        num_tokens, vocab = self.hidden.shape[0], self.weight.shape[0]
        is_here = is_among(self.targets, vocab)
        columns = self.targets.where(is_here, 0).unsqueeze(1)
        scales = self.grad_losses.unsqueeze(1)
        at_target = torch.where(is_here, -self.grad_losses, 0.0).unsqueeze(1)
        of_kept = scales if self.shares is None else scales * self.shares.unsqueeze(1)
        buffer = self.logsumexps.new_empty((min(self.chunk_tokens, num_tokens), vocab))
        for start in range(0, num_tokens, self.chunk_tokens):
            part = slice(start, min(start + self.chunk_tokens, num_tokens))
            grad_logits = buffer[: part.stop - start]
            if self.kept is not None and self.kept.dtype != grad_logits.dtype:
                grad_logits.copy_(self.kept[part]).mul_(of_kept[part])  # `mul` would make a wide copy
            elif self.kept is not None:
                torch.mul(self.kept[part], of_kept[part], out=grad_logits)
            else:
                _logits(rows[part], wide_weight, grad_logits).sub_(self.logsumexps[part, None]).exp_()
                grad_logits.mul_(scales[part])
            grad_logits.scatter_add_(1, columns[part], at_target[part])
            yield part, grad_logits.to(self.dtype)
