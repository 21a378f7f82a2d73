"""ops/cross_entropy.py against the formula in float64."""

import pytest
import torch

from dsv3_megatron.ops import cross_entropy
from dsv3_megatron.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy, token_cross_entropy
from dsv3_megatron.ops.softmax import softmax_and_logsumexp_


def _case(dtype=torch.float64, vocab=40):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((5, 2, 16), (vocab, 16), (5, 2))
    )
    grad[2, 1] = 0  # a masked token
    targets = torch.randint(0, vocab, (5, 2), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, grad


def _with_gradients(function, inputs, grad):
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    return out, *torch.autograd.grad(out, inputs, grad.to(out.dtype))


def _expected(hidden, weight, targets, grad):
    inputs = [hidden.double(), weight.double()]
    return _with_gradients(lambda h, w: reference_cross_entropy(h @ w.T, targets), inputs, grad)


@pytest.mark.parametrize("keep", [True, False, None])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 10, 100])
def test_equals_reference_in_float64(keep, chunk_tokens):
    hidden, weight, targets, grad = _case()
    got = _with_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, keep_probabilities=keep, chunk_tokens=chunk_tokens),
        [hidden, weight],
        grad,
    )
    for a, b in zip(got, _expected(hidden, weight, targets, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("dtype", "product_backend"),
    [(torch.float32, "auto"), (torch.bfloat16, "via_fp32"), (torch.bfloat16, "native")],
)
def test_other_dtypes(dtype, product_backend, keep):
    hidden, weight, targets, grad = _case(dtype)
    got = _with_gradients(
        lambda h, w: linear_cross_entropy(h, w, targets, keep_probabilities=keep, product_backend=product_backend),
        [hidden, weight],
        grad,
    )
    assert got[0].dtype == torch.float32 and got[1].dtype == dtype
    # bf16: kept probabilities and results are rounded to 8 bits, native products round logits too.
    tolerance = {torch.float32: 1e-5}.get(dtype, 2**-7 if product_backend == "via_fp32" else 2**-5)
    for a, b in zip(got, _expected(hidden, weight, targets, grad), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


def test_main_grad():
    hidden, weight, targets, grad = _case(torch.float32)
    weight.requires_grad_()
    weight.main_grad = torch.ones_like(weight)
    linear_cross_entropy(hidden, weight, targets, accumulate_into_main_grad=True).backward(grad.float())
    exact = _expected(hidden, weight.detach(), targets, grad)[2]
    torch.testing.assert_close(weight.main_grad.double(), 1 + exact, rtol=1e-5, atol=1e-5)
    assert weight.grad_added_to_main_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_token_cross_entropy(dtype):
    hidden, weight, targets, grad = _case()
    logits = (hidden @ weight.T).to(dtype)
    got = _with_gradients(lambda t: token_cross_entropy(t, targets), [logits], grad)
    expected = _with_gradients(lambda t: reference_cross_entropy(t, targets), [logits.double()], grad)
    tolerance = 1e-10 if dtype == torch.float64 else 2**-7
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


def test_backward_of_narrow_probabilities_can_be_repeated():
    """They are changed at the targets for the products alone; also where a probability is close to 1."""
    hidden, weight, targets, grad = _case(torch.bfloat16)
    rows = hidden.view(-1, hidden.shape[-1])
    weight[targets.view(-1)[0]] = 3 * rows[0] / rows[0].norm()  # sure of the first token
    inputs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    losses = linear_cross_entropy(*inputs, targets, product_backend="native", keep_probabilities=True)
    first, again = (torch.autograd.grad(losses, inputs, grad.float(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    expected = _expected(hidden, weight, targets, grad)[1:]
    for got, exact in zip(first, expected, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=2**-5, atol=2**-5 * exact.abs().max().item())


def test_extreme_logits_stay_finite():
    scores = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 0.0, 0.0]])
    logsumexp = softmax_and_logsumexp_(scores)
    torch.testing.assert_close(logsumexp, torch.tensor([1e4, 0.6931472]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))


def test_bad_input():
    hidden, weight, targets, _ = _case()
    with pytest.raises(ValueError, match=r"targets \(2, 5\) must have the shape of hidden \(5, 2, 16\)"):
        linear_cross_entropy(hidden, weight, targets.T)
    with pytest.raises(ValueError, match="chunk_tokens=0 must be at least 1"):
        linear_cross_entropy(hidden, weight, targets, chunk_tokens=0)
    for wrong in (40, -1):
        targets[1, 1] = wrong
        with pytest.raises(ValueError, match=rf"target {wrong} must be a token of the vocabulary, 0\.\.39, or -100"):
            linear_cross_entropy(hidden, weight, targets)


@pytest.mark.parametrize("keep", [True, False])
def test_ignored_targets(keep):
    hidden, weight, targets, grad = _case()
    ignored = targets.clone()
    ignored[1, 0] = ignored[4, 1] = -100
    counts = ignored != -100
    got = _with_gradients(lambda h, w: linear_cross_entropy(h, w, ignored, keep_probabilities=keep, chunk_tokens=3),
                          [hidden, weight], grad)
    expected = _expected(hidden, weight, targets, grad * counts)
    torch.testing.assert_close(got[0], expected[0] * counts, rtol=1e-10, atol=1e-10)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_counted", [0, 1, 16, 17, 40, 50])
def test_the_head_multiplies_the_rows_that_count(num_counted, monkeypatch):
    """Few of 64 among ignored ones: in sixteens, nothing but theirs; nearly all of them: as they are."""
    draws = torch.Generator().manual_seed(num_counted)
    hidden, weight, grad = (torch.randn(shape, generator=draws, dtype=torch.float64)
                            for shape in ((32, 2, 16), (40, 16), (32, 2)))
    targets = torch.randint(0, 40, (64,), generator=draws)
    counts = torch.zeros(64, dtype=torch.bool)
    counts[torch.randperm(64, generator=draws)[:num_counted]] = True
    targets, counts = targets.view(32, 2), counts.view(32, 2)
    seen, chunked = [], cross_entropy.chunked_scores
    monkeypatch.setattr(cross_entropy, "chunked_scores", lambda rows, *rest, **named: (
        seen.append(len(rows)), chunked(rows, *rest, **named))[1])
    got = _with_gradients(lambda h, w: linear_cross_entropy(h, w, targets.masked_fill(~counts, -100)),
                          [hidden, weight], grad)
    assert seen == [{0: 16, 1: 16, 16: 16, 17: 32, 40: 48, 50: 64}[num_counted]]
    expected = _expected(hidden, weight, targets, grad * counts)
    torch.testing.assert_close(got[0], expected[0] * counts, rtol=1e-10, atol=1e-10)
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("to_main_grad", [True, False])
@pytest.mark.parametrize(("dtype", "product_backend"), [
    (torch.float32, "auto"), (torch.bfloat16, "via_fp32"), (torch.bfloat16, "native")])
def test_deferred_weight_gradients_are_the_same_bit_for_bit(keep, to_main_grad, dtype, product_backend):
    hidden, weight, targets, grad = _case(dtype)

    def gradients(defer):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if to_main_grad:
            w.main_grad = torch.full_like(w, 0.5, dtype=torch.float32)
        linear_cross_entropy(h, w, targets, keep_probabilities=keep, chunk_tokens=4, product_backend=product_backend,
                             accumulate_into_main_grad=to_main_grad, defer_weight_grad=defer).backward(grad.float())
        yield h.grad
        yield w.main_grad if to_main_grad else w.grad

    expected, queue = gradients(None), []
    got = gradients(queue.append)
    assert torch.equal(next(got), next(expected))
    (work,) = queue
    work()
    assert torch.equal(next(got), next(expected))
