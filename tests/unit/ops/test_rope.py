"""ops/rope.py against its formula, for whole heads, their last part, and sequences at positions of their own."""

import pytest
import torch

from dsv3_megatron.ops.rope import apply_rope, reference_rope
from tests.unit.ops.elementwise import TOLERANCES, assert_equals, randn


def _angles():
    angles = torch.rand((7, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    return 1.3 * angles.cos(), 1.3 * angles.sin()


def _rope(function, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(wide) for t in _angles())
    return lambda x: function(x, cos, sin)


def _rope_by_sequence(function, dtype):
    """Two sequences at positions of their own."""
    wide = torch.promote_types(dtype, torch.float32)
    tables = [torch.stack([t, t.flip(0)], dim=1).to(wide) for t in _angles()]
    return lambda x: function(x, *tables)


CASES = {"whole": (_rope, 8), "tail": (_rope, 13), "by sequence": (_rope_by_sequence, 13)}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    make, head_dim = CASES[name]
    assert torch.autograd.gradcheck(make(apply_rope, torch.float64), [randn(7, 2, 3, head_dim).requires_grad_()])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_equals_reference(name, dtype, tolerance):
    make, head_dim = CASES[name]
    assert_equals(make(apply_rope, dtype), make(reference_rope, torch.float64), [randn(7, 2, 3, head_dim)], dtype,
                  tolerance)


def test_scores_are_a_function_of_distance():
    q, k = randn(1, 1, 1, 8), randn(1, 1, 1, 8, seed=1)
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    angles = torch.outer(torch.arange(10, dtype=torch.float64), frequencies)
    rotate = [apply_rope(t.expand(10, -1, -1, -1), angles.cos(), angles.sin()).squeeze() for t in (q, k)]
    scores = rotate[0] @ rotate[1].T
    torch.testing.assert_close(scores.diagonal(3), scores[0, 3].expand(7))


def test_by_sequence_is_each_sequence_by_itself():
    x, (cos, sin) = randn(7, 2, 3, 13), _angles()
    together = apply_rope(x, torch.stack([cos, cos.flip(0)], dim=1), torch.stack([sin, sin.flip(0)], dim=1))
    assert torch.equal(together[:, :1], apply_rope(x[:, :1], cos, sin))
    assert torch.equal(together[:, 1:], apply_rope(x[:, 1:], cos.flip(0), sin.flip(0)))


def test_a_steady_row_has_the_same_bits_wherever_it_lies():
    """Few pairs: where tokens lie behind each other torch multiplies several at once, and rounds otherwise."""
    x, (cos, sin) = randn(7, 1, 8).float(), (t.float() for t in _angles())
    together = apply_rope(x, cos, sin, is_steady=True)
    behind = apply_rope(torch.nn.functional.pad(x, (4, 0)), cos, sin, is_steady=True)[..., 4:]
    alone = torch.cat([apply_rope(x[row: row + 1], cos[row: row + 1], sin[row: row + 1], is_steady=True)
                       for row in range(7)])
    assert torch.equal(behind, together) and torch.equal(alone, together)
    torch.testing.assert_close(together, reference_rope(x, cos, sin))
    assert torch.equal(apply_rope(x.clone().requires_grad_(), cos, sin, is_steady=True), together)


def test_inputs_are_not_modified():
    x = randn(7, 2, 3, 8)
    before = x.clone()
    apply_rope(x, *_angles())
    assert torch.equal(x, before)


def test_bad_input():
    with pytest.raises(ValueError, match="x has 3 positions, cos_SP and sin_SP 7"):
        apply_rope(torch.zeros(3, 1, 8), *_angles())
    with pytest.raises(ValueError, match="x has 3 sequences, cos_SP and sin_SP 2; give each one"):
        apply_rope(torch.zeros(7, 3, 8), *(t.unsqueeze(1).expand(-1, 2, -1) for t in _angles()))
    with pytest.raises(ValueError, match="4 pairs need 8 dims, x has 6"):
        apply_rope(torch.zeros(7, 1, 6), *_angles())


def test_the_rotations_are_not_kept_where_they_are_the_first_thing_to_be_computed_again():
    from dsv3_megatron.ops import recompute

    before = len(recompute._live)
    x = randn(7, 2, 3, 8).requires_grad_()
    y = apply_rope(x, *_angles())
    assert len(recompute._live) == before, "the rotations are still there"
    y.sum().backward()
    assert x.grad is not None
