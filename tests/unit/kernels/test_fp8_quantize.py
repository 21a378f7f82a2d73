"""Quantization by the kernels, alone and with SwiGLU, against the reference: tiles, blocks, columns, E5M6."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.quantize import Quantized, quantize, quantize_columns
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE
from dsv3_megatron.ops.swiglu import swiglu_forward
from tests.unit.kernels.random_rows import random, same

SHAPES = [(1, 16), (33, 208), (130, 144)]


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_blocks_and_columns(backend, shape, power_of_2):
    x = random(*shape)
    x[0, :5] = 0
    same(backend.quantize(x, power_of_2=power_of_2), quantize(x, power_of_2=power_of_2))
    got, expected = (q(x, SQUARE, power_of_2=power_of_2) for q in (backend.quantize, quantize))
    same(got, expected)
    assert torch.equal(got.turned.float(), expected.values.float().t())
    columns = quantize_columns(x, power_of_2=power_of_2)
    same(backend.quantize_columns(x, power_of_2=power_of_2), columns)
    cached = quantize(x, power_of_2=True)
    same(backend.quantize_columns(cached, power_of_2=power_of_2), quantize_columns(cached, power_of_2=power_of_2))


def test_stacks_of_weights(backend):
    weight = random(3, 144, 80, dtype=torch.float32)
    got, expected = backend.quantize(weight, SQUARE), quantize(weight, SQUARE)
    same(got, expected)
    assert torch.equal(got[2].transpose().values.float(), expected.values[2].float().t())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(backend, bad):
    x = torch.ones(130, 144)
    x[129, 130] = bad
    for got, expected in (
        (backend.quantize(x), quantize(x)), (backend.quantize(x, SQUARE), quantize(x, SQUARE)),
        (backend.quantize_columns(x), quantize_columns(x)),
        (backend.quantize_columns(quantize(x)), quantize_columns(quantize(x))),
    ):
        assert torch.equal(got.dequantize().isnan(), expected.dequantize().isnan())
        assert got.dequantize().isnan().any() and not got.dequantize().isnan().all()


def test_zeros_and_extremes(backend):
    x = torch.zeros(3, 256)
    x[1, 5], x[2, 130] = 1e-44, torch.finfo(torch.float32).max
    for power_of_2 in (False, True):
        same(backend.quantize(x, power_of_2=power_of_2), quantize(x, power_of_2=power_of_2))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize(("rows", "width", "gated"), [(35, 128, True), (3, 256, False)])
def test_swiglu_with_quantization(rows, width, gated, power_of_2):
    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize

    hidden = random(rows, 2 * width, dtype=torch.float32)
    gates = torch.rand(rows) if gated else None
    values, scales, kept, kept_scales = swiglu_quantize(hidden, gates, power_of_2=power_of_2, keep=True)
    active = swiglu_forward(hidden, gates)
    expected = quantize(active, power_of_2=power_of_2)
    # exp differs in the last bits, which can move a value to the next one of E4M3.
    torch.testing.assert_close(scales, expected.scales, rtol=1e-6, atol=0)
    got, wanted = values.float(), expected.values.float()
    assert ((got - wanted).abs() <= torch.maximum(wanted.abs() / 8, torch.tensor(2.0**-9))).all()
    assert (got != wanted).float().mean() < 1e-3
    same(Quantized(kept, kept_scales, TILE, "e4m3", tuple(hidden.shape)), quantize(hidden))


def test_swiglu_refuses_halves_that_share_a_tile():
    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize

    with pytest.raises(ValueError, match="keep=True needs an expert width that is a multiple of 128, not 96"):
        swiglu_quantize(random(2, 192), None, power_of_2=False, keep=True)
    values, _ = swiglu_quantize(random(2, 192), None, power_of_2=False, keep=False)
    assert values.shape == (2, 96)


@pytest.mark.parametrize("width", [128, 96])
def test_swiglu_of_this_backend_is_the_references(backend, width):
    """In one pass where tiles of the input keep within its halves, else in two."""
    hidden, gates = random(33, 2 * width, dtype=torch.float32), torch.rand(33)
    (active, kept), (expected, expected_kept) = (
        each.quantize_swiglu(hidden, gates, power_of_2=False) for each in (backend, REFERENCE))
    same(kept, expected_kept)
    assert active.shape == expected.shape == (33, width)
    share = ((active.dequantize() - expected.dequantize()) / expected.dequantize()).nan_to_num(0).abs()
    # exp differs in the last bits: by as little in the scales, and by a step in few values.
    assert (share <= 1 / 8).all() and (share > 1e-6).float().mean() < 1e-3
