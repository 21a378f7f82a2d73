"""The output head and its loss on a CPU, forward and backward, beside torch's plain loss; and the fused way's bytes.

    python -m tools.bench.bench_head_loss_on_cpu

It takes the head of `laptop` in fp32 and bf16. Contenders take turns, so that a disturbance meets both. This library's
adds the weight's gradient to an fp32 sum; torch's leaves it in the weight's dtype. The bytes that the fused way moves
at V3's size are counted, on any machine. What runs on a GPU is timed by `bench_head_loss.py`.
"""

from __future__ import annotations

import argparse
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
    return {
        "torch": lambda h, w, t: torch.nn.functional.cross_entropy((h @ w.t()).float(), t, reduction="sum"),
        "dsv3_megatron": lambda h, w, t: linear_cross_entropy(h, w, t, accumulate_into_main_grad=True).sum(),
    }


def measure(dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int, *, rounds: int) -> list[Measurement]:
    """Time all contenders in turn, in seconds of the process."""
    h = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    weight = torch.nn.Parameter((torch.randn(vocabulary, hidden) * 0.02).to(dtype))
    targets = torch.randint(0, vocabulary, (tokens,))
    seconds: dict[str, list[float]] = {name: [] for name in contenders()}
    for _ in range(rounds + 1):
        for name, loss in contenders().items():
            h.grad = weight.grad = None
            weight.main_grad = torch.zeros(weight.shape)  # type: ignore[attr-defined]
            start = time.process_time()
            loss(h, weight, targets).backward()
            seconds[name].append(time.process_time() - start)
    config = f"{str(dtype).removeprefix('torch.')} tokens={tokens} hidden={hidden} vocabulary={vocabulary}"
    return [Measurement(name, config, metric, of(own[1:]), "s") for name, own in seconds.items()
            for metric, of in (("time_median", statistics.median), ("time_min", min), ("time_max", max))]


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
    parser.add_argument("--tokens", type=int, default=512, help="tokens")
    parser.add_argument("--no-csv", action="store_true", help="print only")
    options = parser.parse_args()
    load = load_average()
    measured = [row for dtype in (torch.float32, torch.bfloat16)
                for row in measure(dtype, options.tokens, LAPTOP.hidden_size, LAPTOP.vocab_size, rounds=options.rounds)]
    for row in (*measured, *counted()):
        print(f"{row.name:20} {row.config:60} {row.metric:30} {row.value:10.4g} {row.unit}")
    if not options.no_csv:
        device = f"{detect_device().name}, {torch.get_num_threads()} threads, load {load:.1f}"
        append_rows("head_loss.csv", measured, device)
        append_rows("head_loss.csv", counted(), "any (computed)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
