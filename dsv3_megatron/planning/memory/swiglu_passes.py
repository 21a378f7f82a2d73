"""SwiGLU in front of a product in FP8, on a ledger. Conventions as in `operation_passes.py`.

Source: `ops/fp8/kept_swiglu.py`, `ops/fp8/experts.py`.
"""

from __future__ import annotations

from dsv3_megatron.planning.memory.ledger import Tensor
from dsv3_megatron.planning.memory.operation_passes import (
    Operations,
    SwiGLUPass,
    quantization_work,
    quantized_bytes,
)
from dsv3_megatron.planning.memory.settings import WIDE, PassSettings

# ops/fp8/kept_swiglu.py: rows that are wide at a time.
_CHUNK = 8192


class Fp8SwiGLUPass:
    """SwiGLU of which the input alone is kept, in FP8; `output`, which is made again, is the caller's."""

    def __init__(self, ops: Operations, x: Tensor, name: str, rows: int, width: int, format: str) -> None:
        ledger, s = ops.ledger, ops.s
        self.ops, self.rows, self.width, self.name = ops, rows, width, x.name
        ledger.pulse(quantization_work(s, rows, 2 * width))
        self.kept = ledger.make(f"{x.name} in FP8", quantized_bytes(rows, 2 * width, format))
        ledger.pulse(0 if s.narrow == WIDE else rows * width * 3 * WIDE)
        self.output = ledger.make(name, rows * width * s.narrow)
        ledger.make_again(self.output, work=activation_work(s, rows, width))

    def backward(self, _grad: Tensor) -> Tensor:
        """Go back to the gradient of x."""
        ledger, s = self.ops.ledger, self.ops.s
        result = ledger.make(f"gradient of {self.name}", self.rows * 2 * self.width * s.narrow)
        # Without gates the output is not made.
        ledger.pulse(gradient_work(s, self.rows, self.width) - min(self.rows, _CHUNK) * self.width * WIDE)
        ledger.drop(self.kept)
        return result


def activation_pass(ops: Operations, x: Tensor, name: str, width: int, module: str, *, is_recomputed: bool
                    ) -> SwiGLUPass | Fp8SwiGLUPass:
    """SwiGLU of an FFN's gate and up.

    Args:
        ops: Operations of the layer.
        x: Gate and up, of all tokens.
        name: Name of the FFN.
        width: Intermediate width on this rank.
        module: The module that multiplies the result.
        is_recomputed: The result is made again where nothing is in FP8.
    """
    s = ops.s
    line = None if s.is_engine else ops.precisions.line(module)
    if line is not None and line.cached_input != "bf16":
        return Fp8SwiGLUPass(ops, x, f"{name} active", s.tokens, width, line.cached_input)
    return ops.swiglu(x, f"{name} active", s.tokens, width, is_recomputed=is_recomputed or line is not None)


def activation_work(s: PassSettings, rows: int, width: int) -> int:
    """What lives while SwiGLU is made again of its kept input: some rows of both, wide."""
    return min(rows, _CHUNK) * width * (3 if s.device == "cuda" else 5) * WIDE


def gradient_work(s: PassSettings, rows: int, width: int) -> int:
    """What lives on the way back through SwiGLU: of some rows the input, gradients, silu, the output, products."""
    return min(rows, _CHUNK) * width * (8 if s.device == "cuda" else 10) * WIDE
