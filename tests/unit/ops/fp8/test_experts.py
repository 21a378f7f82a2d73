"""Experts in FP8: their pieces, their error, and what they keep."""

import dataclasses

import pytest
import torch

from dsv3_megatron.config.precision import BF16
from dsv3_megatron.ops.experts import reference_experts
from dsv3_megatron.ops.fp8.experts import fp8_swiglu_experts
from tests.slow_fp8 import rounded
from tests.unit.ops.fp8.layers import (
    COUNTS,
    DEFAULT,
    FIRST,
    SQUARE,
    TILE,
    close,
    columns,
    random,
    relative_error,
    with_gradients,
)


def experts_case(dtype=torch.float32, hidden=136, width=72):
    shapes = ((sum(COUNTS), hidden), (4, 2 * width, hidden), (4, hidden, width), (sum(COUNTS),), (sum(COUNTS), hidden))
    x, fc1, fc2, gates, grad = (random(*shape, seed=i) * (shape[-1] ** -0.5 if i in (1, 2) else 1)
                                for i, shape in enumerate(shapes))
    return [x.to(dtype), fc1.to(dtype), fc2.to(dtype), gates.sigmoid()], grad.to(dtype)


def call(first=FIRST, second=DEFAULT, **options):
    return lambda x, fc1, fc2, gates: fp8_swiglu_experts(x, COUNTS, fc1, fc2, gates, (first, second), **options)


def test_experts_are_their_pieces():
    (x, fc1, fc2, gates), grad = experts_case()
    got = with_gradients(call(), (x, fc1, fc2, gates), grad)
    start = 0
    for expert, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert got[2][expert].eq(0).all() and got[3][expert].eq(0).all()
            continue
        w1, w2 = rounded(fc1[expert], SQUARE), rounded(fc2[expert], SQUARE)
        rounded_x = rounded(x[rows], TILE, power_of_2=True)
        gate_up = (rounded_x @ w1.T).float()
        row_gates = gates[rows].double().unsqueeze(1)

        def swiglu(h, row_gates=row_gates):
            gate, up = h.chunk(2, dim=1)
            return gate * torch.sigmoid(gate) * up * row_gates

        active = swiglu(gate_up.double()).float()
        close(got[0][rows], rounded(active, TILE) @ w2.T)
        # Backward: SwiGLU again, of its kept input.
        kept = rounded(gate_up, TILE).requires_grad_()
        leaf_gates = row_gates.clone().requires_grad_()
        again = swiglu(kept, leaf_gates)
        grad_active = rounded(grad[rows], TILE) @ w2
        grad_kept, grad_gates = torch.autograd.grad(again, (kept, leaf_gates), grad_active)
        grad_kept = grad_kept.float()
        # Where fp32 and float64 fall on two sides of a rounding point, one E4M3 step of one value differs.
        for value, expected in ((got[1][rows], rounded(grad_kept, TILE) @ w1),
                                (got[2][expert], columns(grad_kept).T @ columns(rounded_x.float(), True)),
                                (got[3][expert], columns(grad[rows]).T @ columns(again.detach().float())),
                                (got[4][rows], grad_gates.squeeze(1))):
            assert relative_error(value, expected) < 2e-3


@pytest.mark.parametrize("precisions", [(FIRST, DEFAULT), (BF16, BF16), (DEFAULT, BF16), (
    dataclasses.replace(FIRST, grad_grouping="block"), dataclasses.replace(DEFAULT, grad_grouping="block"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_against_the_exact_ones(dtype, precisions):
    inputs, grad = experts_case(dtype)
    exact = with_gradients(lambda x, a, b, g: reference_experts(x, COUNTS, a, b, g), [t.double() for t in inputs],
                           grad.double())
    got = with_gradients(call(*precisions), inputs, grad)
    bound = 0.15 if any(p.is_fp8 for p in precisions) else (2e-2 if dtype == torch.bfloat16 else 1e-5)
    for value, true in zip(got, exact, strict=True):
        assert value.dtype == dtype or value.dtype == torch.float32
        assert relative_error(value, true) < bound


def test_experts_deferred_equal_at_once():
    inputs, grad = experts_case(torch.bfloat16)
    results = {}
    for deferred in (False, True, "long"):
        x, fc1, fc2, gates = (t.detach().clone().requires_grad_() for t in inputs)
        for weight in (fc1, fc2):
            weight.main_grad = torch.zeros(weight.shape)
        queue = []
        call(accumulate_into_main_grad=True, defer_weight_grad=queue.append if deferred else None)(
            x, fc1, fc2, gates).backward(grad)
        assert len(queue) == 2 * bool(deferred)
        assert not deferred or not hasattr(fc1, "grad_added_to_main_grad")
        for compute in queue:
            if deferred == "long":
                compute.narrow()
            compute()
        assert fc1.grad_added_to_main_grad and fc2.grad_added_to_main_grad
        results[deferred] = (x.grad, gates.grad, fc1.main_grad, fc2.main_grad)
    for a, b, c in zip(*results.values(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_experts_keep_narrow_tensors():
    kept = []
    (x, fc1, fc2, gates), _ = experts_case(torch.bfloat16, hidden=256, width=128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        call()(x.requires_grad_(), fc1.requires_grad_(), fc2.requires_grad_(), gates)
    rows = sum(COUNTS)
    assert sum(kept) == rows * (256 + 2 * 4) * 2 + gates.nbytes


def test_experts_without_rows_and_with_wrong_counts():
    (x, fc1, fc2, gates), _ = experts_case()
    fc1.requires_grad_()
    out = fp8_swiglu_experts(x[:0], [0] * 4, fc1, fc2, gates[:0], (FIRST, DEFAULT))
    out.sum().backward()
    assert out.shape == (0, 136) and fc1.grad.eq(0).all()
    with pytest.raises(ValueError, match=r"counts=\[1, 2\] must have one entry for each of 4 experts"):
        fp8_swiglu_experts(x, [1, 2], fc1, fc2, gates, (FIRST, DEFAULT))
