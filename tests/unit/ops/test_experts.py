"""ops/experts.py against the row-by-row version in float64."""

import pytest
import torch

from dsv3_megatron.ops.experts import _grouped_weight_grad, few_rows_experts, reference_experts, swiglu_experts
from tests.unit.ops.gpu_operations import noted_on_a_gpu

COUNTS = [3, 0, 5, 1]


def _case(dtype=torch.float64, hidden=8, width=16):
    generator = torch.Generator().manual_seed(0)
    shapes = ((sum(COUNTS), hidden), (4, 2 * width, hidden), (4, hidden, width), (sum(COUNTS),), (sum(COUNTS), hidden))
    x, fc1, fc2, gates, grad = (torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)
    return [x, fc1, fc2, gates], grad


def _with_gradients(function, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad)


def _call(**options):
    return lambda x, fc1, fc2, gates: swiglu_experts(x, COUNTS, fc1, fc2, gates, **options)


def _reference(x, fc1, fc2, gates):
    return reference_experts(x, COUNTS, fc1, fc2, gates)


def test_gradcheck_with_an_expert_without_rows():
    inputs, _ = _case(hidden=3, width=2)
    assert torch.autograd.gradcheck(_call(), [t.requires_grad_() for t in inputs])


@pytest.mark.parametrize(("backend", "dtype"), [("looped", torch.float64), ("grouped_mm", torch.float32)])
def test_backends_equal_the_reference(backend, dtype):
    inputs, grad = _case(dtype)
    got = _with_gradients(_call(backend=backend), inputs, grad)
    expected = _with_gradients(_reference, [t.double() for t in inputs], grad.double())
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
    assert got[2][1].eq(0).all() and got[3][1].eq(0).all()  # no rows: zero gradients, not None


@pytest.mark.parametrize("product_backend", ["native", "via_fp32"])
def test_bf16(product_backend):
    inputs, grad = _case(torch.bfloat16)
    got = _with_gradients(_call(product_backend=product_backend), inputs, grad)
    expected = _with_gradients(_reference, [t.double() for t in inputs], grad.double())
    # One rounding of the result where everything inside is fp32; several of 2^-9 each where products are bf16.
    tolerance = 2**-8 if product_backend == "via_fp32" else 2**-5
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_without_gates():
    (x, fc1, fc2, gates), _ = _case()
    torch.testing.assert_close(
        swiglu_experts(x, COUNTS, fc1, fc2), swiglu_experts(x, COUNTS, fc1, fc2, torch.ones_like(gates))
    )


def test_no_rows_at_all():
    inputs, _ = _case()
    fc1, fc2 = inputs[1].requires_grad_(), inputs[2].requires_grad_()
    out = swiglu_experts(inputs[0][:0], [0, 0, 0, 0], fc1, fc2, inputs[3][:0])
    out.sum().backward()
    assert out.shape == (0, 8) and fc1.grad.eq(0).all() and fc2.grad.eq(0).all()


@pytest.mark.parametrize("num_rows", [0, 1, 9, 64, 65])
def test_few_rows_without_gradients(num_rows):
    """What decoding and evaluation take; a rank may get no token at all."""
    inputs, _ = _case()
    x, fc1, fc2, gates = inputs
    repeated = x.repeat(8, 1)[:num_rows]
    counts = [num_rows - num_rows // 3, 0, num_rows // 3, 0]
    weights = gates.repeat(8)[:num_rows]
    with torch.no_grad():
        out = swiglu_experts(repeated, counts, fc1, fc2, weights)
    expected = reference_experts(repeated, counts, fc1, fc2, weights)
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def test_runs_of_experts_in_any_order():
    """As one token's experts are; weights stacked, or one by one."""
    (x, fc1, fc2, gates), _ = _case()
    expected = reference_experts(x, COUNTS, fc1, fc2, gates)
    order = [8, 3, 4, 5, 6, 7, 0, 1, 2]  # expert 3, then 2, then 0
    for weights in ((fc1, fc2), (fc1.unbind(0), fc2.unbind(0))):
        with torch.no_grad():
            found = few_rows_experts(x[order], [(3, 1), (2, 5), (0, 3)], *weights, gates[order])
        torch.testing.assert_close(found, expected[order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "dtype"), [("looped", torch.bfloat16), ("grouped_mm", torch.float32)])
def test_main_grad(backend, dtype):
    inputs, grad = _case(dtype)
    x, fc1, fc2, gates = (t.requires_grad_() for t in inputs)
    for weight in (fc1, fc2):
        weight.main_grad = torch.ones(weight.shape, dtype=torch.float32)
    out = swiglu_experts(x, COUNTS, fc1, fc2, gates, backend=backend, product_backend="via_fp32",
                         accumulate_into_main_grad=True)
    out.backward(grad)
    expected = _with_gradients(_reference, [t.detach().double() for t in inputs], grad.double())
    for weight, exact in ((fc1, expected[2]), (fc2, expected[3])):
        torch.testing.assert_close(weight.main_grad.double(), 1 + exact, rtol=1e-5, atol=1e-4)
        assert weight.grad_added_to_main_grad and weight.grad is None


def test_on_a_gpu_gradients_are_added_in_fp32_one_expert_after_the_other():
    """By the operations alone, on tensors without values: not run on a GPU."""
    with noted_on_a_gpu() as log:
        rows, grad_y = (torch.empty(sum(COUNTS), width, device="cuda", dtype=torch.bfloat16) for width in (16, 32))
        main_grad = torch.empty(4, 32, 16, device="cuda")
        ends = torch.empty(4, device="cuda", dtype=torch.int32)
        assert _grouped_weight_grad(main_grad, grad_y, rows, tuple(COUNTS), ends) is None
        # A product for each expert with rows, and no gradient in bf16 beside it.
        assert log.dtypes("addmm.dtype_out") == [torch.float32] * 3
        assert not log.dtypes("_grouped_mm.default") and not log.dtypes("add_.Tensor")
        narrow = _grouped_weight_grad(None, grad_y, rows, tuple(COUNTS), ends)
        assert narrow.dtype == torch.bfloat16 and log.noted[-1][0] == "_grouped_mm.default"


def test_bad_input():
    (x, fc1, fc2, gates), _ = _case()
    with pytest.raises(ValueError, match=r"counts=\[9, 0, 0\] must have one entry for each of 4 experts"):
        swiglu_experts(x, [9, 0, 0], fc1, fc2, gates)
    with pytest.raises(ValueError, match="backend='loop' of swiglu_experts must be one of auto, looped, grouped_mm"):
        swiglu_experts(x, COUNTS, fc1, fc2, gates, backend="loop")
    with pytest.raises(ValueError, match="accumulate_into_main_grad=True needs backend 'looped' or 'grouped_mm', not"):
        swiglu_experts(x, COUNTS, fc1, fc2, gates, backend="reference", accumulate_into_main_grad=True)


@pytest.mark.parametrize(("backend", "product_backend", "dtype", "to_main_grad"), [
    ("looped", "native", torch.float32, True), ("looped", "native", torch.float32, False),
    ("looped", "via_fp32", torch.bfloat16, True), ("looped", "native", torch.bfloat16, False),
    ("grouped_mm", "auto", torch.float32, False), ("grouped_mm", "auto", torch.float32, True)])
def test_deferred_weight_gradients_are_the_same_bit_for_bit(backend, product_backend, dtype, to_main_grad):
    (x, fc1, fc2, gates), grad = _case(dtype)

    def gradients(defer):
        weights = [weight.clone().requires_grad_() for weight in (fc1, fc2)]
        rows, row_gates = (t.clone().requires_grad_() for t in (x, gates.float()))
        for weight in weights if to_main_grad else []:
            weight.main_grad = torch.full_like(weight, 0.5, dtype=torch.float32)
        swiglu_experts(rows, COUNTS, *weights, row_gates, backend=backend, product_backend=product_backend,
                       accumulate_into_main_grad=to_main_grad, defer_weight_grad=defer).backward(grad)
        yield rows.grad, row_gates.grad
        yield [weight.main_grad if to_main_grad else weight.grad for weight in weights]

    expected, queue = gradients(None), []
    got = gradients(queue.append)
    for a, b in zip(next(got), next(expected), strict=True):
        assert torch.equal(a, b)
    assert len(queue) == (2 if backend == "grouped_mm" else 1)
    for work in queue:
        work()
        with pytest.raises(RuntimeError, match="computed twice"):
            work()
    for a, b in zip(next(got), next(expected), strict=True):
        assert torch.equal(a, b) and a.any()


def test_the_reference_does_not_defer():
    inputs, _ = _case()
    with pytest.raises(ValueError, match="defer_weight_grad needs backend 'looped' or 'grouped_mm', not 'reference'"):
        _call(backend="reference", defer_weight_grad=[].append)(*inputs)
