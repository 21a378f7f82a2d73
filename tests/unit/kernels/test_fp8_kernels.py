"""Triton's FP8 kernels under its interpreter, against the reference in ops/.

Values are rounded by the kernels' own arithmetic there (the interpreter's cast rounds otherwise), so they are equal
bit for bit, but for the sign of zero and where exp differs between libraries. Its cast to bf16 cuts off instead of
rounding, so results in bf16 may differ by a step, and what is quantized from bf16 results is computed in fp32 here.
"""


import pytest
import torch

from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.ops.fp8.scale_groups import SQUARE
from tests.unit.kernels.random_rows import random


def test_a_layer_and_experts_on_this_backend(backend):
    """Forward and backward through the same autograd functions as the reference's."""
    from dsv3_megatron.config.precision import LinearPrecision
    from dsv3_megatron.ops.fp8.experts import fp8_swiglu_experts
    from dsv3_megatron.ops.fp8.linear import fp8_linear

    precision, counts = LinearPrecision(input_scales="power_of_2"), [20, 0, 17]
    x, weight = random(37, 80, dtype=torch.float32), random(48, 80, seed=1, dtype=torch.float32)
    fc1, fc2 = (random(3, *shape, seed=2, dtype=torch.float32) * 0.1 for shape in ((64, 80), (80, 32)))
    gates = torch.rand(37, generator=torch.Generator().manual_seed(4))
    results = []
    for each in (backend, REFERENCE):
        leaves = [t.clone().requires_grad_() for t in (x, weight, fc1, fc2)]
        y = fp8_linear(leaves[0], leaves[1], precision, backend=each)
        z = fp8_swiglu_experts(leaves[0], counts, leaves[2], leaves[3], gates, (precision, precision), backend=each)
        (y.float().square().sum() + z.float().square().sum()).backward()
        results.append((y, z, *(leaf.grad for leaf in leaves)))
    for got, expected in zip(*results, strict=True):
        # Sums in another order move some values to the next one of E4M3.
        assert (got - expected).norm() < 2e-3 * expected.norm()


def test_bad_input(backend):
    from dsv3_megatron.kernels.fp8_gemm import gemm

    a, b = backend.quantize(random(4, 144)), backend.quantize(random(16, 144), SQUARE)
    with pytest.raises(ValueError, match="accumulation='fp22' is a model that fp8_backend=reference alone has"):
        backend.gemm(a, b, dtype=torch.float32, accumulation="fp22")
    odd = torch.zeros(4, 150, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="TMA takes contiguous rows that start at multiples of 16 bytes"):
        gemm(odd, torch.ones(4, 2), odd, torch.ones(4, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="b of shape .16, 144. with scales .1, 1. does not fit"):
        gemm(a.values, a.scales, b.values, torch.ones(1, 1), dtype=torch.float32)
