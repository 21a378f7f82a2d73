"""A mixture-of-experts layer's passes on a ledger: in one piece, or in three with the exchanges of tokens between.

In pieces (`model/stage/segments.py`) what travels is in nobody's graph: a transfer holds what it sends and what it
receives, and others may run meanwhile (`Ledger.pause`). In one piece Megatron-Core's layer runs, whose frames
hold the rows until it is done. Conventions as in `layer_passes.py`.
"""

from __future__ import annotations

from dsv3_megatron.planning.memory.expert_passes import RoutedExpertsPass
from dsv3_megatron.planning.memory.layer_passes import (
    FeedForward,
    LatentAttentionPass,
    Routing,
    add_gradients,
    add_residual,
)
from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import Operations, quantization_work


class MoELayer:
    """A layer with experts; `output` is the caller's."""

    def __init__(self, ops: Operations, x: Tensor) -> None:
        s = ops.s
        self.ops = ops
        self.is_in_pieces = s.is_piped and s.has_remote_experts and not s.recomputes_layers
        self.attention = LatentAttentionPass(ops, x)
        self.norm = ops.norm(self.attention.output, "FFN input", s.local_tokens, s.hidden)
        self.shared: FeedForward | None = None
        (self._forward_in_pieces if self.is_in_pieces else self._forward_whole)()

    def _shared(self) -> None:
        s = self.ops.s
        if s.matrices.has("mlp.shared_experts.linear_fc1"):
            self.shared = FeedForward(self.ops, self.norm.output, "shared experts", "mlp.shared_experts",
                                      is_recomputed=s.is_recomputed("moe_act"))

    def _sum(self) -> None:
        """Tokens' sums over their experts, shared experts and residual; drops what they are made of."""
        ledger, s = self.ops.ledger, self.ops.s
        combined = ledger.make("combined rows", s.hidden_bytes)
        if self.shared is not None:
            total = ledger.make("sum of experts", s.hidden_bytes)
            ledger.drop(combined, self.shared.output)
            combined = total
        self._combined = combined

    def _forward_whole(self) -> None:
        ledger, s = self.ops.ledger, self.ops.s
        self._shared()
        self.routing = Routing(self.ops, self.norm.output)
        rows, is_narrow = self.routing.rows, self.ops.precisions.sends_fp8
        held, received = [rows], rows
        if is_narrow:  # also where nothing travels
            coming = self._made("FP8 rows on their way", s.received_rows, s.gated_record_bytes
                                ) if s.has_remote_experts else None
            received = self._made("received rows", s.received_rows, s.gated_row_bytes)
            ledger.drop(rows, *((coming,) if coming is not None else ()))
            held = [received]
        elif s.has_remote_experts:
            received = self._made("received rows", s.received_rows, s.gated_row_bytes)
            held.append(received)
        gates = self.routing.gates
        self.experts = RoutedExpertsPass(self.ops, received, gates)
        held += [] if gates is None else [gates]
        back = self.experts.output
        if s.has_remote_experts:
            back = self._exchanged("rows that came back", s.sent_rows)
            ledger.drop(self.experts.output)
        self._sum()
        ledger.drop(back, *held, self.norm.output)
        self.output = ledger.make("hidden states", s.hidden_bytes)
        ledger.drop(self._combined, self.attention.output)

    def _forward_in_pieces(self) -> None:
        ledger, s = self.ops.ledger, self.ops.s
        self.routing = Routing(self.ops, self.norm.output)
        received = self._dispatched(self.routing.rows)
        self.experts = RoutedExpertsPass(self.ops, received)
        self._shared()
        ledger.drop(received, self.norm.output)
        back = self._exchanged("rows that came back", s.sent_rows)
        ledger.pause()
        ledger.drop(self.experts.output)
        self._sum()
        self.output = ledger.make("hidden states", s.hidden_bytes)
        ledger.drop(self._combined, back, self.attention.output)

    def _made(self, name: str, rows: int, row_bytes: int) -> Tensor:
        return self.ops.ledger.make(name, rows * row_bytes)

    def _exchanged(self, name: str, rows: int) -> Tensor:
        return self._made(name, rows, self.ops.s.hidden * self.ops.s.narrow)

    def _dispatched(self, rows: Tensor) -> Tensor:
        """Let gated rows travel while others run; in FP8 records travel, and are widened when they are there."""
        ledger, s = self.ops.ledger, self.ops.s
        if not self.ops.precisions.sends_fp8:
            received = self._made("received rows", s.received_rows, s.gated_row_bytes)
            ledger.pause()
            ledger.drop(rows)
            return received
        coming = self._made("FP8 rows on their way", s.received_rows, s.gated_record_bytes)
        ledger.pause()
        received = self._made("received rows", s.received_rows, s.gated_row_bytes)
        ledger.drop(rows, coming)
        return received

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the input; `grad`, that of the output, is used up."""
        if self.is_in_pieces:
            return self._backward_in_pieces(grad)
        ledger, s = self.ops.ledger, self.ops.s
        rows = self._exchanged("gradient of rows", s.sent_rows)
        if self.ops.precisions.sends_fp8:
            ledger.pulse((s.sent_rows + (s.received_rows if s.has_remote_experts else 0)) * s.record_bytes)
        if s.has_remote_experts or self.ops.precisions.sends_fp8:
            sent, rows = rows, self._exchanged("gradient of rows", s.received_rows)
            ledger.drop(sent)
        rows = self.experts.backward(rows)
        if s.has_remote_experts:
            sent, rows = rows, self._made("gradient of rows", s.sent_rows, s.gated_row_bytes)
            ledger.drop(sent)
        routed = self.routing.backward(rows)
        return self._backward_attention(grad, self._backward_shared(grad, routed))

    def _backward_shared(self, grad: Tensor, routed: Tensor) -> Tensor:
        if self.shared is None:
            return routed
        own = self.shared.backward(grad)
        self.ops.ledger.drop(own)  # added in place
        return routed

    def _backward_attention(self, grad: Tensor, grad_normed: Tensor) -> Tensor:
        branch = self.norm.backward(grad_normed)
        self.ops.ledger.drop(grad_normed)
        return self.attention.backward(add_residual(self.ops, grad, branch))

    def _backward_in_pieces(self, grad: Tensor) -> Tensor:
        ledger, s = self.ops.ledger, self.ops.s
        rows = self._exchanged("gradient of rows", s.sent_rows)
        arrived = self._returned(rows)
        # Autograd's call holds the gradients that a piece begins with until it returns.
        arrived.references += 1
        shared = self.shared.backward(grad) if self.shared is not None else None
        rows = self.experts.backward(arrived)
        ledger.drop(arrived)
        back = self._made("gradient of rows", s.sent_rows, s.gated_row_bytes)
        self._pause()
        ledger.drop(rows)
        given = [tensor for tensor in (back, shared, grad) if tensor is not None]
        for tensor in given:
            tensor.references += 1
        routed = self.routing.backward(back)
        if shared is not None:
            routed = add_gradients(self.ops, routed, shared)
        result = self._backward_attention(grad, routed)
        ledger.drop(*given)
        return result

    def _returned(self, rows: Tensor) -> Tensor:
        """Let the gradients of the rows that came back travel to the experts, in FP8 where rows do."""
        ledger, s = self.ops.ledger, self.ops.s
        if not self.ops.precisions.sends_fp8:
            arrived = self._exchanged("gradient of rows", s.received_rows)
            self._pause()
            ledger.drop(rows)
            return arrived
        ledger.pulse(quantization_work(s, s.sent_rows, s.hidden))
        way = [self._made("FP8 rows on their way", num, s.record_bytes) for num in (s.sent_rows, s.received_rows)]
        ledger.drop(rows)
        self._pause()
        arrived = self._exchanged("gradient of rows", s.received_rows)
        ledger.drop(*way)
        return arrived

    def _pause(self) -> None:
        """Weight gradients that need not wait any longer are computed behind the transfer that starts here."""
        ledger = self.ops.ledger
        if not ledger.defers_all:
            ledger.compute_waiting()
        ledger.pause()
