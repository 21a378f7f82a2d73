"""Documents by themselves out of those that share a beginning, and back: compared with indexing that autograd follows.

Legend: S positions, B sequences, N heads, D query width, T tokens.
"""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.model.shared_beginnings import SharedBeginnings

BOUNDS = ((0, 3, 5, 9, 12), (0, 4, 6, 7, 12), (0, 12))
CONTINUED = ((0, 0, 0, 3), (0, 1, 1, 1), ())
# Sequence and positions of each document by itself.
ALONE = [(0, [0, 1, 2, 3, 4]), (0, [0, 1, 2, 5, 6, 7, 8]), (0, [9, 10, 11]), (1, [0, 1, 2, 3]), (1, [4, 5, 6]),
         (1, [4, 5, 7, 8, 9, 10, 11]), (2, list(range(12)))]


@pytest.fixture
def shared() -> SharedBeginnings:
    return SharedBeginnings.of(BOUNDS, CONTINUED, torch.device("cpu"))


def test_documents_by_themselves(shared: SharedBeginnings) -> None:
    x_SBND = torch.arange(12 * 3 * 2, dtype=torch.float64).view(12, 3, 2, 1).requires_grad_()
    (apart_TND,) = shared.apart(x_SBND)
    expected = torch.cat([x_SBND[positions, row] for row, positions in ALONE])
    assert torch.equal(apart_TND.squeeze(1), expected)
    assert list(shared.bounds) == [sum(len(each) for _, each in ALONE[:number]) for number in range(len(ALONE) + 1)]
    weights = torch.randn(expected.shape, dtype=torch.float64)
    (ours,) = torch.autograd.grad((apart_TND.squeeze(1) * weights).sum(), x_SBND)
    (theirs,) = torch.autograd.grad((expected * weights).sum(), x_SBND)
    assert torch.equal(ours, theirs)


def test_back_together(shared: SharedBeginnings) -> None:
    x_SBND = torch.randn(12, 3, 2, 5, dtype=torch.float64)
    (apart_TND,) = shared.apart(x_SBND)
    assert torch.equal(shared.together(apart_TND), x_SBND)
    leaf_TND = apart_TND.clone().requires_grad_()
    weights = torch.randn_like(x_SBND)
    (ours,) = torch.autograd.grad((shared.together(leaf_TND) * weights).sum(), leaf_TND)
    (theirs,) = torch.autograd.grad(
        (leaf_TND.squeeze(1)[shared.own_SB].view(12, 3, 2, 5) * weights).sum(), leaf_TND)
    assert torch.equal(ours, theirs) and not ours.all()
