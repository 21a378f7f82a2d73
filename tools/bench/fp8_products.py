"""The FP8 products that benchmarks time: DeepSeek-V3's shapes, who computes them, their comparison with the reference.

    fprop    tokens times a weight: 1x128 tiles and 128x128 blocks, bf16 out (Dgrad is the same with other widths)
    grouped  each expert's tokens times its weight
    wgrad    gradients times inputs over tokens: tiles on both sides, added to an fp32 gradient
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from dsv3_megatron.config.packages import is_installed

# DeepGEMM's published figures on an H800, TFLOP/s, by (experts, tokens an expert, outputs, inputs).
PUBLISHED = {(1, 4096, 2112, 7168): 1058, (1, 4096, 7168, 16384): 1358, (4, 8192, 4096, 7168): 1297}
BF16 = "cublas_bf16"


@dataclass(frozen=True)
class Product:
    """One product; `kind` as above."""

    name: str
    tokens: int
    outputs: int
    inputs: int
    experts: int = 1
    kind: str = "fprop"

    @property
    def flops(self) -> float:
        return 2.0 * self.experts * self.tokens * self.outputs * self.inputs

    @property
    def published(self) -> int | None:
        """DeepGEMM's figure for this shape, TFLOP/s."""
        return None if self.kind == "wgrad" else PUBLISHED.get((self.experts, self.tokens, self.outputs, self.inputs))

    @property
    def is_large(self) -> bool:
        """Whether the target of 1.6 times BF16 is meant: enough of each dimension to fill the matrix units."""
        return min(self.tokens, self.outputs, self.inputs) >= 2048

    @property
    def tuning_key(self) -> str:
        """Under which a run looks up what was measured for it."""
        from dsv3_megatron.kernels.fp8_tuning import shape_key

        if self.kind == "wgrad":
            return shape_key(self.outputs, self.inputs, self.tokens, 1, adds=True)
        return shape_key(self.experts * self.tokens, self.outputs, self.inputs, self.experts)

    def __str__(self) -> str:
        return f"{self.kind} {self.name} e={self.experts} m={self.tokens} n={self.outputs} k={self.inputs}"


@dataclass(frozen=True)
class Operands:
    """A product's operands: quantized, rows of each expert, and in bf16 [rows, K] and [(e,) N, K]."""

    a: Any
    b: Any
    counts: list[int]
    wide_a: Any
    wide_b: Any


def products(tokens: list[int], experts: list[int]) -> list[Product]:
    """DeepSeek-V3's products without the head, its experts' grouped, and those with published figures."""
    from tools.bench.shapes import V3, product_shapes

    found = []
    for shape in product_shapes(V3):
        if shape.name == "head":
            continue
        if shape.name.startswith("expert_"):
            found += [Product(shape.name, 4096, shape.num_outputs, shape.num_inputs, count, "grouped")
                      for count in experts]
            found.append(Product(shape.name, 4096, shape.num_outputs, shape.num_inputs, kind="wgrad"))
        else:
            found += [Product(shape.name, count, shape.num_outputs, shape.num_inputs, kind=kind)
                      for count in tokens for kind in ("fprop", "wgrad")]
    known = {(product.experts, product.tokens, product.outputs, product.inputs) for product in found}
    return found + [Product("published", m, n, k, e, "fprop" if e == 1 else "grouped")
                    for e, m, n, k in PUBLISHED if (e, m, n, k) not in known]


def small_products() -> list[Product]:
    """What the interpreter can multiply in seconds; odd on purpose."""
    return [Product("small", 37, 48, 144), Product("small", 130, 80, 272),
            Product("small_experts", 21, 48, 144, 3, "grouped"), Product("small", 70, 48, 80, kind="wgrad")]


def operands(product: Product, device: str) -> Operands:
    """Random ones, the same whenever they are made."""
    import torch

    from dsv3_megatron.ops.fp8.scale_groups import SQUARE
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    stream = torch.Generator(device=device).manual_seed(0)
    backend = TritonBackend()

    def random(*shape: int) -> Any:
        return torch.randn(shape, generator=stream, device=device).bfloat16()

    if product.kind == "wgrad":
        grad, x = random(product.tokens, product.outputs), random(product.tokens, product.inputs)
        return Operands(backend.quantize_columns(grad), backend.quantize_columns(x), [], grad.t(), x.t())
    rows = random(product.experts * product.tokens, product.inputs)
    shape = (product.outputs, product.inputs) if product.kind == "fprop" else (
        product.experts, product.outputs, product.inputs)
    weight = random(*shape)
    return Operands(backend.quantize(rows), backend.quantize(weight, SQUARE), [product.tokens] * product.experts, rows,
                    weight)


def multiply(product: Product, given: Operands, config: Any = None, total: Any = None) -> Any:
    """The product by our kernel; of wgrad added to `total`, a new one of zeros where there is none."""
    import torch

    from dsv3_megatron.kernels.fp8_gemm import gemm, grouped_gemm

    a, b = given.a, given.b
    if product.kind == "grouped":
        return grouped_gemm(a.values, a.scales, b.values, b.scales, given.counts, dtype=torch.bfloat16, config=config)
    if product.kind == "wgrad":
        if total is None:
            total = torch.zeros(product.outputs, product.inputs, device=a.values.device)
        return gemm(a.values, a.scales, b.values, b.scales, dtype=torch.float32, add_to=total, config=config)
    return gemm(a.values, a.scales, b.values, b.scales, dtype=torch.bfloat16, config=config)


def check_product(product: Product, result: Any, given: Operands, name: str) -> None:
    """Compare with the reference: sums in fp32 in another order, and one rounding to bf16.

    Raises:
        SystemExit: They differ.
    """
    import torch

    from dsv3_megatron.ops.fp8.reference_backend import REFERENCE

    torch.backends.cuda.matmul.allow_tf32 = False
    if product.kind == "grouped":
        expected = REFERENCE.grouped_gemm(given.a, given.b, given.counts, dtype=torch.float32)
    else:
        expected = REFERENCE.gemm(given.a, given.b, dtype=torch.float32)
    error = (result.float() - expected).abs()
    # An H100's sum of 128 products keeps about 13 fraction bits.
    bound = expected.abs() * 2.0**-7 + expected.abs().mean() * 2.0**-9
    if not bool((error <= bound).all()):
        raise SystemExit(f"{name} on {product}: differs from the reference by {error.max().item():.3g} (bound "
                         f"{bound.max().item():.3g}); no timing is of use")


def contenders(product: Product, given: Operands) -> dict[str, Callable[[], Any]]:
    """Implementations of a product by name, cuBLAS' in BF16 first."""
    import torch

    from dsv3_megatron.ops.fp8 import triton_backend as fp8_triton

    if product.kind == "wgrad":
        total = torch.zeros(product.outputs, product.inputs, device=given.wide_a.device)
        return {BF16: lambda: torch.addmm(total, given.wide_a, given.wide_b.t(), out_dtype=torch.float32),
                "triton": lambda: multiply(product, given, total=total)}
    found: dict[str, Callable[[], Any]] = {}
    if product.kind == "grouped":
        ends = torch.tensor(given.counts, device=given.wide_a.device).cumsum(0).to(torch.int32)
        found[BF16] = lambda: torch.nn.functional.grouped_mm(given.wide_a, given.wide_b.transpose(1, 2), offs=ends)
        others: dict[str, Callable[..., Any]] = fp8_triton.GROUPED_IMPLEMENTATIONS
        arguments: tuple[Any, ...] = (given.a, given.b, given.counts)
    else:
        found[BF16] = lambda: torch.mm(given.wide_a, given.wide_b.t())
        others, arguments = fp8_triton.IMPLEMENTATIONS, (given.a, given.b)
    found["triton"] = lambda: multiply(product, given)
    for name, implementation in others.items():
        if name != "deep_gemm" or is_installed("deep_gemm"):
            found[name] = partial(implementation, *arguments)
    return found
