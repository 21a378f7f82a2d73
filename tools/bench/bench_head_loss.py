"""The head with its loss, forward and backward, on one GPU: fused, in chunks, torch's, and Liger's where installed.

DeepSeek-V3's width and vocabulary, BF16. Each is compared with the formula in fp32 on some tokens before it is timed:
one of ours that differs ends the run, another's is said and left out. Times are medians, memory is what the call takes
beyond its operands and their gradients. Rows go to results/head_loss.csv. On a GPU: not run, not measured.

Usage:
    python -m tools.bench.bench_head_loss --tokens 4096
    python -m tools.bench.bench_head_loss --smoke --no-csv       on a CPU, small: no timing of use
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dsv3_megatron.config.packages import is_installed
from tools.bench.bench_adamw import milliseconds
from tools.bench.records import Measurement, append_rows

OURS = ("fused", "chunked")
# Gradients are rounded to bf16 once, and torch's logits too: by norm, 2^-9 of a value for each rounding.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class HeadCase:
    """Operands: hidden states [T, H] and weight [V, H] in bf16, both with gradients; targets [T]."""

    hidden: Any
    weight: Any
    targets: Any


def operands(tokens: int, hidden: int, vocabulary: int, device: Any) -> HeadCase:
    """Random ones, the same whenever they are made."""
    import torch

    stream = torch.Generator(device=device).manual_seed(0)

    def random(*shape: int, scale: float) -> Any:
        return (torch.randn(shape, generator=stream, device=device) * scale).bfloat16().requires_grad_()

    return HeadCase(random(tokens, hidden, scale=1.0), random(vocabulary, hidden, scale=hidden**-0.5),
                    torch.randint(0, vocabulary, (tokens,), generator=stream, device=device))


def contenders() -> dict[str, Callable[[HeadCase], Any]]:
    """Mean losses by name."""
    import torch

    from dsv3_megatron.ops.cross_entropy import linear_cross_entropy

    def ours(backend: str) -> Callable[[HeadCase], Any]:
        return lambda case: linear_cross_entropy(case.hidden, case.weight, case.targets, backend=backend).mean()

    found: dict[str, Callable[[HeadCase], Any]] = {name: ours(name) for name in OURS}
    found["torch"] = lambda case: torch.nn.functional.cross_entropy(
        torch.nn.functional.linear(case.hidden, case.weight).float(), case.targets)
    if is_installed("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

        loss = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = lambda case: loss(case.weight, case.hidden, case.targets)
    return found


def run(function: Callable[[HeadCase], Any], case: HeadCase) -> Any:
    """One forward and backward pass into new gradients; the loss."""
    case.hidden.grad = case.weight.grad = None
    loss = function(case)
    loss.backward()
    return loss


def check(name: str, function: Callable[[HeadCase], Any], case: HeadCase) -> None:
    """Compare loss and gradients with the formula in fp32.

    Raises:
        SystemExit: They differ.
    """
    import torch

    wide = [tensor.detach().float().requires_grad_() for tensor in (case.hidden, case.weight)]
    expected = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), case.targets)
    expected.backward()
    loss = run(function, case)
    errors = {"loss": abs(loss.item() / expected.item() - 1)}
    for what, mine, other in (("hidden", case.hidden, wide[0]), ("weight", case.weight, wide[1])):
        errors[f"gradient of {what}"] = ((mine.grad.float() - other.grad).norm() / other.grad.norm()).item()
    wrong = {what: error for what, error in errors.items() if not error <= (1e-3 if what == "loss" else TOLERANCE)}
    if wrong:
        raise SystemExit(f"{name} differs from the formula: " + ", ".join(
            f"{what} by {error:.3g}" for what, error in wrong.items()) + "; no timing is of use")


def measured(name: str, function: Callable[[HeadCase], Any], small: HeadCase, case: HeadCase, is_cuda: bool
             ) -> tuple[float, float] | None:
    """Milliseconds and bytes of a contender; None, and why, where another's fails."""
    import torch

    try:
        check(name, function, small)
        run(function, case)
        before = 0
        if is_cuda:
            case.hidden.grad = case.weight.grad = None
            before = torch.cuda.memory_allocated() + case.hidden.nbytes + case.weight.nbytes
            torch.cuda.reset_peak_memory_stats()
        taken = milliseconds(lambda: run(function, case), is_cuda)
        return taken, max(0, torch.cuda.max_memory_allocated() - before) if is_cuda else 0
    except (SystemExit, RuntimeError, ValueError, TypeError, ImportError) as error:
        if name in OURS:
            raise
        print(f"{name} cannot be compared: {str(error).splitlines()[0]}; left out", flush=True)
        return None


def main(arguments: list[str] | None = None) -> int:
    """Check and time each contender; exit code 2 where it cannot run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--smoke", action="store_true", help="small sizes, on a CPU")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"
    from dsv3_megatron.platform import prepare

    device = prepare()
    if not options.smoke and not device.is_cuda:
        print("bench_head_loss needs one CUDA device; --smoke shows that it runs", file=sys.stderr)
        return 2
    tokens, hidden, vocabulary = (24, 32, 77) if options.smoke else (options.tokens, 7168, 129280)
    small = operands(min(tokens, 512), hidden, min(vocabulary, 8192), device.torch_device)
    case = operands(tokens, hidden, vocabulary, device.torch_device)
    rows, started = [], time.monotonic()
    for name, function in contenders().items():
        result = measured(name, function, small, case, device.is_cuda)
        if result is None:
            continue
        taken, size = result
        speed = 6.0 * tokens * hidden * vocabulary / taken * 1e-9
        print(f"{name}: {taken:.2f} ms forward and backward, {speed:.0f} TFLOP/s of the three products, "
              f"{size / 1e9:.2f} GB", flush=True)
        config = f"tokens={tokens} hidden={hidden} vocabulary={vocabulary} bf16"
        rows += [Measurement(f"head_loss {name}", config, "time", taken, "ms"),
                 Measurement(f"head_loss {name}", config, "speed", speed, "TFLOP/s"),
                 Measurement(f"head_loss {name}", config, "memory", size / 1e9, "GB")]
    print(f"{time.monotonic() - started:.0f} s")
    if not options.no_csv:
        print(f"written: {append_rows('head_loss.csv', rows, device.name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
