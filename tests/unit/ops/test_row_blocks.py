"""Blocks of rows against products of each expert's rows alone, and the shapes that products have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.row_blocks import repeating_size, row_blocks

CPU = torch.device("cpu")


def test_sizes_are_few_and_hardly_larger():
    sizes = [repeating_size(count) for count in range(1, 4097)]
    assert all(size >= count for count, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all(size <= count * 1.125 or size - count < 16 for count, size in enumerate(sizes, 1))
    assert all(repeating_size(size) == size for size in set(sizes))
    assert len(set(sizes)) == 8 + 8 * 5, "multiples of 16 up to 128, and eight to each power of two above it"


@pytest.mark.parametrize("counts", [(3, 0, 40, 17, 0), (200, 1, 130), (1,), (0, 0), (16, 32, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_of_blocks(counts, dtype):
    """Each expert's rows and only they: what a product makes of the rows behind is overwritten, or counts as zero."""
    stream = torch.Generator().manual_seed(0)
    num_rows = sum(counts)
    x, y = (torch.randint(-4, 5, (num_rows, width), generator=stream).to(dtype) for width in (6, 5))
    weights = torch.randint(-4, 5, (len(counts), 6, 5), generator=stream).to(dtype)  # small integers: sums are exact
    out = torch.full((num_rows, 5), float("nan"), dtype=dtype)
    blocks = list(row_blocks(counts, num_rows, CPU, dtype))
    assert [(block.expert, block.count) for block in blocks] == [(e, c) for e, c in enumerate(counts) if c]
    for block in blocks:
        assert block.size == (repeating_size(block.count) if dtype == torch.bfloat16 else block.count)
        assert block.of(x).shape[0] == block.size
        product = block.multiply(block.of(x), weights[block.expert], out)
        assert torch.equal(product[: block.count], x[block.rows] @ weights[block.expert])
    for block in blocks:
        assert torch.equal(out[block.rows], x[block.rows] @ weights[block.expert])
        expected = (y[block.rows].double().t() @ x[block.rows].double()).to(dtype)
        assert torch.equal(block.of(y).t() @ block.padded(x), expected)
        assert torch.equal(block.with_zeros_(block.of(y).clone()).t() @ block.of(x), expected)


class _Shapes(TorchDispatchMode):
    """Shapes of the operands of all products."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[Any, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mm:
            self.seen.add(tuple((tuple(a.shape), a.stride()) for a in args))
        return func(*args, **(kwargs or {}))


def test_shapes_of_experts_products_repeat():
    """Of experts with another number of rows at each of 20 steps, forward and both gradients."""
    stream = torch.Generator().manual_seed(0)
    fc1 = torch.randn(4, 32, 16, generator=stream).bfloat16().requires_grad_()
    fc2 = torch.randn(4, 16, 16, generator=stream).bfloat16().requires_grad_()
    shapes: dict[str, int] = {}
    for backend in ("native", "via_fp32"):
        with _Shapes() as products:
            for step in range(20):
                counts = (40 + step, 60 - step, 41 + step, 50)
                x = torch.randn(sum(counts), 16, generator=stream).bfloat16().requires_grad_()
                swiglu_experts(x, counts, fc1, fc2, product_backend=backend).sum().backward()
        shapes[backend] = len(products.seen)
    # Six products of two sizes, and two whose operand is a copy where it is the last.
    assert shapes["native"] <= 14 < 120 <= shapes["via_fp32"], shapes


def test_rows_behind_an_expert_do_not_reach_its_gradients():
    """A weight gradient of narrow rows, at once and deferred, is that of the expert's rows alone."""
    stream = torch.Generator().manual_seed(0)
    counts, deferred = (5, 30, 1), []
    fc1, fc2 = torch.randn(3, 8, 6, generator=stream), torch.randn(3, 6, 4, generator=stream)
    x = torch.randn(36, 6, generator=stream)
    expected = [weight.double().requires_grad_() for weight in (fc1, fc2)]
    swiglu_experts(x.double(), counts, *expected, backend="reference").sum().backward()
    for defer in (None, deferred.append):
        weights = [weight.bfloat16().requires_grad_() for weight in (fc1, fc2)]
        y = swiglu_experts(x.bfloat16(), counts, *weights, product_backend="native", defer_weight_grad=defer)
        y.sum().backward()
        for compute in deferred:
            compute()
        for weight, exact in zip(weights, expected, strict=True):
            assert weight.grad is not None and exact.grad is not None
            # bf16 has 8 bits; inputs, the activation and the result are rounded to it.
            torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=0.03, atol=0.03 * exact.grad.abs().max())
