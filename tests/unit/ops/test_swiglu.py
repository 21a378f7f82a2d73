"""ops/swiglu.py against its formula, with and without a weight for each row."""

import pytest
import torch

from dsv3_megatron.ops.swiglu import reference_swiglu, swiglu
from tests.unit.ops.elementwise import TOLERANCES, assert_equals, randn

CASES = {"alone": [randn(3, 2, 8)], "weighted": [randn(3, 2, 8), randn(3, 2, seed=2)]}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(swiglu, [t.clone().requires_grad_() for t in CASES[name]])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_equals_reference(name, dtype, tolerance):
    assert_equals(swiglu, reference_swiglu, CASES[name], dtype, tolerance)


def test_inputs_are_not_modified():
    x = randn(7, 2, 3, 8)
    before = x.clone()
    swiglu(x)
    assert torch.equal(x, before)


def test_bad_input():
    with pytest.raises(ValueError, match="last dimension 7 must be even"):
        swiglu(torch.zeros(2, 7))
