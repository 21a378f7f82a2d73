"""ops/attention.py against the whole score matrix in float64."""

import pytest
import torch

from dsv3_megatron.ops import attention
from dsv3_megatron.ops.attention import causal_attention

SCALE = 0.3


def _case(dtype=torch.float64, length=200, batch=2, heads=3, width=12, value_width=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(length, batch, heads, d) for d in (width, width, value_width, value_width)]
    *inputs, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return inputs, grad


def _with_gradients(function, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad)


# Two sequences, each with documents of its own: of one token, of none, longer than a block of queries.
SAME = ((0, 1, 130, 130, 200),) * 2
DIFFERENT = ((0, 77, 200), (0, 1, 130, 130, 200))
HALF = ((0, 200), (0, 199, 200))
BOUNDS = {"one_document": None, "same": SAME, "different": DIFFERENT, "half": HALF}


def _brute_force(q, k, v, bounds=None):
    """Every score, and a mask of every pair, from the definition: j is seen by i if it is no later, in its document."""
    length, batch = q.shape[:2]
    allowed = torch.zeros(batch, length, length, dtype=torch.bool)
    for row in range(batch):
        for i in range(length):
            start = 0 if bounds is None else max(bound for bound in bounds[row] if bound <= i)
            allowed[row, i, start : i + 1] = True
    scores = torch.einsum("sbnd,tbnd->bnst", q, k) * SCALE
    return torch.einsum("bnst,tbnv->sbnv", scores.masked_fill(~allowed[:, None], float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_blocked_equals_brute_force_in_float64(monkeypatch, keep_bytes, bounds):
    monkeypatch.setattr(attention, "_KEPT_PROBABILITY_BYTES", keep_bytes)
    monkeypatch.setattr(attention, "TILE_BYTES", 4 * 128 * 200 * 4)  # more than one group of heads
    inputs, grad = _case()
    got = _with_gradients(
        lambda *t: causal_attention(*t, softmax_scale=SCALE, document_bounds=bounds, backend="blocked"), inputs, grad
    )
    expected = _with_gradients(lambda *t: _brute_force(*t, bounds), inputs, grad)
    assert got[0].is_contiguous() and got[0].flatten(2).shape == (200, 2, 24)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs, _ = _case(length=5, batch=1, heads=2, width=4, value_width=3)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, softmax_scale=SCALE), inputs)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("backend", ["sdpa", "sdpa_padded", "reference"])
def test_other_backends_equal_brute_force_in_float64(backend, bounds):
    inputs, grad = _case()
    got = _with_gradients(
        lambda *t: causal_attention(*t, softmax_scale=SCALE, document_bounds=bounds, backend=backend), inputs, grad
    )
    expected = _with_gradients(lambda *t: _brute_force(*t, bounds), inputs, grad)
    assert got[0].is_contiguous()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", ["blocked", "sdpa", "sdpa_padded", "reference"])
def test_backends_in_fp32(backend):
    inputs, grad = _case(torch.float32)
    got = _with_gradients(
        lambda *t: causal_attention(*t, softmax_scale=SCALE, document_bounds=DIFFERENT, backend=backend), inputs, grad
    )
    wide = [t.double() for t in inputs]
    expected = _with_gradients(lambda *t: _brute_force(*t, DIFFERENT), wide, grad.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["blocked", "sdpa", "sdpa_padded", "reference"])
def test_a_document_hears_nothing_from_outside(backend):
    """Bit for bit: not from an earlier document, a later one, or another sequence, forward or backward."""
    inputs, grad = _case(torch.float32)
    noise = _case(torch.float32)[0][0].flip(0)
    inside = torch.zeros(200, 2, 1, 1, dtype=torch.bool)
    inside[77:200, 0] = True

    def second_document(inputs, grad):
        found = _with_gradients(
            lambda *t: causal_attention(*t, softmax_scale=SCALE, document_bounds=DIFFERENT, backend=backend),
            inputs, grad)
        return [t[77:200, 0] for t in found]

    changed = [torch.where(inside, t, 3 * noise[..., : t.shape[-1]]) for t in (*inputs, grad)]
    for a, b in zip(second_document(inputs, grad), second_document(changed[:3], changed[3]), strict=True):
        assert torch.equal(a, b)
    leaking = _with_gradients(lambda *t: causal_attention(*t, softmax_scale=SCALE, backend=backend), changed[:3], grad)
    assert not torch.allclose(leaking[0][77:200, 0], second_document(inputs, grad)[0], atol=1e-2)


def test_bf16_result_is_the_fp32_result_rounded():
    inputs, grad = _case(torch.bfloat16)
    got = _with_gradients(lambda *t: causal_attention(*t, softmax_scale=SCALE), inputs, grad)
    expected = _with_gradients(_brute_force, [t.double() for t in inputs], grad.double())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)  # half a step of 8 bits


def test_packed_rows_without_a_batch_dimension():
    inputs, _ = _case(length=50, batch=1)
    bounds = ((0, 20, 50),)
    whole = causal_attention(*inputs, softmax_scale=SCALE, document_bounds=bounds)
    packed = causal_attention(*(t.squeeze(1) for t in inputs), softmax_scale=SCALE, document_bounds=bounds)
    assert torch.equal(whole.squeeze(1), packed)


def test_bad_input():
    (q, k, v), _ = _case(length=10)
    for bad in ((0, 5), (1, 10), (0, 6, 5, 10), (0,), ()):
        message = rf"document_bounds\[1\]=\[{', '.join(map(str, bad))}\] must rise from 0 to the sequence length 10"
        with pytest.raises(ValueError, match=message):
            causal_attention(q, k, v, softmax_scale=1.0, document_bounds=((0, 10), bad))
    with pytest.raises(ValueError, match="document_bounds has 1 rows, the micro-batch 2 sequences"):
        causal_attention(q, k, v, softmax_scale=1.0, document_bounds=((0, 10),))
    with pytest.raises(ValueError, match="backend='flash' of causal_attention must be one of auto, blocked"):
        causal_attention(q, k, v, softmax_scale=1.0, backend="flash")
    with pytest.raises(ValueError, match="must agree, except v in its last dimension"):
        causal_attention(q, k[:, :, :1], v, softmax_scale=1.0)
