"""The output head and its loss, forward and backward: torch's plain loss, Liger's where installed, and this library's.

    python -m tools.bench.bench_head_loss

On a CPU it takes the head of `laptop` in fp32 and bf16, on a GPU that of DeepSeek-V3 in bf16. Contenders take turns,
so that a disturbance meets all. This library's adds the weight's gradient to an fp32 sum; of the others the gradient
in the weight's dtype is what is left. The bytes that the fused way moves at V3's size are counted, on any machine. On
a GPU: not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable

import torch

from dsv3_megatron.kernels.head_loss_tiles import fused_bytes
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy
from dsv3_megatron.platform import detect_device
from tools.bench.records import Measurement, append_rows, load_average
from tools.bench.shapes import LAPTOP, V3

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def contenders() -> dict[str, Loss]:
    """Sums of the tokens' losses, by who computes them."""
    found: dict[str, Loss] = {
        "torch": lambda h, w, t: torch.nn.functional.cross_entropy((h @ w.t()).float(), t, reduction="sum"),
        "dsv3_megatron": lambda h, w, t: linear_cross_entropy(h, w, t, accumulate_into_main_grad=True).sum(),
    }
    if importlib.util.find_spec("liger_kernel") is not None and torch.cuda.is_available():
        from liger_kernel.transformers import (  # type: ignore[import-not-found]
            LigerFusedLinearCrossEntropyLoss,
        )

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        found["Liger"] = lambda h, w, t: liger(w, h, t)
    return found


def measure(dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int, *, rounds: int) -> list[Measurement]:
    """Time all contenders in turn, in seconds of the process on a CPU, of the clock on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    h = torch.randn(tokens, hidden, device=device).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(vocabulary, hidden, device=device) * 0.02).to(dtype))
    targets = torch.randint(0, vocabulary, (tokens,), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders()}
    for _ in range(rounds + 1):
        for name, loss in contenders().items():
            h.grad = weight.grad = None
            weight.main_grad = torch.zeros(weight.shape, device=device)  # type: ignore[attr-defined]
            start = _now(device)
            loss(h, weight, targets).backward()
            seconds[name].append(_now(device) - start)
    config = f"{str(dtype).removeprefix('torch.')} tokens={tokens} hidden={hidden} vocabulary={vocabulary}"
    return [Measurement(name, config, metric, of(own[1:]), "s") for name, own in seconds.items()
            for metric, of in (("time_median", statistics.median), ("time_min", min), ("time_max", max))]


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def counted() -> list[Measurement]:
    """Bytes a logit of the fused way at V3's size, one micro-batch of 4096 tokens, by what they are for."""
    rows = []
    for ranks in (1, 2, 4, 8):
        vocabulary = V3.vocab_size // ranks
        moved = fused_bytes(4096, V3.hidden_size, vocabulary)
        rows += [Measurement("dsv3_megatron fused", f"V3 tokens=4096 TP{ranks}", f"bytes_a_logit_{name}",
                             getattr(moved, name) / (4096 * vocabulary), "B")
                 for name in ("of_logits", "partial_sums", "gradients", "hidden_gradient", "weight", "hidden",
                              "main_gradient", "total")]
    return rows


def main() -> int:
    """Measure, print and append to results/head_loss.csv."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each contender")
    parser.add_argument("--tokens", type=int, default=None, help="tokens; 1024 on a CPU, 4096 on a GPU")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    on_gpu, load = torch.cuda.is_available(), load_average()
    model, dtypes = (V3, [torch.bfloat16]) if on_gpu else (LAPTOP, [torch.float32, torch.bfloat16])
    tokens = options.tokens or (4096 if on_gpu else 1024)
    measured = [row for dtype in dtypes
                for row in measure(dtype, tokens, model.hidden_size, model.vocab_size, rounds=options.rounds)]
    for row in (*measured, *counted()):
        print(f"{row.name:20} {row.config:60} {row.metric:30} {row.value:10.4g} {row.unit}")
    if not options.no_csv:
        device = f"{detect_device().name}, {torch.get_num_threads()} threads, load {load:.1f}"
        append_rows("head_loss.csv", measured, device)
        append_rows("head_loss.csv", counted(), "any (computed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
