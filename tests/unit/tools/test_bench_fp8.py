"""bench_fp8 where there is no GPU: what it says, and its comparisons under the interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(ROOT / "tools" / "bench" / "bench_fp8.py"), *arguments], text=True,
                          capture_output=True, timeout=240, env=environment, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_says_that_it_needs_a_gpu():
    result = run("--tokens", "4096")
    assert result.returncode == 2
    assert "bench_fp8 needs CUDA: one Hopper GPU" in result.stderr and not result.stdout


def test_its_comparisons_on_a_cpu():
    pytest.importorskip("triton")
    result = run("--check-on-cpu")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal bit for bit") == 10 and result.stdout.count("equal to tolerance") == 3


def test_a_wrong_product_ends_the_run():
    from tools.bench.bench_fp8 import check_product, operands, small_products

    product = small_products()[0]
    a, b, counts, *_ = operands(product, "cpu")
    right = a.dequantize() @ b.dequantize().t()
    check_product(product, right.bfloat16(), a, b, counts, "right")
    right[3, 4] += right.abs().mean()
    with pytest.raises(SystemExit, match="wrong on small e=1 m=37 n=48 k=144: differs from the reference by"):
        check_product(product, right.bfloat16(), a, b, counts, "wrong")


def test_the_shapes_are_deepseek_v3s():
    from tools.bench.bench_fp8 import PUBLISHED, products

    chosen = products([4096], [4, 32])
    assert {(p.outputs, p.inputs) for p in chosen if p.name == "attention_out"} == {(7168, 16384)}
    assert {p.experts for p in chosen if p.name == "expert_gate_up"} == {4, 32}
    assert set(PUBLISHED) <= {p.key for p in chosen}
