"""What a model begins and ends with, on a ledger: embedding, final norm, MTP modules, head and losses.

Conventions as in `layer_passes.py`.
"""

from __future__ import annotations

from dsv3_megatron.kernels.head_loss_tiles import HeadLossTiles, gradient_columns
from dsv3_megatron.ops.head_loss_choices import KEPT_BYTES, chosen_head_loss, chunk_tokens_on, multiplies_kept
from dsv3_megatron.planning.memory.layer_passes import add_gradients
from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import Operations, weight_grad_work
from dsv3_megatron.planning.memory.settings import INDEX, WIDE, PassSettings


class Embedding:
    """Token ids to hidden states; `output` is the caller's."""

    def __init__(self, ops: Operations) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        looked_up = ledger.make("embedding", s.tokens * s.hidden * s.narrow)
        self.output = ledger.make("hidden states", s.hidden_bytes)
        ledger.drop(looked_up)

    def backward(self, grad: Tensor) -> None:
        """A dense gradient of the table; `grad` is used up. Without a tape it stays until it is `added`."""
        if self.ops.s.is_piped:
            self.ops.ledger.waiting.append(lambda: self._table(grad))
        else:
            self._table(grad)

    def _table(self, grad: Tensor) -> None:
        ledger, s = self.ops.ledger, self.ops.s
        self.table = ledger.make("gradient of the embedding", table_bytes(s))
        ledger.pulse(s.tokens * s.hidden * s.narrow)
        ledger.drop(grad)
        if s.is_piped:
            self.added()

    def added(self) -> None:
        """Add the gradient of the table to the main gradient; a CPU makes a wide copy of a narrow one before."""
        ledger, s = self.ops.ledger, self.ops.s
        ledger.pulse(0 if s.narrow == WIDE or s.device == "cuda" else s.vocabulary * s.hidden * WIDE)
        ledger.drop(self.table)


def table_bytes(s: PassSettings) -> int:
    """Bytes of the embedding, or of the head, in the weights' dtype."""
    return s.vocabulary * s.hidden * s.narrow


class TokenLossesPass:
    """The head and the cross-entropy of hidden states; keeps them. The losses are too small to count."""

    def __init__(self, ops: Operations, x: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.x = ops, x
        numel = s.tokens * s.vocabulary
        self.is_fused = chosen_head_loss(s.device, s.narrow, s.hidden) == "fused"
        self.small = ledger.make("targets and losses", s.tokens * (INDEX + 4 * WIDE))
        if s.tp > 1:
            self.rows = ops.gather(x, s.hidden)
        else:
            ledger.keep(x)
            self.rows = x
        self.kept: Tensor | None = None
        if self.is_fused:
            # Maxima and sums of every tile.
            ledger.pulse(2 * WIDE * s.tokens * -(-s.vocabulary // HeadLossTiles().block_v))
            return
        self.chunk = min(chunk_tokens_on(s.device), s.tokens) * s.vocabulary
        keeps = numel * s.narrow <= KEPT_BYTES
        if keeps:
            self.kept = ledger.make("probabilities of the head", numel * s.narrow)
        # Logits in fp32, and where products are narrow the chunk's before; wide copies of rows and weight.
        work = 0 if keeps and s.narrow == WIDE else self.chunk * WIDE
        if s.narrow < WIDE and not s.is_wide_product:
            work += self.chunk * s.narrow
        ledger.pulse(work + self._wide_copies())

    def _wide_copies(self) -> int:
        s = self.ops.s
        return (s.tokens + s.vocabulary) * s.hidden * WIDE if s.is_wide_product else 0

    def backward(self) -> Tensor:
        """Go back to the gradient of the hidden states."""
        ledger, s = self.ops.ledger, self.ops.s
        ledger.need(self.rows)
        grad = ledger.make("gradient of the head's input", s.tokens * s.hidden * s.narrow)
        if self.is_fused:
            ledger.pulse(self._fused_work())
            self._done()
            return self.ops.scatter(grad, s.hidden)
        wide = s.tokens * s.hidden * WIDE if s.is_wide_product else 0
        if multiplies_kept(s.device, value_bytes=s.narrow, is_wide_product=s.is_wide_product,
                           is_kept=self.kept is not None, is_split=s.tp > 1):
            self.chunk = 0
        chunk = self.chunk * (WIDE if s.narrow == WIDE or s.is_wide_product else WIDE + s.narrow)
        in_place = 0 if s.is_wide_product else weight_grad_work(s, s.vocabulary * s.hidden)
        ledger.pulse(wide + self._wide_copies() + chunk + (0 if s.is_piped else in_place))
        if s.is_piped:
            ledger.waiting.append(lambda: self._weight_grad(chunk + in_place))
        else:
            self._done()
        return self.ops.scatter(grad, s.hidden)

    def _fused_work(self) -> int:
        """Gradients of a chunk's columns, and the hidden gradient in fp32 where there are several chunks."""
        s = self.ops.s
        columns = min(gradient_columns(s.vocabulary, s.hidden, HeadLossTiles().block_v), s.vocabulary)
        return s.tokens * (columns * s.narrow + (s.hidden * WIDE if columns < s.vocabulary else 0))

    def _weight_grad(self, work: int) -> None:
        self.ops.ledger.pulse(work + self._wide_copies())
        self._done()

    def _done(self) -> None:
        if self.kept is not None:
            self.ops.ledger.drop(self.kept)
        self.ops.ledger.drop(self.rows, self.small)


class MTPInput:
    """Hidden states and the next tokens' embeddings, normed, and the projection of both; `output` is the caller's.

    Source: DeepSeek-V3 report, eq. 21.
    """

    def __init__(self, ops: Operations, hidden: Tensor, embedding: Embedding | None = None) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        self.embedding = embedding or Embedding(ops)
        embedded = self.embedding.output
        self.embedded_norm = ops.norm(embedded, "MTP input", s.local_tokens, s.hidden)
        self.hidden_norm = ops.norm(hidden, "MTP input", s.local_tokens, s.hidden)
        both = ledger.make("MTP inputs side by side", 2 * s.hidden_bytes)
        ledger.drop(self.embedded_norm.output, self.hidden_norm.output)
        gathered = ops.gather(both, 2 * s.hidden)
        self.projection = ops.linear(gathered, "MTP hidden states", s.tokens, "eh_proj")
        ledger.drop(gathered, both)
        self.output = self.projection.output
        if s.tp > 1:
            whole = ledger.make("MTP hidden states", s.tokens * s.hidden * s.narrow)
            ledger.drop(self.output)
            self.output = ledger.make("MTP hidden states", s.hidden_bytes)
            ledger.drop(whole)
        if embedding is None:
            ledger.drop(embedded)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the hidden states; `grad` is used up."""
        ops, ledger, s = self.ops, self.ops.ledger, self.ops.s
        if s.tp > 1:
            whole = ledger.make("gradient of MTP hidden states", s.tokens * s.hidden * s.narrow)
            ledger.drop(grad)
            grad = ledger.make("gradient of MTP hidden states", s.tokens * s.hidden // s.tp * s.narrow)
            ledger.drop(whole)
        both = ops.scatter(self.projection.backward(grad), 2 * s.hidden)
        ledger.drop(grad)
        grad_hidden = self.hidden_norm.backward(both)
        grad_embedded = self.embedded_norm.backward(both)
        ledger.drop(both)
        self.embedding.backward(grad_embedded)
        return grad_hidden


def sum_into(ops: Operations, grad: Tensor | None, other: Tensor) -> Tensor:
    """The sum of what two users of hidden states left."""
    return other if grad is None else add_gradients(ops, grad, other)
