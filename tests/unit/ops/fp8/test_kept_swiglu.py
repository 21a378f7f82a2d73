"""SwiGLU whose input is kept in FP8 in front of an FP8 linear: its pieces, what is kept, and rows at a time."""

import dataclasses

import pytest
import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.fp8 import kept_swiglu
from dsv3_megatron.ops.fp8.kept_swiglu import activation, fp8_swiglu, swiglu_gradients
from dsv3_megatron.ops.fp8.linear import fp8_linear
from dsv3_megatron.ops.fp8.quantize import quantize
from dsv3_megatron.ops.swiglu import swiglu
from tests.slow_fp8 import rounded
from tests.unit.ops.fp8.layers import DEFAULT, SQUARE, TILE, columns, random, relative_error, with_gradients

AS_IT_IS = dataclasses.replace(DEFAULT, cached_input="bf16")


def ffn(precision: LinearPrecision):
    return lambda hidden, weight: fp8_linear(fp8_swiglu(hidden, precision), weight, precision)


@pytest.mark.parametrize("precision", [DEFAULT, AS_IT_IS, dataclasses.replace(DEFAULT, cached_input="e5m6")])
def test_it_is_its_pieces(precision):
    hidden, weight, grad = random(3, 70, 272), random(60, 136, seed=1) * 0.1, random(3, 70, 60, seed=2)
    y, grad_hidden, grad_weight = with_gradients(ffn(precision), (hidden, weight), grad)

    def formula(rows):
        gate, up = rows.double().chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    rows, grad_rows = hidden.flatten(0, 1), grad.flatten(0, 1)
    # Forward knows the input itself, backward what is kept of it.
    expected = rounded(formula(rows).float(), TILE) @ rounded(weight, SQUARE).T
    assert relative_error(y.flatten(0, 1), expected) < 2e-3
    kept = rows if precision.cached_input == "bf16" else rounded(rows, TILE, precision.cached_input)
    leaf = kept.double().requires_grad_()
    again = formula(leaf)
    (expected,) = torch.autograd.grad(again, leaf, rounded(grad_rows, TILE) @ rounded(weight, SQUARE))
    assert relative_error(grad_hidden.flatten(0, 1), expected) < 2e-3
    active = again.detach().float()
    cached = active if precision.cached_input == "bf16" else rounded(active, TILE, precision.cached_input)
    assert relative_error(grad_weight, columns(grad_rows).T @ columns(cached.float())) < 2e-3


def test_kept_as_it_is_no_bit_changes():
    """The output that is made again is the one that was multiplied."""
    inputs, grad = (random(70, 256).bfloat16(), random(64, 128, seed=1).bfloat16()), random(70, 64, seed=2).bfloat16()
    plain = with_gradients(lambda hidden, weight: fp8_linear(swiglu(hidden), weight, AS_IT_IS), inputs, grad)
    for got, expected in zip(with_gradients(ffn(AS_IT_IS), inputs, grad), plain, strict=True):
        assert torch.equal(got, expected)


def test_what_is_kept_is_the_narrow_input_alone():
    kept = []
    hidden, weight = random(64, 512).bfloat16().requires_grad_(), random(32, 256, seed=1).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = ffn(DEFAULT)(hidden, weight)
    assert sum(kept) == hidden.numel() + hidden.numel() // 128 * 4
    y.sum().backward()
    assert hidden.grad is not None and weight.grad is not None


@pytest.mark.parametrize("is_narrow", [True, False])
def test_rows_at_a_time_change_no_bit(is_narrow, monkeypatch):
    hidden, gates, grad = random(70, 256).bfloat16(), random(70, seed=1).sigmoid(), random(70, 128, seed=2)
    kept = quantize(hidden) if is_narrow else hidden
    results = []
    for rows in (8192, 32, 7):
        monkeypatch.setattr(kept_swiglu, "CHUNK", rows)
        gradients = swiglu_gradients(grad, kept, gates, torch.bfloat16, needs_output=True)
        results.append((*gradients, activation(kept, gates, torch.bfloat16)))
        assert torch.equal(gradients.active, results[-1][-1])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            assert torch.equal(got, expected)
    assert activation(hidden[:0], None, torch.bfloat16).shape == (0, 128)


def test_the_planner_counts_as_many_wide_rows():
    from dsv3_megatron.planning.memory import swiglu_passes

    assert swiglu_passes._CHUNK == kept_swiglu.CHUNK
