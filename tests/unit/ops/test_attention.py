"""ops/attention.py against the whole score matrix in float64."""

import pytest
import torch

from dsv3_megatron.ops import attention
from dsv3_megatron.ops.attention import causal_attention, reference_attention

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


def _reference(q, k, v, bounds):
    parts = [reference_attention(q[a:b], k[a:b], v[a:b], SCALE) for a, b in zip(bounds, bounds[1:], strict=False)]
    return torch.cat(parts)


@pytest.mark.parametrize("keep_bytes", [0, 1 << 30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("bounds", [[0, 200], [0, 1, 130, 130, 200]], ids=["one_document", "four_documents"])
def test_blocked_equals_reference_in_float64(monkeypatch, keep_bytes, bounds):
    monkeypatch.setattr(attention, "_KEPT_PROBABILITY_BYTES", keep_bytes)
    monkeypatch.setattr(attention, "_TILE_BYTES", 4 * 128 * 200 * 4)  # more than one group of heads
    inputs, grad = _case()
    cu_seqlens = None if len(bounds) == 2 else torch.tensor(bounds, dtype=torch.int32)
    got = _with_gradients(
        lambda *t: causal_attention(*t, softmax_scale=SCALE, cu_seqlens=cu_seqlens, backend="blocked"), inputs, grad
    )
    expected = _with_gradients(lambda *t: _reference(*t, bounds), inputs, grad)
    assert got[0].is_contiguous() and got[0].flatten(2).shape == (200, 2, 24)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradcheck():
    inputs, _ = _case(length=5, batch=1, heads=2, width=4, value_width=3)
    inputs = [t.requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: causal_attention(*t, softmax_scale=SCALE), inputs)


@pytest.mark.parametrize("backend", ["sdpa", "sdpa_padded", "reference"])
def test_other_backends(backend):
    inputs, grad = _case(torch.float32)
    cu_seqlens = torch.tensor([0, 77, 200])
    got = _with_gradients(
        lambda *t: causal_attention(*t, softmax_scale=SCALE, cu_seqlens=cu_seqlens, backend=backend), inputs, grad
    )
    expected = _with_gradients(lambda *t: _reference(*t, [0, 77, 200]), [t.double() for t in inputs], grad.double())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_bf16_result_is_the_fp32_result_rounded():
    inputs, grad = _case(torch.bfloat16)
    got = _with_gradients(lambda *t: causal_attention(*t, softmax_scale=SCALE), inputs, grad)
    expected = _with_gradients(lambda *t: _reference(*t, [0, 200]), [t.double() for t in inputs], grad.double())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)  # half a step of 8 bits


def test_packed_rows_without_a_batch_dimension():
    inputs, _ = _case(length=50, batch=1)
    cu_seqlens = torch.tensor([0, 20, 50])
    whole = causal_attention(*inputs, softmax_scale=SCALE, cu_seqlens=cu_seqlens)
    packed = causal_attention(*(t.squeeze(1) for t in inputs), softmax_scale=SCALE, cu_seqlens=cu_seqlens)
    assert torch.equal(whole.squeeze(1), packed)


def test_bad_input():
    (q, k, v), _ = _case(length=10)
    with pytest.raises(ValueError, match=r"cu_seqlens=\[0, 5\] must rise from 0 to the sequence length 10"):
        causal_attention(q, k, v, softmax_scale=1.0, cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="backend='flash' of causal_attention must be one of auto, blocked"):
        causal_attention(q, k, v, softmax_scale=1.0, backend="flash")
    with pytest.raises(ValueError, match="must agree, except v in its last dimension"):
        causal_attention(q, k[:, :, :1], v, softmax_scale=1.0)
