"""Single operations on a ledger: what they make, what they keep for backward, and what lives while they run.

Forward, an operation takes a reference to what it keeps and returns its output, whose first reference is the caller's.
Backward, the gradient of its output stays the caller's; the gradient of its input comes into being and is returned, and
the references that the operation took go.

Source: the operations themselves, `ops/` of this library; on CUDA what they call there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.planning.memory.ledger import MemoryLedger, Tensor
from dsv3_megatron.planning.memory.settings import NOT_FP8, WIDE, LayerPrecisions, PassSettings

# ops/attention.py: queries of a tile, and what is kept of probabilities at most.
_QUERY_BLOCK = 128
_KEPT_PROBABILITY_BYTES = 64 << 20
_MASK_BYTES = _QUERY_BLOCK ** 2 * WIDE


@dataclass(frozen=True)
class Operations:
    """Operations of a run's passes on one ledger.

    Attributes:
        ledger: Ledger that the operations' tensors are on.
        s: Sizes of the run's passes.
        precisions: Precisions of the layer whose operations they are.
    """

    ledger: MemoryLedger
    s: PassSettings
    precisions: LayerPrecisions = NOT_FP8

    # -- norms -------------------------------------------------------------------------------------

    def norm(self, x: Tensor, name: str, rows: int, width: int) -> NormPass:
        """RMSNorm of x [rows, width]: keeps it and a number a row."""
        return NormPass(self, x, name, rows, width)

    # -- products ----------------------------------------------------------------------------------

    def linear(self, x: Tensor, name: str, rows: int, module: str) -> LinearPass:
        """y = x W^T with the module's weight: keeps x, in FP8 if the precision map says so of the module."""
        outputs, inputs = self.s.matrices.of(module)
        return LinearPass(self, x, name, rows, inputs, outputs, module)

    def swiglu(self, x: Tensor, name: str, rows: int, width: int, *, is_recomputed: bool = False,
               has_row_weights: bool = False) -> SwiGLUPass:
        """silu(gate) * up of x [rows, 2 width], times a weight of each row if there are any: keeps x."""
        return SwiGLUPass(self, x, name, rows, width, is_recomputed, has_row_weights)

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
        """Go back to the gradient of x."""
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

    def __init__(self, operations: Operations, x: Tensor, name: str, rows: int, inputs: int, outputs: int,
                 module: str) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.x, self.rows, self.inputs, self.outputs = operations, x, rows, inputs, outputs
        self.precision = operations.precisions.line(module)
        self.is_made_again = False
        if self.precision is not None:
            ledger.pulse(quantization_work(s, rows, inputs))
            kept = self.precision.cached_input
            # This library's modules make the FP8 copy of what is at hand again.
            self.is_made_again = kept != "bf16" and x.is_at_hand and not s.is_engine
            if kept == "bf16" or self.is_made_again:
                ledger.keep(x)
            else:
                self.x = ledger.make(f"{x.name} in FP8", quantized_bytes(rows, inputs, kept))
            ledger.pulse(product_work(s, rows, inputs, outputs) + rows * outputs * s.narrow)
            self.output = ledger.make(name, rows * outputs * s.narrow)
            return
        if s.is_wide_product:
            ledger.pulse((rows * inputs + inputs * outputs + rows * outputs) * WIDE + rows * outputs * s.narrow)
        ledger.keep(x)
        self.output = ledger.make(name, rows * outputs * s.narrow)

    def backward(self, grad: Tensor, *, may_wait: bool = True) -> Tensor:
        """dx = dy W; and dW = dy^T x added to the main gradient, on a tape later if it may."""
        ledger, s = self.operations.ledger, self.operations.s
        rows, inputs, outputs = self.rows, self.inputs, self.outputs
        ledger.need(self.x)
        is_wide = s.is_wide_product and self.precision is None
        wide_grad = rows * outputs * WIDE if is_wide else 0
        if self.precision is not None:
            ledger.pulse(quantization_work(s, rows, outputs))
            ledger.pulse(quantized_bytes(rows, outputs, "e4m3") + product_work(s, rows, outputs, inputs)
                         + rows * inputs * s.narrow)
        if is_wide:
            ledger.pulse(wide_grad + (inputs * outputs + rows * inputs) * WIDE + rows * inputs * s.narrow)
        result = ledger.make(f"gradient of {self.x.name}", rows * inputs * s.narrow)
        if may_wait and is_narrowed(self.operations, self.precision):
            ledger.pulse(self._made_again() + quantization_work(s, max(inputs, outputs), rows))
            wait_narrowed(self.operations, rows, inputs, outputs)
            ledger.drop(self.x)
        elif may_wait and s.is_piped:
            grad.references += 1
            ledger.waiting.append(lambda: self._weight_grad(grad))
        else:
            ledger.pulse(wide_grad + self._work())
            ledger.drop(self.x)
        return result

    def _weight_grad(self, grad: Tensor) -> None:
        ledger, s = self.operations.ledger, self.operations.s
        is_wide = s.is_wide_product and self.precision is None
        ledger.pulse((self.rows * self.outputs * WIDE if is_wide else 0) + self._work())
        ledger.drop(self.x, grad)

    def _made_again(self) -> int:
        """Bytes of the input's FP8 copy, where it is made again."""
        if self.precision is None or not self.is_made_again:
            return 0
        return quantized_bytes(self.rows, self.inputs, self.precision.cached_input)

    def _work(self) -> int:
        s = self.operations.s
        if self.precision is not None:
            return self._made_again() + wgrad_work(s, self.rows, self.inputs, self.outputs)
        if s.is_wide_product:
            return self.rows * self.inputs * WIDE
        # The product, and on a CPU its copy in the sum's dtype.
        return weight_grad_work(s, self.inputs * self.outputs)


def is_narrowed(operations: Operations, precision: LinearPrecision | None) -> bool:
    """Whether what a weight gradient in FP8 is made of waits for long, and so as Wgrad multiplies it."""
    s, ledger = operations.s, operations.ledger
    return (s.is_piped and ledger.defers_all and not s.is_engine
            and precision is not None and precision.wgrad == "fp8")


def wait_narrowed(operations: Operations, rows: int, inputs: int, outputs: int, num_experts: int = 1) -> None:
    """Both operands of Wgrad wait in FP8, in groups of 128 tokens of a channel, until it is computed."""
    ledger, s = operations.ledger, operations.s
    size = wgrad_operand_bytes(rows, inputs, outputs, num_experts)
    waiting = ledger.make("operands of weight gradients in FP8", size)

    def compute() -> None:
        ledger.pulse(product_work(s, outputs, -(-rows // num_experts), inputs))
        ledger.drop(waiting)

    ledger.waiting.append(compute)


def wgrad_operand_bytes(rows: int, inputs: int, outputs: int, num_experts: int = 1) -> int:
    """Both operands of Wgrad in FP8; of experts, groups of tokens begin anew with each."""
    return num_experts * quantized_bytes(inputs + outputs, -(-rows // num_experts), "e4m3")


def wgrad_work(s: PassSettings, rows: int, inputs: int, outputs: int) -> int:
    """What lives while a weight gradient in FP8 is computed: both operands, and what makes and multiplies them."""
    return wgrad_operand_bytes(rows, inputs, outputs) + max(
        quantization_work(s, max(inputs, outputs), rows), product_work(s, outputs, rows, inputs))


def quantized_bytes(rows: int, width: int, format: str) -> int:
    """Values and the scales of their 1x128 tiles."""
    values = rows * width if format == "e4m3" else -(-rows * width // 2) * 3
    return values + rows * -(-width // 128) * WIDE


def quantization_work(s: PassSettings, rows: int, width: int) -> int:
    """What lives while values are quantized: with the reference wide values and scaled ones, in whole groups."""
    padded = -(-width // 128) * 128
    return (2 * padded + width) * rows * WIDE if s.device == "cpu" else 0


def product_work(s: PassSettings, rows: int, inner: int, columns: int) -> int:
    """What lives during a product in FP8: by the reference, both operands wide, one with its table's indices."""
    if s.device == "cuda":
        return 0
    return (rows * inner + rows * columns + 3 * columns * inner) * WIDE


def weight_grad_work(s: PassSettings, numel: int) -> int:
    """What lives while a weight gradient of narrow operands is added to its fp32 sum: nothing on a GPU."""
    return 0 if s.narrow == WIDE or s.device == "cuda" else numel * (s.narrow + WIDE)


class SwiGLUPass:
    """silu(gate) * up; `output` is the caller's."""

    def __init__(self, operations: Operations, x: Tensor, name: str, rows: int, width: int, is_recomputed: bool,
                 has_row_weights: bool) -> None:
        ledger, s = operations.ledger, operations.s
        self.operations, self.x, self.numel, self.has_row_weights = operations, x, rows * width, has_row_weights
        ledger.keep(x)
        # Of a narrow input: its wide copy and the wide result, of which the narrow one is made alone.
        work = 0 if s.narrow == WIDE else self.numel * 3 * WIDE
        ledger.pulse(work)
        self.output = ledger.make(name, self.numel * s.narrow)
        if is_recomputed:
            ledger.make_again(self.output, work=work - self.output.size)

    def backward(self, _grad: Tensor) -> Tensor:
        """The result, silu and a product; with row weights the output too; of narrow ones wide operands (3 parts)."""
        ledger, s = self.operations.ledger, self.operations.s
        ledger.need(self.x)
        num_parts = 4 + self.has_row_weights + (0 if s.narrow == WIDE else 3)
        ledger.pulse(num_parts * self.numel * WIDE)
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
        ledger.pulse(_MASK_BYTES + kept + (0 if keeps_all else sum(tile_bytes(s))))
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
        """Go back to the gradients of queries, keys and values, by name; `grad` is used up."""
        ledger, s = self.operations.ledger, self.operations.s
        if self.is_recomputed:
            ledger.need(self.inputs[0])
            self.wide = self._wide_operands()
            ledger.drop(*self.inputs)
        wide_grad = ledger.make("wide gradient of context", self.numels["value"] * WIDE)
        results = {name: ledger.make(f"gradient of {name}", numel * WIDE) for name, numel in self.numels.items()}
        # Of the last tile: gradients of probabilities and scores, and of the scores before; or scores made again.
        tile, before = tile_bytes(s)
        ledger.pulse(_MASK_BYTES + (2 if probability_bytes(s)[1] else 3) * tile + before)
        ledger.drop(wide_grad)
        if s.narrow < WIDE:
            narrow = {name: ledger.make(f"gradient of {name}", numel * s.narrow) for name, numel in self.numels.items()}
            ledger.drop(*results.values())
            results = narrow
        ledger.drop(*self.wide, self.probabilities, grad)
        return results


class FusedAttentionPass:
    """A fused kernel on CUDA: keeps its operands, its result and a number a row and head. Not run: from the code.

    Where values have to be padded to the keys' width (`ops/attention_choices.py`), the padded ones are kept. Else this
    library's modules keep them as they are, a part of the tensor of keys and values; Transformer Engine's copy them.
    """

    def __init__(self, operations: Operations, query: Tensor, key: Tensor, key_value: Tensor) -> None:
        ledger, s = operations.ledger, operations.s
        rows = s.tokens * s.heads
        width = s.query if s.pads_values else s.value
        self.sizes = {"query": query.size, "key": key.size, "value": rows * width * s.narrow}
        self.value = ledger.make("values", self.sizes["value"]) if s.is_engine or s.pads_values else key_value
        self.operations, self.inputs = operations, (query, key, self.value)
        ledger.keep(query, key)
        if self.value is key_value:
            ledger.keep(key_value)
        elif s.is_recomputed("mla_up_proj"):
            ledger.make_again(self.value, work=0)
            ledger.keep(self.value)
            ledger.drop(self.value)
        self.result = ledger.make("attention result", rows * width * s.narrow)
        self.statistics = ledger.make("attention log-sum-exp", rows * WIDE)
        if s.pads_values:
            self.output = ledger.make("context", rows * s.value * s.narrow)
        else:  # it is what the projection keeps too
            self.result.references += 1
            self.result.is_held = s.holds_attention_result
            self.output = self.result

    def backward(self, grad: Tensor) -> dict[str, Tensor]:
        """Go back to the gradients of queries, keys and values, by name; `grad` is used up."""
        ledger, s = self.operations.ledger, self.operations.s
        for tensor in self.inputs:
            ledger.need(tensor)
        padded = self.sizes["value"] if s.pads_values else 0
        # The kernel sums the gradient of the queries in fp32.
        ledger.pulse(sum(self.sizes.values()) + padded + s.tokens * s.heads * s.query * WIDE)
        results = {name: ledger.make(f"gradient of {name}", size) for name, size in self.sizes.items()}
        ledger.drop(*self.inputs, self.result, self.statistics, grad)
        return results


def core_attention_pass(operations: Operations, query: Tensor, key: Tensor, key_value: Tensor
                        ) -> AttentionPass | FusedAttentionPass:
    """Core attention to whole sequences, as the device computes it."""
    kind = AttentionPass if operations.s.device == "cpu" else FusedAttentionPass
    return kind(operations, query, key, key_value)


def probability_bytes(s: PassSettings) -> tuple[int, bool]:
    """What blocked attention keeps of its scores: probabilities, or beyond a size their log-sum-exp; and whether."""
    rows = s.sequences * s.heads
    if rows * s.length ** 2 * 2 > _KEPT_PROBABILITY_BYTES:
        return rows * s.length * WIDE, False
    numbers = sum(min(_QUERY_BLOCK, s.length - first) * min(first + _QUERY_BLOCK, s.length)
                  for first in range(0, s.length, _QUERY_BLOCK))
    return rows * numbers * WIDE, True


def tile_bytes(s: PassSettings) -> tuple[int, int]:
    """Bytes of the largest tile of scores, and of the tile before it."""
    rows = s.sequences * s.heads
    fit = max(1, min(rows, (1 << 20) // (4 * _QUERY_BLOCK * s.length)))
    queries = s.length % _QUERY_BLOCK or min(_QUERY_BLOCK, s.length)
    before = min(_QUERY_BLOCK, s.length - queries) * (s.length - queries)
    return fit * queries * s.length * WIDE, fit * before * WIDE


Backward = Callable[[Tensor], Tensor]
