"""A transformer layer's passes on a ledger: attention, dense FFN, experts, as the local modules run them.

Each class runs its forward pass when it is made and its backward pass when it is told to. Forward, the input is the
caller's; the output's first reference is handed to the caller. Backward, the gradient that is handed in is used up, and
the gradient that is returned is the caller's. The order of operations is that of the modules; autograd goes back the
same way. Tensors too small to matter (counts, offsets) are left out.
"""

from __future__ import annotations

from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import (
    AttentionPass,
    FusedAttentionPass,
    LinearPass,
    NormPass,
    Operations,
    core_attention_pass,
    quantization_work,
)
from dsv3_megatron.planning.memory.settings import INDEX, WIDE
from dsv3_megatron.planning.memory.split_attention import ExchangedAttentionPass, RingAttentionPass
from dsv3_megatron.planning.memory.swiglu_passes import activation_pass

CorePass = AttentionPass | FusedAttentionPass | ExchangedAttentionPass | RingAttentionPass


class LatentAttentionPass:
    """Norm, latent attention and residual; `output` is the caller's."""

    def __init__(self, ops: Operations, x: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        self.norm = ops.norm(x, "attention input", s.local_tokens, s.hidden)
        normed = self.norm.output
        self.query_down: LinearPass | None = None
        source = normed
        if s.query_latent:
            self.query_down = ops.linear(normed, "query latent", s.local_tokens, "self_attention.linear_q_down_proj")
            source = self.query_down.output
        self.latent_down = ops.linear(normed, "latent", s.local_tokens, "self_attention.linear_kv_down_proj")
        query = self._query(source)
        self._attend(query, self.latent_down.output)
        context = self.core.output
        self.projection = ops.linear(context, "attention output", s.tokens, "self_attention.linear_proj")
        ledger.drop(context)
        projected = ops.scatter(self.projection.output, s.hidden)
        ledger.drop(*self.looked_at, self.latent_down.output)
        if self.query_down is not None:
            ledger.drop(self.query_down.output)
        self.output = ledger.make("attention with residual", s.hidden_bytes)
        ledger.drop(projected, normed)

    def _query(self, query_source: Tensor) -> Tensor:
        """Queries out of their latents, rotated."""
        ops, s, ledger = self.ops, self.ops.s, self.ops.ledger
        heads = s.tokens * s.heads
        self.query_norm: NormPass | None = None
        if s.query_latent:
            self.query_norm = ops.norm(query_source, "normed query latent", s.local_tokens, s.query_latent)
            query_source = self.query_norm.output
        width = s.query_latent or s.hidden
        gathered = ops.gather(query_source, width)
        self.query_up = ops.linear(gathered, "query", s.tokens, "self_attention.linear_q_up_proj" if s.query_latent
                                   else "self_attention.linear_q_proj")
        ledger.drop(gathered)
        self._rotate()
        query = ledger.make("query", heads * s.query * s.narrow)
        ledger.drop(self.query_up.output)
        if self.query_norm is not None:
            ledger.drop(self.query_norm.output)
        return query

    def _attend(self, query: Tensor, latent: Tensor) -> None:
        """Core attention to what is made of latents: `core`, and what it looked at, as long as the caller has it."""
        ops, s, ledger = self.ops, self.ops.s, self.ops.ledger
        self.looked_at: tuple[Tensor, ...] = ()
        # Cosines and sines of a part of a sequence are copies.
        self.rotations = ledger.make("rotations of a part", s.length * s.rope * WIDE if s.cp > 1 else 0)
        self.latent_norm = ops.norm(latent, "normed latent", s.local_tokens, s.latent)
        is_again = s.is_recomputed("mla_up_proj")
        latents = s.tokens * ((s.query_latent or 0) + s.latent) * s.narrow
        if s.passes_latents:
            shared_key = ledger.make("shared key", s.local_tokens * s.rope * s.narrow)
            passed = ledger.make("passed latents", s.local_tokens * (s.latent + s.rope) * s.narrow)
            ledger.drop(self.latent_norm.output, shared_key)
            if is_again:
                ledger.make_again(query, passed, work=query.size + latents)
            self.core: CorePass = RingAttentionPass(ops, query, passed)
            ledger.drop(query, passed)
            return
        shared_key = ledger.make("shared key", s.tokens * s.rope * s.narrow)
        gathered = ops.gather(self.latent_norm.output, s.latent)
        self.latent_up = ops.linear(gathered, "keys and values", s.tokens, "self_attention.linear_kv_up_proj")
        key, key_value = ledger.make("key", s.tokens * s.heads * s.query * s.narrow), self.latent_up.output
        ledger.drop(gathered, self.latent_norm.output, shared_key)
        if s.cp > 1:
            self.core = ExchangedAttentionPass(ops, query, key, key_value, latents if is_again else None)
            return
        if is_again:
            ledger.make_again(query, key, key_value, work=query.size + latents)
        self.core, self.looked_at = core_attention_pass(ops, query, key, key_value), (query, key, key_value)

    def _rotate(self) -> None:
        """Narrow tensors go through wide complex pairs."""
        s = self.ops.s
        if s.narrow < WIDE:
            rows = s.tokens * s.heads
            self.ops.ledger.pulse(rows * s.query * s.narrow + rows * s.rope * 2 * WIDE)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the input."""
        ops, s, ledger = self.ops, self.ops.s, self.ops.ledger
        heads = s.tokens * s.heads
        gathered = ops.gather(grad, s.hidden)
        grad_context = self.projection.backward(gathered)
        ledger.drop(gathered)
        grads = self.core.backward(grad_context)
        if s.passes_latents:
            grad_shared = ledger.make("gradient of shared key", s.local_tokens * s.rope * s.narrow)
            grad_normed = ledger.make("gradient of normed latent", s.local_tokens * s.latent * s.narrow)
            ledger.drop(grads["passed"])
        else:
            grad_shared = ledger.make("gradient of shared key", s.tokens * s.rope * s.narrow)
            grad_up = ledger.make("gradient of keys and values", heads * (s.nope + s.value) * s.narrow)
            ledger.drop(grads["key"], grads["value"])
            grad_normed = ops.scatter(self.latent_up.backward(grad_up), s.latent)
            ledger.drop(grad_up)
        grad_latent = self.latent_norm.backward(grad_normed)
        ledger.drop(grad_normed)
        self._rotate()
        grad_query = ledger.make("gradient of query", heads * s.query * s.narrow)
        ledger.drop(grads["query"])
        grad_down = ledger.make("gradient of latent", s.local_tokens * (s.latent + s.rope) * s.narrow)
        ledger.drop(grad_latent, grad_shared, self.rotations)
        grad_source = ops.scatter(self.query_up.backward(grad_query), s.query_latent or s.hidden)
        ledger.drop(grad_query)
        if self.query_norm is not None and self.query_down is not None:
            grad_query_latent = self.query_norm.backward(grad_source)
            ledger.drop(grad_source)
            grad_x = self.latent_down.backward(grad_down)
            ledger.drop(grad_down)
            grad_source = self.query_down.backward(grad_query_latent)
            ledger.drop(grad_query_latent)
        else:
            grad_x = self.latent_down.backward(grad_down)
            ledger.drop(grad_down)
        total = add_gradients(ops, grad_x, grad_source)
        branch = self.norm.backward(total)
        ledger.drop(total)
        return add_residual(ops, grad, branch)


def add_gradients(ops: Operations, first: Tensor, second: Tensor) -> Tensor:
    """The sum of two gradients as a new tensor, in their place."""
    total = ops.ledger.make("sum of gradients", first.size)
    ops.ledger.drop(first, second)
    return total


def add_residual(ops: Operations, grad: Tensor, branch: Tensor) -> Tensor:
    """The residual's gradient plus the branch's: in the former's place unless something holds it."""
    if grad.references > 1:
        return add_gradients(ops, grad, branch)
    ops.ledger.drop(branch)
    return grad


class FeedForward:
    """SwiGLU FFN of a rank's part of its intermediate width; `output` is the caller's."""

    def __init__(self, ops: Operations, x: Tensor, name: str, module: str, *, is_recomputed: bool = False) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        _, width = s.matrices.of(f"{module}.linear_fc2")
        gathered = ops.gather(x, s.hidden)
        self.up: LinearPass = ops.linear(gathered, f"{name} gate and up", s.tokens, f"{module}.linear_fc1")
        ledger.drop(gathered)
        self.activation = activation_pass(ops, self.up.output, name, width, f"{module}.linear_fc2",
                                          is_recomputed=is_recomputed)
        self.down: LinearPass = ops.linear(self.activation.output, f"{name} output", s.tokens, f"{module}.linear_fc2")
        ledger.drop(self.up.output, self.activation.output)
        self.output = ops.scatter(self.down.output, s.hidden)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the input; `grad` stays."""
        ops, ledger = self.ops, self.ops.ledger
        gathered = ops.gather(grad, ops.s.hidden)
        grad_active = self.down.backward(gathered)
        ledger.drop(gathered)
        grad_up = self.activation.backward(grad_active)
        ledger.drop(grad_active)
        grad_x = self.up.backward(grad_up)
        ledger.drop(grad_up)
        return ops.scatter(grad_x, ops.s.hidden)


class DenseLayer:
    """A layer with a dense FFN; `output` is the caller's."""

    is_in_pieces = False

    def __init__(self, ops: Operations, x: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        self.attention = LatentAttentionPass(ops, x)
        self.norm = ops.norm(self.attention.output, "FFN input", s.local_tokens, s.hidden)
        self.ffn = FeedForward(ops, self.norm.output, "FFN", "mlp")
        self.output = ledger.make("hidden states", s.hidden_bytes)
        ledger.drop(self.ffn.output, self.norm.output, self.attention.output)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the input."""
        ledger = self.ops.ledger
        grad_normed = self.ffn.backward(grad)
        branch = self.norm.backward(grad_normed)
        ledger.drop(grad_normed)
        return self.attention.backward(add_residual(self.ops, grad, branch))


class Routing:
    """The router's choice, and a row with its gate for each token and expert; `rows` is the caller's.

    Where tokens travel in FP8, the rows are the records that do; in the run's precision they are never made.
    """

    def __init__(self, ops: Operations, x: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.x = ops, x
        tokens = s.local_tokens
        table = tokens * s.experts
        ledger.keep(x)
        self.kept = []
        if s.narrow < WIDE:  # products are wide; wide copies are made again
            ledger.pulse(tokens * s.hidden * WIDE + s.experts * s.hidden * WIDE + 2 * table * WIDE)
        # Affinities; experts of each token; its affinities and their sums; of the balance loss, their sums again.
        self.kept += [ledger.make("affinities", table * WIDE),
                      ledger.make("choice of experts", tokens * s.top_k * (INDEX + WIDE) + 3 * tokens * WIDE)]
        ledger.pulse(3 * table * WIDE + tokens * s.top_k * INDEX)
        gates = ledger.make("gates by expert", table * (WIDE + 1))
        # Of sorting the table: what Megatron-Core's dispatcher keeps is a view of all of it. Beside it, its copies
        # turned and as int64.
        ledger.pulse(3 * table * INDEX + table)
        if not s.sends_by_node:
            self.kept.append(ledger.make("sorted choices", table * INDEX))
        self.kept.append(ledger.make("row numbers", s.sent_rows * INDEX))
        own = ledger.make("gates", s.sent_rows * WIDE)
        if ops.precisions.sends_fp8:
            # A token is quantized once.
            ledger.pulse(quantization_work(s, tokens, s.hidden) + tokens * s.gated_record_bytes)
        # Where nothing travels, rows of their own in the experts' order, beside the gates.
        self.gates = own if s.has_all_experts and not ops.precisions.sends_fp8 else None
        self.rows = ledger.make("routed rows", s.sent_rows * (
            s.gated_record_bytes if ops.precisions.sends_fp8 else
            s.gated_row_bytes if self.gates is None else s.hidden * s.narrow))
        ledger.drop(gates)
        if self.gates is None:
            ledger.drop(own)

    def backward(self, grad_rows: Tensor) -> Tensor:
        """Go back to the gradient of x, given those of rows and gates; `grad_rows` is used up."""
        ops, ledger, s = self.ops, self.ops.ledger, self.ops.s
        grad_x = ledger.make("gradient of router input", s.hidden_bytes)
        ledger.drop(grad_rows)
        table, tokens = s.local_tokens * s.experts, s.local_tokens
        ledger.need(self.x)
        ledger.pulse(6 * table * WIDE)
        wide = tokens * s.hidden * WIDE
        # Of narrow tensors: the wide gradients of input and weight, the wide input.
        ledger.pulse(table * WIDE + (0 if s.narrow == WIDE else 2 * wide + 2 * s.experts * s.hidden * WIDE))
        own = ledger.make("gradient of router input", s.hidden_bytes)
        ledger.drop(*self.kept, self.x)
        return add_gradients(ops, grad_x, own)
