"""Single operations on a ledger: what they make, what they keep for backward, and what lives while they run.

Forward, an operation takes a reference to what it keeps and returns its output, whose first reference is the caller's.
Backward, the gradient of its output stays the caller's; the gradient of its input comes into being and is returned, and
the references that the operation took go.

Source: the operations themselves, `ops/` of this library; on CUDA what they call there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_megatron.planning.memory_ledger import Ledger, Tensor
from dsv3_megatron.planning.memory_settings import WIDE, PassSettings

# ops/attention.py: queries of a tile, and what is kept of probabilities at most.
_QUERY_BLOCK = 128
_KEPT_PROBABILITY_BYTES = 64 << 20
_MASK_BYTES = _QUERY_BLOCK ** 2 * WIDE


@dataclass(frozen=True)
class Operations:
    """Operations of a run's passes on one ledger.

    Attributes:
        ledger: The ledger.
        s: Sizes.
    """

    ledger: Ledger
    s: PassSettings

    # -- norms -------------------------------------------------------------------------------------

    def norm(self, x: Tensor, name: str, rows: int, width: int) -> NormPass:
        """RMSNorm of x [rows, width]: keeps it and a number a row."""
        return NormPass(self, x, name, rows, width)

    # -- products ----------------------------------------------------------------------------------

    def linear(self, x: Tensor, name: str, rows: int, inputs: int, outputs: int) -> LinearPass:
        """y = x W^T: keeps x."""
        return LinearPass(self, x, name, rows, inputs, outputs)

    def swiglu(self, x: Tensor, name: str, rows: int, width: int, *, is_recomputed: bool = False) -> SwiGLUPass:
        """silu(gate) * up of x [rows, 2 width]: keeps x."""
        return SwiGLUPass(self, x, name, rows, width, is_recomputed)

    # -- tensor parallelism ------------------------------------------------------------------------

    def gather(self, x: Tensor, width: int) -> Tensor:
        """The whole sequence of this rank's part, or x itself: a reference of the caller's in either case."""
        if self.s.tp == 1:
            x.references += 1
            return x
        return self.ledger.make(f"{x.name}, whole sequence", self.s.tokens * width * self.s.narrow)

    def scatter(self, x: Tensor, width: int) -> Tensor:
        """This rank's part of the sum over tensor-parallel ranks, in x's place."""
        if self.s.tp == 1:
            return x
        part = self.ledger.make(x.name, self.s.local_tokens * width * self.s.narrow)
        self.ledger.drop(x)
        return part


class NormPass:
    """RMSNorm forward; `output` is the caller's."""

    def __init__(self, operations: Operations, x: Tensor, name: str, rows: int, width: int) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.x, self.rows, self.width = operations, x, rows, width
        ledger.keep(x)
        self.inverse = ledger.make("inverse RMS", rows * WIDE)
        wide, narrow = rows * width * WIDE, rows * width * s.narrow
        # Squares beside the input; of a narrow input, its wide copy and the wide result.
        work = 0 if s.device == "cuda" else wide if s.narrow == WIDE else 2 * wide
        ledger.pulse(work + (0 if s.narrow == WIDE else narrow))
        self.output = ledger.make(name, narrow)
        if s.is_recomputed("layernorm"):
            ledger.make_again(self.output, work=work)

    def backward(self, grad: Tensor) -> Tensor:
        """To the gradient of x."""
        ledger, s = self.operations.ledger, self.operations.s
        wide, narrow = self.rows * self.width * WIDE, self.rows * self.width * s.narrow
        ledger.need(self.x)
        if s.device == "cpu":
            # Normed input, products and result; of narrow ones the wide output gradient and, shortly, input too.
            ledger.pulse(3 * wide if s.narrow == WIDE else 4 * wide + narrow)
        result = ledger.make(f"gradient of {self.x.name}", narrow)
        ledger.drop(self.x, self.inverse)
        return result


class LinearPass:
    """y = x W^T; `output` is the caller's."""

    def __init__(self, operations: Operations, x: Tensor, name: str, rows: int, inputs: int, outputs: int) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.x, self.rows, self.inputs, self.outputs = operations, x, rows, inputs, outputs
        if s.is_wide_product:
            ledger.pulse((rows * inputs + inputs * outputs + rows * outputs) * WIDE + rows * outputs * s.narrow)
        ledger.keep(x)
        self.output = ledger.make(name, rows * outputs * s.narrow)

    def backward(self, grad: Tensor, *, waits: bool) -> Tensor:
        """dx = dy W; and dW = dy^T x added to the main gradient, later if it waits."""
        ledger, s = self.operations.ledger, self.operations.s
        rows, inputs, outputs = self.rows, self.inputs, self.outputs
        ledger.need(self.x)
        wide_grad = rows * outputs * WIDE if s.is_wide_product else 0
        if s.is_wide_product:
            ledger.pulse(wide_grad + (inputs * outputs + rows * inputs) * WIDE + rows * inputs * s.narrow)
        result = ledger.make(f"gradient of {self.x.name}", rows * inputs * s.narrow)
        if waits:
            grad.references += 1
            ledger.waiting.append(lambda: self._weight_grad(grad))
            return result
        ledger.pulse(wide_grad + self._work())
        if not s.is_piped:  # autograd gets a dummy of the weight's size
            ledger.pulse(inputs * outputs * s.narrow)
        ledger.drop(self.x)
        return result

    def _weight_grad(self, grad: Tensor) -> None:
        ledger, s = self.operations.ledger, self.operations.s
        ledger.pulse((self.rows * self.outputs * WIDE if s.is_wide_product else 0) + self._work())
        ledger.drop(self.x, grad)

    def _work(self) -> int:
        s = self.operations.s
        if s.is_wide_product:
            return self.rows * self.inputs * WIDE
        # The product, and on a CPU its copy in the sum's dtype.
        return weight_grad_work(s, self.inputs * self.outputs)


def weight_grad_work(s: PassSettings, numel: int) -> int:
    """What lives while a weight gradient of narrow operands is added to its fp32 sum."""
    return 0 if s.narrow == WIDE else numel * (s.narrow + (WIDE if s.device == "cpu" else 0))


class SwiGLUPass:
    """silu(gate) * up; `output` is the caller's."""

    def __init__(self, operations: Operations, x: Tensor, name: str, rows: int, width: int, is_recomputed: bool
                 ) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.x, self.numel = operations, x, rows * width
        ledger.keep(x)
        work = 0 if s.narrow == WIDE else self.numel * 3 * WIDE
        ledger.pulse(work + self.numel * s.narrow)
        self.output = ledger.make(name, self.numel * s.narrow)
        if is_recomputed:
            ledger.make_again(self.output, work=work)

    def backward(self, _grad: Tensor) -> Tensor:
        """silu and a product beside the result; of narrow ones in wide copies."""
        ledger, s = self.operations.ledger, self.operations.s
        ledger.need(self.x)
        part = self.numel * WIDE
        ledger.pulse(4 * part if s.narrow == WIDE else 7 * part)
        result = ledger.make(f"gradient of {self.x.name}", self.numel * 2 * s.narrow)
        ledger.drop(self.x)
        return result


class AttentionPass:
    """Blocked core attention of queries, keys and values of all heads; `output` is the caller's."""

    def __init__(self, operations: Operations, query: Tensor, key: Tensor, value: Tensor) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.inputs = operations, (query, key, value)
        rows = s.tokens * s.heads
        self.numels = {"query": rows * s.query, "key": rows * s.query, "value": rows * s.value}
        self.is_recomputed = s.is_recomputed("mla_up_proj")
        wide = self._wide_operands()
        output = ledger.make("context", self.numels["value"] * WIDE)
        kept, keeps_all = probability_bytes(s)
        ledger.pulse(_MASK_BYTES + kept + (0 if keeps_all else tile_bytes(s)))
        self.probabilities = ledger.make("attention probabilities" if keeps_all else "attention log-sum-exp", kept)
        if self.is_recomputed:
            ledger.keep(*self.inputs)
            ledger.drop(*wide)
        self.wide = wide
        if s.narrow < WIDE:
            narrow = ledger.make("context", self.numels["value"] * s.narrow)
            ledger.drop(output)
            output = narrow
        self.output = output

    def _wide_operands(self) -> list[Tensor]:
        return [self.operations.ledger.make(f"wide {name}", numel * WIDE) for name, numel in self.numels.items()]

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """Of queries, keys and values, by name. `grad` is used up."""
        ledger, s = self.operations.ledger, self.operations.s
        if self.is_recomputed:
            ledger.need(self.inputs[0])
            self.wide = self._wide_operands()
        wide_grad = ledger.make("wide gradient of context", self.numels["value"] * WIDE)
        results = {name: ledger.make(f"gradient of {name}", numel * WIDE) for name, numel in self.numels.items()}
        # Of the last tile: the gradients of probabilities and scores, and the one before; or scores made again.
        ledger.pulse(_MASK_BYTES + (3 if probability_bytes(s)[1] else 4) * tile_bytes(s))
        ledger.drop(wide_grad)
        if s.narrow < WIDE:
            narrow = {name: ledger.make(f"gradient of {name}", numel * s.narrow) for name, numel in self.numels.items()}
            ledger.drop(*results.values())
            results = narrow
        ledger.drop(*self.wide, self.probabilities, grad)
        if self.is_recomputed:
            ledger.drop(*self.inputs)
        return results


def probability_bytes(s: PassSettings) -> tuple[int, bool]:
    """What blocked attention keeps of its scores: probabilities, or beyond a size their log-sum-exp; and whether."""
    rows = s.sequences * s.heads
    if rows * s.length ** 2 * 2 > _KEPT_PROBABILITY_BYTES:
        return rows * s.length * WIDE, False
    numbers = sum(min(_QUERY_BLOCK, s.length - first) * min(first + _QUERY_BLOCK, s.length)
                  for first in range(0, s.length, _QUERY_BLOCK))
    return rows * numbers * WIDE, True


def tile_bytes(s: PassSettings) -> int:
    """Of the largest tile of scores."""
    rows = s.sequences * s.heads
    fit = max(1, min(rows, (1 << 20) // (4 * _QUERY_BLOCK * s.length)))
    return fit * min(_QUERY_BLOCK, s.length) * s.length * WIDE


Backward = Callable[[Tensor], Tensor]
