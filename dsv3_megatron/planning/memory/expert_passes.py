"""Passes of the routed experts on a ledger: rows brought into the experts' order, the experts, and back.

Three forms of the experts: one after the other on a CPU, in grouped products on CUDA, and in FP8. Conventions as in
`layer_passes.py`.
"""

from __future__ import annotations

from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import (
    Operations,
    is_narrowed,
    product_work,
    quantization_work,
    quantized_bytes,
    wait_narrowed,
    weight_grad_work,
    wgrad_work,
)
from dsv3_megatron.planning.memory.settings import EXPERTS_FC1, EXPERTS_FC2, WIDE
from dsv3_megatron.planning.memory.swiglu_passes import activation_work, gradient_work


class RoutedExpertsPass:
    """Routed experts on the gated rows that came, sorted by expert and, their outputs, back; `output` is the caller's.
    """

    def __init__(self, ops: Operations, given: Tensor, gates: Tensor | None = None) -> None:
        """`gates` are those of rows that are in the experts' order already, and the caller's; None: of gated rows."""
        ledger, s = ops.ledger, ops.s
        self.ops = ops
        num = s.expert_rows
        self.is_sorted = gates is not None
        self.has_sorting = s.local_experts > 1 and not self.is_sorted
        if gates is not None:
            rows = given
            for tensor in (rows, gates):
                tensor.references += 1
        else:
            # Rows and gates are taken apart, and put in the experts' order at once unless ranks share an expert.
            rows = ledger.make("expert input", s.received_rows * s.hidden * s.narrow)
            gates = ledger.make("gates", num * WIDE)
        if s.etp > 1:
            rows = self._in_place_of(rows, "expert input, all ranks", num)
            if self.has_sorting:
                rows = self._in_place_of(rows, "expert input", num)
        kind: type[LoopedExpertsPass] | type[Fp8ExpertsPass] | type[GroupedExpertsPass] = LoopedExpertsPass
        if ops.precisions.line(EXPERTS_FC1) or ops.precisions.line(EXPERTS_FC2):
            kind = Fp8ExpertsPass
        elif s.device == "cuda" and s.narrow < WIDE:
            kind = GroupedExpertsPass
        self.core = kind(ops, rows, gates)
        ledger.drop(rows, gates)
        assert given.references, "the caller's"
        output = self.core.output
        if self.has_sorting:
            output = self._in_place_of(output, "expert output", num)
        if s.etp > 1:
            output = self._in_place_of(output, "expert output", s.received_rows)
        self.output = output

    def _in_place_of(self, tensor: Tensor, name: str, rows: int) -> Tensor:
        s = self.ops.s
        new = self.ops.ledger.make(name, rows * s.hidden * s.narrow)
        self.ops.ledger.drop(tensor)
        return new

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the gated rows as they came; `grad` is used up."""
        s = self.ops.s
        num = s.expert_rows
        if s.etp > 1:
            grad = self._in_place_of(grad, "gradient of expert output, all ranks", num)
        if self.has_sorting:
            grad = self._in_place_of(grad, "gradient of expert output", num)
        rows = self.core.backward(grad)
        if s.etp > 1:
            if self.has_sorting:
                rows = self._in_place_of(rows, "gradient of rows", num)
            rows = self._in_place_of(rows, "gradient of rows", s.received_rows)
        if self.is_sorted:
            return rows
        gated = self.ops.ledger.make("gradient of rows", s.received_rows * s.gated_row_bytes)
        self.ops.ledger.drop(rows)
        return gated


class LoopedExpertsPass:
    """One product per expert (`ops/experts.py`): keeps the rows and, in the products' dtype, the output of fc1."""

    def __init__(self, ops: Operations, rows: Tensor, gates: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.rows, self.gates = ops, rows, gates
        num, wide, width = s.expert_rows, s.products_bytes, s.expert_ffn
        ledger.keep(rows, gates)
        per_expert = -(-num // s.local_experts)
        converted = [] if wide == s.narrow else [ledger.make("wide expert input", num * s.hidden * wide)]
        self.hidden = ledger.make("experts gate and up", num * 2 * width * wide)
        product = ledger.make("expert output", num * s.hidden * wide)
        ledger.pulse(2 * per_expert * width * WIDE + (0 if s.narrow == WIDE else per_expert * width * 4 * WIDE)
                     + (2 * width * s.hidden * wide if wide != s.narrow else 0))
        if wide != s.narrow:
            narrow = ledger.make("expert output", num * s.hidden * s.narrow)
            ledger.drop(product, *converted)
            product = narrow
        self.output = product

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the rows; `grad` is used up."""
        ledger, s = self.ops.ledger, self.ops.s
        num, wide, width = s.expert_rows, s.products_bytes, s.expert_ffn
        per_expert = -(-num // s.local_experts)
        converted = []
        if wide != s.narrow:
            converted = [ledger.make("wide gradient of expert output", num * s.hidden * wide),
                         ledger.make("wide expert input", num * s.hidden * wide)]
        grad_rows = ledger.make("gradient of expert input", num * s.hidden * wide)
        waiting: list[Tensor] = []
        if s.is_piped:
            waiting = [ledger.make("experts active", num * width * wide),
                       ledger.make("gradient of experts gate and up", num * 2 * width * wide)]
        # Gradients and outputs of one expert's activation, and those of the expert before.
        ledger.pulse(per_expert * width * WIDE * (10 if s.local_experts > 1 else 7)
                     + (0 if s.narrow == WIDE else per_expert * width * (2 * WIDE + 4 * s.narrow)))
        if s.is_piped:
            grad.references += 1
            ledger.waiting.append(lambda: self._weight_grads(grad, waiting))
        else:
            ledger.pulse(weight_grad_work(s, 2 * width * s.hidden))
            ledger.drop(self.rows)
        if wide != s.narrow:
            narrow = ledger.make("gradient of expert input", num * s.hidden * s.narrow)
            ledger.drop(grad_rows, *converted)
            grad_rows = narrow
        ledger.drop(grad, self.hidden, self.gates)
        return grad_rows

    def _weight_grads(self, grad: Tensor, waiting: list[Tensor]) -> None:
        ledger, s = self.ops.ledger, self.ops.s
        wide = 0 if s.products_bytes == s.narrow else 2 * s.expert_rows * s.hidden * s.products_bytes
        ledger.pulse(wide + weight_grad_work(s, 2 * s.expert_ffn * s.hidden))
        ledger.drop(grad, self.rows, *waiting)


class GroupedExpertsPass:
    """One grouped product for each of the two weights, on CUDA: keeps the rows, the activation's input and output.

    Not run: from the operations' code.
    """

    def __init__(self, ops: Operations, rows: Tensor, gates: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.rows, self.gates = ops, rows, gates
        num, width = s.expert_rows, s.expert_ffn
        ledger.keep(rows, gates)
        self.hidden = ledger.make("experts gate and up", num * 2 * width * s.narrow)
        self.activation = ops.swiglu(self.hidden, "experts active", num, width,
                                     is_recomputed=s.is_recomputed("moe_act"), has_row_weights=True)
        ledger.keep(self.activation.output)
        self.output = ledger.make("expert output", num * s.hidden * s.narrow)
        ledger.drop(self.hidden, self.activation.output)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the rows; `grad` is used up."""
        ledger, s = self.ops.ledger, self.ops.s
        num, width = s.expert_rows, s.expert_ffn
        active = self.activation.output
        ledger.need(active)
        grad_active = ledger.make("gradient of experts active", num * width * s.narrow)
        grad.references += 1
        self._weight_grad(grad, active)
        ledger.drop(grad)
        grad_hidden = self.activation.backward(grad_active)
        ledger.drop(grad_active, self.gates)
        grad_rows = ledger.make("gradient of expert input", num * s.hidden * s.narrow)
        self._weight_grad(grad_hidden, self.rows)
        return grad_rows

    def _weight_grad(self, *held: Tensor) -> None:
        """Add the gradients of one expert after the other where they are summed; nothing is made."""
        ledger = self.ops.ledger
        if self.ops.s.is_piped:
            ledger.waiting.append(lambda: ledger.drop(*held))
        else:
            ledger.drop(*held)


class Fp8ExpertsPass:
    """Products in FP8 (`ops/fp8/experts.py`): keeps the rows and the activation's input in FP8.

    Transformer Engine's keep the activation's input as it is, and its output in FP8.
    """

    def __init__(self, ops: Operations, rows: Tensor, gates: Tensor) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.gates = ops, gates
        self.num, self.width = s.expert_rows, s.expert_ffn
        num, width = self.num, self.width
        ledger.keep(gates)
        self.rows = self._kept("expert input", rows, s.hidden, EXPERTS_FC1)
        hidden = ledger.make("experts gate and up", num * 2 * width * s.narrow)
        ledger.pulse(product_work(s, -(-num // s.local_experts), s.hidden, 2 * width))
        wide = ledger.make("wide experts active", num * width * WIDE)
        ledger.pulse(2 * num * width * WIDE)
        active = ledger.make("experts active", num * width * s.narrow)
        ledger.drop(wide)
        if s.is_engine:
            hidden.references += 1
            self.hidden = hidden
            self.active: Tensor | None = self._kept("experts active", active, width, EXPERTS_FC2)
        else:
            self.hidden, self.active = self._kept("experts gate and up", hidden, 2 * width, EXPERTS_FC2), None
        ledger.pulse(quantization_work(s, num, width) + quantized_bytes(num, width, "e4m3"))
        self.output = ledger.make("expert output", num * s.hidden * s.narrow)
        ledger.drop(hidden, active)

    def _kept(self, name: str, x: Tensor, width: int, module: str) -> Tensor:
        line = self.ops.precisions.line(module)
        if line is None or line.cached_input == "bf16":
            x.references += 1
            return x
        ledger, size = self.ops.ledger, quantized_bytes(self.num, width, line.cached_input)
        ledger.pulse(quantization_work(self.ops.s, self.num, width) + size)
        return ledger.make(f"{name} in FP8", size)

    def backward(self, grad: Tensor) -> Tensor:
        """Go back to the gradient of the rows; `grad` is used up."""
        ledger, s, num, width = self.ops.ledger, self.ops.s, self.num, self.width
        ledger.pulse(quantization_work(s, num, s.hidden))
        grad_active = ledger.make("gradient of experts active", num * width * WIDE)
        if s.is_engine:
            hidden = ledger.make("wide experts gate and up", num * 2 * width * WIDE)
            wide = ledger.make("wide gradient of experts gate and up", num * 2 * width * WIDE)
            ledger.pulse(4 * num * width * WIDE)
            grad_hidden = ledger.make("gradient of experts gate and up", num * 2 * width * s.narrow)
            ledger.drop(hidden, wide)
        else:
            grad_hidden = ledger.make("gradient of experts gate and up", num * 2 * width * s.narrow)
            active = 0 if s.is_piped else num * width * s.narrow
            ledger.pulse(active + gradient_work(s, num, width))
        ledger.drop(grad_active)
        ledger.pulse(quantization_work(s, num, 2 * width))
        grad_rows = ledger.make("gradient of expert input", num * s.hidden * s.narrow)
        self._weight_grad(s.hidden, 2 * width, EXPERTS_FC1, grad_hidden, self.rows)
        self._weight_grad(width, s.hidden, EXPERTS_FC2, grad, self.hidden, self.gates,
                          *[tensor for tensor in (self.active,) if tensor is not None])
        ledger.drop(grad_hidden, grad)
        return grad_rows

    def _weight_grad(self, inputs: int, outputs: int, module: str, grad: Tensor, *held: Tensor) -> None:
        """Take the gradient of one expert after the other, both operands in groups of tokens."""
        ops, ledger, s = self.ops, self.ops.ledger, self.ops.s
        rows = -(-self.num // s.local_experts)
        # The second weight's input is SwiGLU of what is held.
        again = 0 if module == EXPERTS_FC1 or s.is_engine else self.num * inputs * s.narrow
        if is_narrowed(ops, ops.precisions.line(module)):
            ledger.pulse(again + activation_work(s, self.num, inputs) * (again > 0))
            wait_narrowed(ops, self.num, inputs, outputs, s.local_experts)
            ledger.pulse(again + quantization_work(s, max(inputs, outputs), rows))
            ledger.drop(*held)
            return

        def compute() -> None:
            ledger.pulse(again + wgrad_work(s, rows, inputs, outputs))
            ledger.drop(grad, *held)

        grad.references += 1
        if s.is_piped:
            ledger.waiting.append(compute)
        else:
            compute()
