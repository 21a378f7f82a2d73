"""Local modules on the GPU: each operation against its reference there, the whole model against itself on the CPU.

Legend: S sequence, B micro-batch, N heads, D query and key width, R routed rows, H hidden, F expert hidden, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.gpu.device import DEVICE, IS_REHEARSED

pytestmark = pytest.mark.gpu

# Unit roundoff is 2^-8 in bf16 (numbers are rounded to 8 bits) and 2^-24 in fp32; the products of fp32 tensors here are
# not rounded to TF32 (torch's default). An operation rounds its result and, backward, a few intermediate tensors.
OPERATION_TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
# The same step on a CPU in bf16 with the same choices of experts is 3.3% off in its worst gradient (a router's, whose
# terms nearly cancel), 1.9% in the median, and 4e-4 nats in its loss of 8.76.
BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS = 0.08, 0.04, 5e-3
# fp32 with sums in another order, through four layers, is 2e-6 off on a CPU.
FP32_GRADIENT, FP32_LOSS = 1e-4, 1e-5
DTYPES = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float32, id="fp32")]


def check_operation(actual_of: Callable[..., torch.Tensor], reference_of: Callable[..., torch.Tensor],
                    shapes: list[tuple[int, ...]], dtype: torch.dtype, relative_error: Callable[..., float]) -> None:
    """Outputs and gradients on the GPU in `dtype`, against the reference on the GPU in float64."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    actual = [value.clone().to(DEVICE).requires_grad_() for value in values]
    wide = [value.double().to(DEVICE).requires_grad_() for value in values]
    output, expected = actual_of(*actual), reference_of(*wide)
    weight = torch.randn(expected.shape, generator=generator).to(DEVICE)
    (output.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    tolerance = OPERATION_TOLERANCE[dtype]
    assert relative_error(output.detach(), expected.detach()) <= tolerance
    for index, (ours, theirs) in enumerate(zip(actual, wide, strict=True)):
        assert ours.grad is not None and theirs.grad is not None
        error = relative_error(ours.grad, theirs.grad)
        assert error <= tolerance, f"gradient of input {index}: {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("widths", [(96, 64), (192, 128)], ids=["laptop", "dsv3-671b"])
@pytest.mark.parametrize("length", [200, 1024])
def test_attention(runs, dtype, widths, length):
    from dsv3_megatron.ops.attention import causal_attention, reference_attention

    scale = widths[0] ** -0.5
    check_operation(
        lambda q, k, v: causal_attention(q, k, v, softmax_scale=scale),
        lambda q, k, v: reference_attention(q, k, v, scale),
        [(length, 2, 4, widths[0]), (length, 2, 4, widths[0]), (length, 2, 4, widths[1])], dtype, runs.relative_error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_isolated_documents(runs, dtype):
    """Two sequences, each with documents of its own."""
    from dsv3_megatron.ops.attention import causal_attention

    scale, bounds = 96 ** -0.5, ((0, 200), (0, 1, 130, 200))
    check_operation(
        lambda q, k, v: causal_attention(q, k, v, softmax_scale=scale, document_bounds=bounds),
        lambda q, k, v: causal_attention(q, k, v, softmax_scale=scale, document_bounds=bounds, backend="reference"),
        [(200, 2, 4, 96), (200, 2, 4, 96), (200, 2, 4, 64)], dtype, runs.relative_error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [(64, 64, 64, 64), (1, 130, 0, 77), (0, 0, 0, 3), (0, 0, 0, 0)], ids=str)
def test_experts(runs, dtype, counts):
    """Counts that no alignment divides, and experts that got nothing."""
    from dsv3_megatron.ops.experts import reference_experts, swiglu_experts

    rows, hidden, width = sum(counts), 128, 96
    check_operation(
        lambda x, fc1, fc2, gates: swiglu_experts(x, counts, fc1 * 0.1, fc2 * 0.1, gates.float()),
        lambda x, fc1, fc2, gates: reference_experts(x, counts, fc1 * 0.1, fc2 * 0.1, gates),
        [(rows, hidden), (4, 2 * width, hidden), (4, hidden, width), (rows,)], dtype, runs.relative_error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm(runs, dtype):
    from dsv3_megatron.ops.rms_norm import reference_rms_norm, rms_norm

    check_operation(rms_norm, reference_rms_norm, [(64, 2, 512), (512,)], dtype, runs.relative_error)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rope(runs, dtype):
    from dsv3_megatron.ops.rope import apply_rope, reference_rope

    angles_SP = torch.outer(torch.arange(64), 10000.0 ** (-torch.arange(16) / 16)).to(DEVICE)
    check_operation(lambda x: apply_rope(x, angles_SP.cos(), angles_SP.sin()),
                    lambda x: reference_rope(x, angles_SP.cos().double(), angles_SP.sin().double()),
                    [(64, 2, 4, 96)], dtype, runs.relative_error)


@pytest.mark.parametrize("backend, dtype, keep", [
    ("fused", torch.bfloat16, False), ("chunked", torch.bfloat16, True), ("chunked", torch.bfloat16, False),
    ("chunked", torch.float32, True), ("chunked", torch.float32, False)], ids=str)
def test_cross_entropy(runs, backend, dtype, keep):
    if backend == "fused" and IS_REHEARSED:
        pytest.skip("tests/unit/kernels/test_head_loss.py runs these kernels under the interpreter, at smaller sizes")
    from dsv3_megatron.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy

    targets_T = torch.randint(0, 1000, (600,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    check_operation(
        lambda hidden, weight: linear_cross_entropy(hidden, weight * 0.1, targets_T, keep_probabilities=keep,
                                                    backend=backend),
        lambda hidden, weight: reference_cross_entropy(hidden @ (weight * 0.1).t(), targets_T),
        [(600, 128), (1000, 128)], dtype, runs.relative_error)


def test_model_in_fp32(runs, cpu_step):
    step = runs.model_step(runs.run_config(precision="fp32"), cpu_step.choices_TK)
    assert runs.share_of_equal_choices(step, cpu_step) > 0.999
    check_model_step(runs, step, cpu_step, FP32_GRADIENT, FP32_GRADIENT, FP32_LOSS)


def test_model_in_bf16(runs, cpu_step):
    step = runs.model_step(runs.run_config(precision="bf16"), cpu_step.choices_TK)
    # Of the CPU's own choices in bf16 and in fp32, 99.5% are equal.
    assert runs.share_of_equal_choices(step, cpu_step) > 0.97
    check_model_step(runs, step, cpu_step, BF16_GRADIENT, BF16_MEDIAN_GRADIENT, BF16_LOSS)


def check_model_step(runs, step, expected, worst: float, median: float, loss: float) -> None:
    """Losses (difference in nats) and gradients (by norm) within tolerances."""
    assert step.gradients.keys() == expected.gradients.keys()
    assert abs(step.main - expected.main) <= loss and abs(step.mtp - expected.mtp) <= loss
    errors = {name: runs.relative_error(gradient, expected.gradients[name])
              for name, gradient in step.gradients.items()}
    names = sorted(errors, key=errors.__getitem__)
    print(f"gradients: median error {errors[names[len(names) // 2]]:.3g}, worst {errors[names[-1]]:.3g} ({names[-1]})")
    assert errors[names[-1]] <= worst, (names[-1], errors[names[-1]])
    assert errors[names[len(names) // 2]] <= median
