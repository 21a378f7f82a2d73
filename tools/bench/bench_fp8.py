"""FP8 kernels on one Hopper GPU: correctness against the reference, speed beside cuBLAS, torch and DeepGEMM.

    gemm       M tokens times each product of DeepSeek-V3 (Fprop), in TFLOP/s; ours, cuBLAS BF16, torch's scaled_mm,
               DeepGEMM where installed, and the ratio of each to BF16
    grouped    the experts' products over 4 to 32 experts
    quantize   activations, columns, weights, SwiGLU with quantization, in GB/s and as a share of a copy's bandwidth

Every kernel is compared with the reference before it is timed; one that differs ends the run. Each timing is a median
of CUDA events with the L2 cache flushed before. Rows go to results/fp8.csv. `--tune` measures the kernel's candidate
tile sizes and every implementation per shape and writes the table that runs read (kernels/fp8_tuning.py).

Without a GPU: `--check-on-cpu` runs the comparisons on small shapes under Triton's interpreter, and `--compile`
compiles the GEMM for Hopper and prints registers, spills and shared memory. Speed has not been measured yet: not run.

Usage:
    python tools/bench/bench_fp8.py --tune
    python tools/bench/bench_fp8.py --tokens 4096 8192
    python tools/bench/bench_fp8.py --check-on-cpu
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from tools.bench.records import Measurement, append_rows  # noqa: E402

WARM_UP, REPEATS = 3, 20
# DeepGEMM's published figures on an H800, TFLOP/s, by (experts, tokens an expert, outputs, inputs).
PUBLISHED = {(1, 4096, 2112, 7168): 1058, (1, 4096, 7168, 16384): 1358, (4, 8192, 4096, 7168): 1297}


@dataclass(frozen=True)
class Product:
    """Tokens times one weight, or tokens of each expert times its weight."""

    name: str
    tokens: int
    outputs: int
    inputs: int
    experts: int = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.experts * self.tokens * self.outputs * self.inputs

    @property
    def key(self) -> tuple[int, int, int, int]:
        return self.experts, self.tokens, self.outputs, self.inputs

    def __str__(self) -> str:
        return f"{self.name} e={self.experts} m={self.tokens} n={self.outputs} k={self.inputs}"


def products(tokens: list[int], experts: list[int]) -> list[Product]:
    """DeepSeek-V3's products without the head, its experts' grouped, and those with published figures."""
    from tools.bench.shapes import V3, product_shapes

    found = []
    for shape in product_shapes(V3):
        if shape.name.startswith("expert_"):
            found += [Product(shape.name, 4096, shape.num_outputs, shape.num_inputs, count) for count in experts]
        elif shape.name != "head":
            found += [Product(shape.name, count, shape.num_outputs, shape.num_inputs) for count in tokens]
    known = {product.key for product in found}
    return found + [Product("published", m, n, k, e) for e, m, n, k in PUBLISHED if (e, m, n, k) not in known]


def small_products() -> list[Product]:
    """What the interpreter can multiply in seconds; odd on purpose."""
    return [Product("small", 37, 48, 144), Product("small", 130, 80, 272), Product("small_experts", 21, 48, 144, 3)]


def operands(product: Product, device: str) -> tuple[Any, Any, list[int], Any, Any]:
    """Quantized rows and weights, rows of each expert, and both in bf16."""
    import torch

    from dsv3_megatron.ops.fp8_groups import SQUARE
    from dsv3_megatron.ops.fp8_triton import TritonBackend

    stream = torch.Generator(device=device).manual_seed(0)
    rows = torch.randn(product.experts * product.tokens, product.inputs, generator=stream, device=device)
    shape = (product.outputs, product.inputs) if product.experts == 1 else (
        product.experts, product.outputs, product.inputs)
    weight = torch.randn(shape, generator=stream, device=device)
    backend, rows, weight = TritonBackend(), rows.bfloat16(), weight.bfloat16()
    return (backend.quantize(rows), backend.quantize(weight, SQUARE), [product.tokens] * product.experts, rows, weight)


def multiply(product: Product, a: Any, b: Any, counts: list[int], config: Any = None) -> Any:
    """The product by our kernel, in bf16."""
    import torch

    from dsv3_megatron.kernels.fp8_gemm import gemm, grouped_gemm

    if product.experts == 1:
        return gemm(a.values, a.scales, b.values, b.scales, dtype=torch.bfloat16, config=config)
    return grouped_gemm(a.values, a.scales, b.values, b.scales, counts, dtype=torch.bfloat16, config=config)


def check_product(product: Product, result: Any, a: Any, b: Any, counts: list[int], name: str) -> None:
    """Compare with the reference: sums in fp32 in another order, and one rounding to bf16.

    Raises:
        SystemExit: They differ.
    """
    import torch

    from dsv3_megatron.ops.fp8_backend import REFERENCE

    torch.backends.cuda.matmul.allow_tf32 = False
    if product.experts == 1:
        expected = REFERENCE.gemm(a, b, dtype=torch.float32)
    else:
        expected = REFERENCE.grouped_gemm(a, b, counts, dtype=torch.float32)
    error = (result.float() - expected).abs()
    # An H100's sum of 128 products keeps about 13 fraction bits.
    bound = expected.abs() * 2.0**-7 + expected.abs().mean() * 2.0**-9
    if not bool((error <= bound).all()):
        raise SystemExit(f"{name} on {product}: differs from the reference by {error.max().item():.3g} (bound "
                         f"{bound.max().item():.3g}); no timing is of use")


def check_quantization(device: str, rows: int, width: int) -> None:
    """Every quantization kernel, bit for bit.

    Raises:
        SystemExit: One differs.
    """
    import torch

    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize
    from dsv3_megatron.ops import fp8_quantize as reference
    from dsv3_megatron.ops.fp8_groups import SQUARE
    from dsv3_megatron.ops.fp8_triton import TritonBackend

    x, backend = torch.randn(rows, width, device=device), TritonBackend()
    for power_of_2 in (False, True):
        options: dict[str, Any] = {"power_of_2": power_of_2}
        cached = reference.quantize(x, **options)
        pairs = {
            "tiles": (backend.quantize(x, **options), cached),
            "blocks": (backend.quantize(x, SQUARE, **options), reference.quantize(x, SQUARE, **options)),
            "columns": (backend.quantize_columns(x, **options), reference.quantize_columns(x, **options)),
            "requantized columns": (backend.quantize_columns(cached, **options),
                                    reference.quantize_columns(cached, **options)),
        }
        *_, kept, kept_scales = swiglu_quantize(x, None, power_of_2=False, keep=True, kept_power_of_2=power_of_2)
        pairs["SwiGLU's input"] = (reference.Quantized(kept, kept_scales, (1, 128), "e4m3", (rows, width)), cached)
        for name, (got, expected) in pairs.items():
            same_scales = torch.equal(got.scales, expected.scales)
            if not (same_scales and torch.equal(got.values.float(), expected.values.float())):
                raise SystemExit(f"quantization of {name} (power_of_2={power_of_2}, [{rows}, {width}]) differs from "
                                 "the reference")
            print(f"  {name}, power_of_2={power_of_2}: equal bit for bit")


def milliseconds(function: Callable[[], Any]) -> float:
    """Median time of a call on the GPU, the L2 cache flushed before each."""
    import torch

    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    for repeat in range(WARM_UP + REPEATS):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        if repeat >= WARM_UP:
            times.append(begin.elapsed_time(end))
    return statistics.median(times)


def contenders(product: Product, a: Any, b: Any, counts: list[int], rows: Any, weight: Any
               ) -> dict[str, Callable[[], Any]]:
    """Implementations of a product by name; cuBLAS' is in BF16."""
    import importlib.util

    import torch

    from dsv3_megatron.ops.fp8_triton import IMPLEMENTATIONS

    if product.experts > 1:
        ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
        return {"cublas_bf16": lambda: torch.nn.functional.grouped_mm(rows, weight.transpose(1, 2), offs=ends),
                "triton": lambda: multiply(product, a, b, counts)}
    found: dict[str, Callable[[], Any]] = {
        "cublas_bf16": lambda: torch.mm(rows, weight.t()), "triton": lambda: multiply(product, a, b, counts)}
    for name, implementation in IMPLEMENTATIONS.items():
        if name != "deep_gemm" or importlib.util.find_spec("deep_gemm"):
            found[name] = partial(implementation, a, b)
    return found


def bench_products(chosen: list[Product]) -> list[Measurement]:
    """Check and time every implementation of every product."""
    rows = []
    for product in chosen:
        a, b, counts, wide_rows, wide_weight = operands(product, "cuda")
        base = 0.0
        for name, function in contenders(product, a, b, counts, wide_rows, wide_weight).items():
            if name != "cublas_bf16":
                check_product(product, function(), a, b, counts, name)
            speed = product.flops / milliseconds(function) * 1e-9
            base = base or speed
            rows += [Measurement(f"fp8_gemm {name}", str(product), "speed", speed, "TFLOP/s"),
                     Measurement(f"fp8_gemm {name}", str(product), "ratio to cublas_bf16", speed / base, "1")]
            published = f", published for DeepGEMM {PUBLISHED[product.key]}" if product.key in PUBLISHED else ""
            print(f"{product}: {name} {speed:.0f} TFLOP/s, {speed / base:.2f}x BF16{published}", flush=True)
    return rows


def bench_quantization(tokens: int) -> list[Measurement]:
    """Bandwidth of each quantization, beside a plain copy's."""
    import torch

    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize
    from dsv3_megatron.ops.fp8_groups import SQUARE
    from dsv3_megatron.ops.fp8_triton import TritonBackend

    backend = TritonBackend()
    x = torch.randn(tokens, 7168, device="cuda").bfloat16()
    hidden = torch.randn(tokens, 4096, device="cuda").bfloat16()
    cached, target = backend.quantize(x), torch.empty_like(x)
    copy = 2 * x.nbytes / milliseconds(lambda: target.copy_(x)) * 1e-6
    rows = [Measurement("copy", f"[{tokens}, 7168] bf16", "bandwidth", copy, "GB/s")]
    narrow = x.numel() + x.numel() // 32
    cases = {
        "tiles": (x.nbytes + narrow, lambda: backend.quantize(x)),
        "columns": (x.nbytes + narrow, lambda: backend.quantize_columns(x)),
        "requantized columns": (2 * narrow, lambda: backend.quantize_columns(cached)),
        "weight, both layouts": (x.nbytes + 2 * x.numel(), lambda: backend.quantize(x, SQUARE)),
        "SwiGLU and its input": (hidden.nbytes + hidden.numel() * 3 // 2 * 33 // 32,
                                 lambda: swiglu_quantize(hidden, None, power_of_2=False, keep=True)),
    }
    for name, (num_bytes, function) in cases.items():
        speed = num_bytes / milliseconds(function) * 1e-6
        rows += [Measurement(f"fp8_quantize {name}", f"tokens={tokens}", "bandwidth", speed, "GB/s"),
                 Measurement(f"fp8_quantize {name}", f"tokens={tokens}", "share of copy", speed / copy, "1")]
        print(f"{name}: {speed:.0f} GB/s, {speed / copy:.2f} of a copy", flush=True)
    return rows


def tune(chosen: list[Product]) -> None:
    """Time every candidate of every product and write the table of the fastest."""
    import torch

    from dsv3_megatron.kernels import fp8_tuning

    results = {}
    for product in chosen:
        a, b, counts, rows, weight = operands(product, "cuda")
        times = {}
        for config in fp8_tuning.CANDIDATES:
            try:
                check_product(product, multiply(product, a, b, counts, config), a, b, counts, str(config))
                times[config] = milliseconds(partial(multiply, product, a, b, counts, config))
            except (RuntimeError, ValueError) as error:  # too much shared memory, and the like: said, and left out
                print(f"  {config}: {error}")
        best = min(times, key=times.__getitem__)
        fastest, name = times[best], "triton"
        for other, function in contenders(product, a, b, counts, rows, weight).items():
            if other in fp8_tuning.IMPLEMENTATIONS and other != "triton" and milliseconds(function) < fastest:
                fastest, name = milliseconds(function), other
        key = fp8_tuning.shape_key(product.experts * product.tokens, product.outputs, product.inputs, product.experts)
        results[key] = fp8_tuning.Tuned(name, best)
        print(f"{product}: {name}, {best}, {product.flops / fastest * 1e-9:.0f} TFLOP/s", flush=True)
    print(f"written: {fp8_tuning.write_tuning(results, torch.cuda.get_device_name())}")


def check_on_cpu() -> None:
    """Every comparison on small shapes, under the interpreter."""
    check_quantization("cpu", 70, 512)
    for product in small_products():
        a, b, counts, *_ = operands(product, "cpu")
        check_product(product, multiply(product, a, b, counts), a, b, counts, "triton")
        print(f"  {product}: equal to tolerance")


def main(arguments: list[str] | None = None) -> int:
    """Check, tune, compile or measure, as asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="rows of the single products")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32], help="experts of the grouped ones")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes and implementations; write the table")
    parser.add_argument("--check-on-cpu", action="store_true", help="small shapes, Triton's interpreter, no timing")
    parser.add_argument("--compile", action="store_true", help="compile for Hopper, without a GPU; no timing")
    options = parser.parse_args(arguments)
    if options.check_on_cpu:
        os.environ["TRITON_INTERPRET"] = "1"
        check_on_cpu()
        return 0
    if options.compile:
        from tools.bench.compile_fp8 import compile_for_hopper

        compile_for_hopper()
        return 0
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("bench_fp8 needs CUDA: one Hopper GPU (compute capability 9.x); --check-on-cpu and --compile run without",
              file=sys.stderr)
        return 2
    chosen = products(options.tokens, options.experts)
    if options.tune:
        tune(chosen)
        return 0
    check_quantization("cuda", 4096, 7168)
    rows = bench_quantization(max(options.tokens)) + bench_products(chosen)
    print(f"written: {append_rows('fp8.csv', rows, torch.cuda.get_device_name())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
