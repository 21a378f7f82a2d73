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
    assert shared.first_queries == (0, 3, 0, 0, 0, 2, 0)
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


def test_results_that_are_not_read_change_nothing() -> None:
    """Attention of a long prompt with three answers: the blocks of its copies are left out, the rest has its bits."""
    from dsv3_megatron.ops import attention

    shared = SharedBeginnings.of(((0, 300, 340, 341, 420),), ((0, 0, 0, 0),), torch.device("cpu"))
    assert shared.first_queries == (0, 300, 300)
    q, k, v = (torch.randn(420, 1, 2, width).requires_grad_() for width in (24, 24, 16))
    grad_SBNU, found = torch.randn(420, 1, 2, 16), []
    for first_queries in (None, shared.first_queries):
        context = shared.together(attention.causal_attention(
            *shared.apart(q, k, v), softmax_scale=0.3, document_bounds=(shared.bounds,), first_queries=first_queries,
            backend="blocked"))
        found.append([context, *torch.autograd.grad(context, (q, k, v), grad_SBNU)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    groups = attention.group_sequences((shared.bounds,), shared.bounds[-1], 1)
    sizes = [len(attention._tiles(2, groups, each)) for each in (None, shared.first_queries)]
    assert sizes == [9, 5]
