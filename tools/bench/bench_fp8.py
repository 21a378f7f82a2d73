"""FP8 kernels on one Hopper GPU: correctness against the reference, speed beside cuBLAS, torch and DeepGEMM.

    gemm       M tokens times each product of DeepSeek-V3 (Fprop), and over tokens (Wgrad), in TFLOP/s; ours, cuBLAS
               BF16, torch's scaled_mm, DeepGEMM where installed, and the ratio of each to BF16
    grouped    the experts' products over 4 to 32 experts
    quantize   activations, columns, weights, E5M6, SwiGLU with quantization, records in the order of experts, in GB/s
               and as a share of a copy's bandwidth

Every kernel is compared with the reference before it is timed; one of ours that differs ends the run, another's that
differs or fails is said and left out. Each timing is a median of CUDA events with the L2 cache flushed before. Rows go
to results/fp8.csv, and the targets are printed as met or missed: the fastest that a run can choose at least 1.6 times
cuBLAS BF16 on large shapes and within 15% of DeepGEMM's published figures (those are of an H800), quantization at 80%
of a copy. `--tune` measures the kernel's candidate tile sizes and every implementation per shape and writes the table
that runs read (kernels/fp8_tuning.py).

Without a GPU: `--check-on-cpu` runs the comparisons on small shapes under Triton's interpreter, and `--compile`
compiles the kernels for Hopper and prints registers, spills and shared memory. Speed: not run, not measured.

Usage:
    python -m tools.bench.bench_fp8 --tune
    python -m tools.bench.bench_fp8 --tokens 4096 8192
    python -m tools.bench.bench_fp8 --check-on-cpu
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
from tools.bench.fp8_products import (  # noqa: E402
    BF16,
    Product,
    check_product,
    contenders,
    multiply,
    operands,
    products,
    small_products,
)
from tools.bench.records import Measurement, append_rows  # noqa: E402

WARM_UP, REPEATS = 3, 20
# Milliseconds of a call.
Timer = Callable[[Callable[[], Any]], float]
GEMM_TARGET, PUBLISHED_TARGET, COPY_TARGET = 1.6, 0.85, 0.8


def check_quantization(device: str, rows: int, width: int) -> None:
    """Every quantization kernel, bit for bit.

    Raises:
        SystemExit: One differs.
    """
    import torch

    from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
    from dsv3_megatron.ops.fp8.scale_groups import SQUARE
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    x, backend = torch.randn(rows, width, device=device), TritonBackend()
    token_of_row = torch.randperm(rows * 8, device=device) % rows
    for power_of_2 in (False, True):
        options: dict[str, Any] = {"power_of_2": power_of_2}
        cached, packed = (REFERENCE.quantize(x, format=format, **options) for format in ("e4m3", "e5m6"))
        cases: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
            "tiles": ("quantize", (x,), options),
            "blocks": ("quantize", (x, SQUARE), options),
            "tiles in E5M6": ("quantize", (x,), options | {"format": "e5m6"}),
            "columns": ("quantize_columns", (x,), options),
            "requantized columns": ("quantize_columns", (cached,), options),
            "requantized columns of E5M6": ("quantize_columns", (packed,), options),
            "SwiGLU's input": ("quantize_swiglu", (x, None), options),
        }
        for name, (method, given, flags) in cases.items():
            got, expected = (getattr(each, method)(*given, **flags) for each in (backend, REFERENCE))
            if method == "quantize_swiglu":
                got, expected = got[1], expected[1]
            same_scales = torch.equal(got.scales, expected.scales)
            if not (same_scales and torch.equal(got.values.float(), expected.values.float())):
                raise SystemExit(f"quantization of {name} (power_of_2={power_of_2}, [{rows}, {width}]) differs from "
                                 "the reference")
            print(f"  {name}, power_of_2={power_of_2}: equal bit for bit")
    for name, order in (("records", None), ("records in the order of experts", token_of_row)):
        made, expected = (each.unpack_rows(each.pack_rows(x, order), width, torch.bfloat16)
                          for each in (backend, REFERENCE))
        if not torch.equal(made, expected):
            raise SystemExit(f"{name} ([{rows}, {width}]) differ from the reference")
        print(f"  {name}: equal bit for bit")


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


def bench_products(chosen: list[Product]) -> list[Measurement]:
    """Check and time every implementation of every product."""
    rows = []
    for product in chosen:
        given, base, best = operands(product, "cuda"), 0.0, ("none", 0.0)
        for name, function in contenders(product, given).items():
            speed = checked_speed(product, given, name, function)
            if speed is None:
                continue
            base = speed if name == BF16 else base
            ratio = speed / base if base else float("nan")
            if name != BF16:
                best = max(best, (name, speed), key=lambda entry: entry[1])
            rows += [Measurement(f"fp8_gemm {name}", str(product), "speed", speed, "TFLOP/s"),
                     Measurement(f"fp8_gemm {name}", str(product), "ratio to cublas_bf16", ratio, "1")]
            published = ""
            if product.published and name != BF16:
                rows += [Measurement("fp8_gemm published deep_gemm on H800", str(product), "speed", product.published,
                                     "TFLOP/s"),
                         Measurement(f"fp8_gemm {name}", str(product), "ratio to published deep_gemm",
                                     speed / product.published, "1")]
                published = f", {speed / product.published:.2f} of DeepGEMM's published {product.published}"
            print(f"{product}: {name} {speed:.0f} TFLOP/s, {ratio:.2f}x BF16{published}", flush=True)
        print("\n".join(gemm_verdicts(product, *best, base)), flush=True)
    return rows


def checked_speed(product: Product, given: Any, name: str, function: Callable[[], Any],
                  time: Timer = milliseconds) -> float | None:
    """TFLOP/s of an implementation that agrees with the reference; None, and why, where another's fails.

    Raises:
        SystemExit: Our kernel differs from the reference.
    """
    try:
        # A weight gradient is added to one of zeros: the first call gives the product alone.
        result = function()
        if name != BF16:
            check_product(product, result, given, name)
        return product.flops / time(function) * 1e-9
    except SystemExit as error:
        if name == "triton":
            raise
        print(f"{error}; left out")
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        if name == "triton":
            raise
        print(f"{product}: {name} cannot run: {str(error).splitlines()[0]}; left out")
    return None


def gemm_verdicts(product: Product, name: str, speed: float, base: float) -> list[str]:
    """Whether the fastest that a run can choose meets the targets for this product."""
    lines = []
    if product.is_large and base:
        lines.append(f"  target {GEMM_TARGET}x BF16: {_verdict(speed / base, GEMM_TARGET)} by {name}")
    if product.published:
        lines.append(f"  target {PUBLISHED_TARGET} of the published {product.published} TFLOP/s: "
                     f"{_verdict(speed / product.published, PUBLISHED_TARGET)} by {name}")
    return lines


def _verdict(value: float, target: float) -> str:
    return f"{'met' if value >= target else 'missed'} ({value:.2f})"


def bench_quantization(tokens: int) -> list[Measurement]:
    """Bandwidth of each quantization, beside a plain copy's."""
    import torch

    from dsv3_megatron.ops.fp8.scale_groups import SQUARE
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    backend = TritonBackend()
    x = torch.randn(tokens, 7168, device="cuda").bfloat16()
    hidden = torch.randn(tokens, 4096, device="cuda").bfloat16()
    order = torch.arange(tokens, device="cuda").repeat(8)[torch.randperm(tokens * 8, device="cuda")]
    cached, packed, target = backend.quantize(x), backend.quantize(x, format="e5m6"), torch.empty_like(x)
    records = backend.pack_rows(x)
    rows_TK = order.argsort(stable=True).view(tokens, -1).int()
    copy = 2 * x.nbytes / milliseconds(lambda: target.copy_(x)) * 1e-6
    rows = [Measurement("copy", f"[{tokens}, 7168] bf16", "bandwidth", copy, "GB/s")]
    narrow = x.numel() + x.numel() // 32
    from dsv3_megatron.kernels.fp8_packed_rows import pack_records

    cases = {
        "tiles": (x.nbytes + narrow, lambda: backend.quantize(x)),
        "tiles in E5M6": (x.nbytes + packed.num_bytes, lambda: backend.quantize(x, format="e5m6")),
        "columns": (x.nbytes + narrow, lambda: backend.quantize_columns(x)),
        "requantized columns": (2 * narrow, lambda: backend.quantize_columns(cached)),
        "requantized columns of E5M6": (packed.num_bytes + narrow, lambda: backend.quantize_columns(packed)),
        "weight, both layouts": (x.nbytes + 2 * x.numel(), lambda: backend.quantize(x, SQUARE)),
        "SwiGLU and its input": (hidden.nbytes + hidden.numel() * 3 // 2 * 33 // 32,
                                 lambda: backend.quantize_swiglu(hidden, None, power_of_2=False)),
        "records in the order of experts": (x.nbytes + 8 * records.nbytes, lambda: pack_records(x, rows_TK)),
        "rows of records": (records.nbytes + x.nbytes, lambda: backend.unpack_rows(records, 7168, torch.bfloat16)),
    }
    for name, (num_bytes, function) in cases.items():
        speed = num_bytes / milliseconds(function) * 1e-6
        rows += [Measurement(f"fp8_quantize {name}", f"tokens={tokens}", "bandwidth", speed, "GB/s"),
                 Measurement(f"fp8_quantize {name}", f"tokens={tokens}", "share of copy", speed / copy, "1")]
        print(f"{name}: {speed:.0f} GB/s of a copy's {copy:.0f}; target {COPY_TARGET} of it: "
              f"{_verdict(speed / copy, COPY_TARGET)}", flush=True)
    return rows


def tune(chosen: list[Product], time: Timer = milliseconds, device: str = "cuda") -> None:
    """Time every candidate of every product and write the table of the fastest."""
    import torch

    from dsv3_megatron.kernels import fp8_tuning

    results = {}
    for product in chosen:
        given, times = operands(product, device), {}
        for config in fp8_tuning.CANDIDATES:
            try:
                check_product(product, multiply(product, given, config), given, str(config))
                times[config] = time(partial(multiply, product, given, config))
            except (RuntimeError, ValueError) as error:  # too much shared memory, and the like: said, and left out
                print(f"  {config}: {error}")
        if not times:
            raise SystemExit(f"{product}: no candidate of the kernel runs on this device")
        best = min(times, key=times.__getitem__)
        fastest, name = times[best], "triton"
        for other, function in contenders(product, given).items():
            if other not in (BF16, "triton"):
                speed = checked_speed(product, given, other, function, time)
                if speed is not None and product.flops / speed * 1e-9 < fastest:
                    fastest, name = product.flops / speed * 1e-9, other
        results[product.tuning_key] = fp8_tuning.Tuned(name, best)
        print(f"{product}: {name}, {best}, {product.flops / fastest * 1e-9:.0f} TFLOP/s", flush=True)
    name = torch.cuda.get_device_name() if device == "cuda" else device
    print(f"written: {fp8_tuning.write_tuning(results, name)}")


def compare_configurations(chosen: list[Product], time: Timer = milliseconds, device: str = "cuda"
                           ) -> list[Measurement]:
    """Check and time the kernel's few named configurations, of which the table of tile sizes may come to have any."""
    from dsv3_megatron.kernels.fp8_tuning import NAMED_CONFIGURATIONS

    rows = []
    for config in NAMED_CONFIGURATIONS:
        for product in chosen:
            given = operands(product, device)
            try:
                check_product(product, multiply(product, given, config), given, str(config))
                speed = product.flops / time(partial(multiply, product, given, config)) * 1e-9
            except (RuntimeError, ValueError) as error:  # too much shared memory, and the like: said, and left out
                print(f"{product}: {config}: {str(error).splitlines()[0]}", flush=True)
                continue
            print(f"{product}: {config}: {speed:.0f} TFLOP/s", flush=True)
            rows.append(Measurement(f"fp8_gemm triton {config}", str(product), "speed", speed, "TFLOP/s"))
    return rows


def check_on_cpu() -> None:
    """Every comparison on small shapes, under the interpreter."""
    check_quantization("cpu", 70, 512)
    for product in small_products():
        given = operands(product, "cpu")
        check_product(product, multiply(product, given), given, "triton")
        print(f"  {product}: equal to tolerance")


def main(arguments: list[str] | None = None) -> int:
    """Check, tune, compile or measure, as asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="rows of the single products")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32], help="experts of the grouped ones")
    parser.add_argument("--tune", action="store_true", help="measure tile sizes and implementations; write the table")
    parser.add_argument("--configurations", action="store_true", help="time the kernel's few named configurations")
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
    if options.configurations:
        shown = [product for product in chosen if product.name in ("attention_out", "expert_gate_up")]
        append_rows("fp8.csv", compare_configurations(shown), torch.cuda.get_device_name())
        return 0
    check_quantization("cuda", 4096, 7168)
    # What is measured is on disk at once: a session with little time may end this at any moment.
    for measure in (partial(bench_quantization, max(options.tokens)),
                    *(partial(bench_products, [product]) for product in chosen)):
        path = append_rows("fp8.csv", measure(), torch.cuda.get_device_name())
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
