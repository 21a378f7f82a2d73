"""E5M6 as the kernels round it."""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.quantize import quantize, quantize_columns
from tests.slow_fp8 import E5M6_VALUES
from tests.unit.kernels.random_rows import random, same


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (33, 208), (130, 144), (3, 15)])
def test_e5m6(backend, shape, power_of_2):
    """Packed bytes and scales, and their requantization for Wgrad; rows of 15 values are the reference's."""
    x = random(*shape)
    x[0, :5], x[-1, 0] = 0, -1e-30
    got, expected = (q(x, format="e5m6", power_of_2=power_of_2) for q in (backend.quantize, quantize))
    assert got.shape == expected.shape and torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values, expected.values)
    same(backend.quantize_columns(expected, power_of_2=power_of_2), quantize_columns(expected, power_of_2=power_of_2))


def test_every_number_of_e5m6(backend):
    """Values that are exact, halfway between two, and beside halfway; the first of each row sets the scale to 1."""
    exact = torch.tensor([v for v in E5M6_VALUES if v >= 0])
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat((torch.nextafter(halfway, halfway * 2), torch.nextafter(halfway, halfway * 0)))
    x = torch.cat((exact, halfway, beside))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat((torch.full((len(x), 1), 65024.0), x), dim=1)
    got, expected = backend.quantize(x, format="e5m6"), quantize(x, format="e5m6")
    assert expected.scales.eq(1).all() and torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values, expected.values)


def test_e5m6_of_what_is_not_finite(backend):
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = math.inf, math.nan
    got = backend.quantize(x, format="e5m6")
    for kept in (got.dequantize(), backend.quantize_columns(got).dequantize().t()):
        assert kept[0, :128].isnan().all() and kept[1, 128:].isnan().all()
    assert (got.dequantize()[0, 128:] == 1).all() and (got.dequantize()[1, :128] == 1).all()
