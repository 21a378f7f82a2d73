"""ops/rms_norm.py against its formula."""

import pytest
import torch

from dsv3_megatron.ops.rms_norm import reference_rms_norm, rms_norm
from tests.unit.ops.elementwise import TOLERANCES, assert_equals, randn


def _with_eps(function):
    return lambda x, weight: function(x, weight, 1e-6)


def test_gradcheck():
    inputs = [randn(3, 2, 8).requires_grad_(), randn(8, seed=2).requires_grad_()]
    assert torch.autograd.gradcheck(_with_eps(rms_norm), inputs)


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_equals_reference(dtype, tolerance):
    inputs = [randn(3, 2, 8), randn(8, seed=2)]
    assert_equals(_with_eps(rms_norm), _with_eps(reference_rms_norm), inputs, dtype, tolerance)


@pytest.mark.parametrize("backend", ["fused", "native", "reference"])
def test_backends(backend):
    x, weight = randn(5, 16, dtype=torch.float32), randn(16, dtype=torch.float32, seed=1)
    expected = reference_rms_norm(x.double(), weight.double())
    torch.testing.assert_close(rms_norm(x, weight, backend=backend).double(), expected, rtol=1e-6, atol=1e-6)


def test_inputs_are_not_modified():
    x = randn(7, 2, 3, 8)
    before = x.clone()
    rms_norm(x, torch.ones(8, dtype=torch.float64))
    assert torch.equal(x, before)


def test_bad_input():
    with pytest.raises(ValueError, match="backend='apex' of rms_norm must be one of"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), backend="apex")
