"""ops/rms_norm.py, swiglu.py and rope.py against their formulas."""

import pytest
import torch

from dsv3_megatron.ops.host_memory import keep_freed_memory
from dsv3_megatron.ops.rms_norm import reference_rms_norm, rms_norm
from dsv3_megatron.ops.rope import apply_rope, reference_rope
from dsv3_megatron.ops.swiglu import reference_swiglu, swiglu


def _randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _angles():
    angles = torch.rand((7, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 6
    return 1.3 * angles.cos(), 1.3 * angles.sin()


def _norm(function):
    return lambda x, weight: function(x, weight, 1e-6)


def _rope(function, dtype):
    wide = torch.promote_types(dtype, torch.float32)
    cos, sin = (t.to(wide) for t in _angles())
    return lambda x: function(x, cos, sin)


def _rope_by_sequence(function, dtype):
    """Two sequences at positions of their own."""
    wide = torch.promote_types(dtype, torch.float32)
    tables = [torch.stack([t, t.flip(0)], dim=1).to(wide) for t in _angles()]
    return lambda x: function(x, *tables)


CASES = {
    "rms_norm": lambda dtype: (_norm(rms_norm), _norm(reference_rms_norm), [_randn(3, 2, 8), _randn(8, seed=2)]),
    "swiglu": lambda dtype: (swiglu, reference_swiglu, [_randn(3, 2, 8)]),
    "swiglu_weighted": lambda dtype: (swiglu, reference_swiglu, [_randn(3, 2, 8), _randn(3, 2, seed=2)]),
    "rope": lambda dtype: (_rope(apply_rope, dtype), _rope(reference_rope, torch.float64), [_randn(7, 2, 3, 8)]),
    "rope_tail": lambda dtype: (_rope(apply_rope, dtype), _rope(reference_rope, torch.float64), [_randn(7, 2, 3, 13)]),
    "rope_by_sequence": lambda dtype: (
        _rope_by_sequence(apply_rope, dtype), _rope_by_sequence(reference_rope, torch.float64), [_randn(7, 2, 3, 13)]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    function, _, inputs = CASES[name](torch.float64)
    assert torch.autograd.gradcheck(function, [t.requires_grad_() for t in inputs])


# bf16: inputs are exact, everything inside is fp32, so the result is off by its own rounding, 2^-9 relative; weight
# gradients likewise.
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-8)]
)
def test_equals_reference(name, dtype, tolerance):
    function, reference, inputs = CASES[name](dtype)
    inputs = [t.to(dtype) for t in inputs]
    results = []
    for call, wide in ((function, False), (reference, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in inputs]
        out = call(*leaves)
        grad = _randn(*out.shape, dtype=dtype, seed=3).to(out.dtype)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("backend", ["fused", "native", "reference"])
def test_rms_norm_backends(backend):
    x, weight = _randn(5, 16, dtype=torch.float32), _randn(16, dtype=torch.float32, seed=1)
    expected = reference_rms_norm(x.double(), weight.double())
    torch.testing.assert_close(rms_norm(x, weight, backend=backend).double(), expected, rtol=1e-6, atol=1e-6)


def test_rope_keeps_scores_a_function_of_distance():
    q, k = _randn(1, 1, 1, 8), _randn(1, 1, 1, 8, seed=1)
    frequencies = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    angles = torch.outer(torch.arange(10, dtype=torch.float64), frequencies)
    rotate = [apply_rope(t.expand(10, -1, -1, -1), angles.cos(), angles.sin()).squeeze() for t in (q, k)]
    scores = rotate[0] @ rotate[1].T
    torch.testing.assert_close(scores.diagonal(3), scores[0, 3].expand(7))


def test_rope_by_sequence_is_each_sequence_by_itself():
    x, (cos, sin) = _randn(7, 2, 3, 13), _angles()
    together = apply_rope(x, torch.stack([cos, cos.flip(0)], dim=1), torch.stack([sin, sin.flip(0)], dim=1))
    assert torch.equal(together[:, :1], apply_rope(x[:, :1], cos, sin))
    assert torch.equal(together[:, 1:], apply_rope(x[:, 1:], cos.flip(0), sin.flip(0)))


def test_inputs_are_not_modified():
    x = _randn(7, 2, 3, 8)
    before = x.clone()
    apply_rope(x, *_angles())
    swiglu(x)
    rms_norm(x, torch.ones(8, dtype=torch.float64))
    assert torch.equal(x, before)


def test_bad_input():
    with pytest.raises(ValueError, match="last dimension 7 must be even"):
        swiglu(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="x has 3 positions, cos_SP and sin_SP 7"):
        apply_rope(torch.zeros(3, 1, 8), *_angles())
    with pytest.raises(ValueError, match="x has 3 sequences, cos_SP and sin_SP 2; give each one"):
        apply_rope(torch.zeros(7, 3, 8), *(t.unsqueeze(1).expand(-1, 2, -1) for t in _angles()))
    with pytest.raises(ValueError, match="4 pairs need 8 dims, x has 6"):
        apply_rope(torch.zeros(7, 1, 6), *_angles())
    with pytest.raises(ValueError, match="backend='apex' of rms_norm must be one of"):
        rms_norm(torch.zeros(2, 4), torch.ones(4), backend="apex")


def test_keep_freed_memory_says_whether_it_worked():
    assert keep_freed_memory() in (True, False)
