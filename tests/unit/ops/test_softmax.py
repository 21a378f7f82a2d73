"""ops/softmax.py: rows become their softmax, and the log-sum-exp is torch's."""

import pytest
import torch

from dsv3_megatron.ops.softmax import softmax_, softmax_and_logsumexp_
from tests.unit.ops.elementwise import randn


# A few roundings of the dtype.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
def test_equals_torch(dtype, tolerance, scale):
    scores = (randn(3, 5, 11) * scale).to(dtype)
    wide = scores.double().clone()
    found = softmax_and_logsumexp_(scores)
    assert found.dtype == dtype and found.shape == (3, 5)
    torch.testing.assert_close(found.double(), wide.logsumexp(-1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(scores.double(), wide.exp() / wide.exp().sum(-1, keepdim=True) if scale == 1.0
                               else wide.softmax(-1), rtol=10 * tolerance, atol=tolerance)


def test_what_may_not_be_looked_at_gets_nothing():
    scores = torch.tensor([[0.0, float("-inf"), 0.0]])
    assert softmax_and_logsumexp_(scores).item() == pytest.approx(torch.tensor(2.0).log().item())
    assert scores.tolist() == [[0.5, 0.0, 0.5]]


def test_a_row_of_one():
    scores = torch.tensor([[7.5]])
    assert softmax_and_logsumexp_(scores).item() == 7.5 and scores.item() == 1.0


@pytest.mark.parametrize("width", [1, 2, 5, 13, 15, 16, 17, 40])
def test_bits_do_not_depend_on_what_is_masked_behind_a_row(width):
    """Of rows of 13 alone, torch's softmax has other bits in half of them than with masked entries behind them."""
    alone = 2 * randn(500, width)
    wide = torch.nn.functional.pad(alone, (0, 75 - width), value=float("-inf"))
    assert torch.equal(softmax_(alone.clone()), softmax_(wide)[:, :width])
    torch.testing.assert_close(softmax_(alone.clone()).double(), alone.double().softmax(-1), rtol=1e-6, atol=1e-7)
