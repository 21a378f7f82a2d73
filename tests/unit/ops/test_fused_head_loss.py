"""The fused head and loss from hidden states to gradients, beside the chunked one, and against float64."""

import pytest
import torch

from dsv3_megatron.ops.cross_entropy import linear_cross_entropy, reference_cross_entropy

pytest.importorskip("triton", reason="triton is not installed on this platform")

# Tokens and vocabularies that tiles divide or not, several chunks of columns or one.
CASES = {"several chunks": (2, 18, 16, 130), "one chunk": (37, 1, 48, 40), "one token": (1, 1, 16, 33)}


def _case(shape, dtype):
    *tokens, hidden, vocabulary = shape
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(s, generator=generator).to(dtype) for s in ((*tokens, hidden), (vocabulary, hidden)))
    targets = torch.randint(0, vocabulary, tokens, generator=generator)
    grad = torch.rand(tokens, generator=generator)
    if targets.numel() > 2:
        targets.view(-1)[1], grad.view(-1)[2] = -100, 0
    return h, w, targets, grad


def _run(h, w, targets, grad, **settings):
    h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
    if settings.get("accumulate_into_main_grad"):
        w.main_grad = torch.full(w.shape, 0.5)
    losses = linear_cross_entropy(h, w, targets, **settings)
    losses.backward(grad.to(losses.dtype))
    return losses.detach(), h.grad, w.main_grad - 0.5 if w.grad is None else w.grad


def _exact(h, w, targets, grad, dtype):
    """Float64, with the gradients of the logits rounded as operands of a product in `dtype` are."""
    h, w, counts = h.flatten(0, -2).double(), w.double(), targets.flatten() != -100
    own = targets.flatten().where(counts, 0)
    logits = h @ w.T
    grads = (logits.softmax(1) - torch.nn.functional.one_hot(own, w.shape[0])) * (grad.flatten() * counts)[:, None]
    grads = grads.to(dtype).double()
    losses = reference_cross_entropy(logits, own) * counts
    return losses.view(targets.shape), (grads @ w).view(*targets.shape, -1), grads.T @ h


@pytest.mark.parametrize("to_main_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_equals_float64(case, dtype, to_main_grad):
    inputs = _case(CASES[case], dtype)
    losses, grad_hidden, grad_weight = _run(*inputs, backend="fused", accumulate_into_main_grad=to_main_grad)
    assert losses.dtype == torch.float32 and grad_hidden.dtype == dtype
    exact = _exact(*inputs, dtype)
    torch.testing.assert_close(losses.double(), exact[0], rtol=2e-6, atol=2e-6)
    # A gradient of a logit may fall beside a rounding of bf16: half a step of its 8 bits, here and there.
    narrow = 2**-9 if dtype == torch.bfloat16 else 2e-6
    result = 2**-8 if dtype == torch.bfloat16 else 2e-6
    largest = [value.abs().max().item() for value in exact]
    torch.testing.assert_close(grad_hidden.double(), exact[1], rtol=result, atol=narrow * largest[1])
    torch.testing.assert_close(grad_weight.double(), exact[2], rtol=2e-6 if to_main_grad else result,
                               atol=narrow * largest[2])


def test_bf16_gradients_reach_the_main_gradient_without_another_rounding():
    """The sum over tokens is as good as in fp32: what is left is the rounding of the gradients of the logits."""
    inputs = _case(CASES["several chunks"], torch.bfloat16)
    _, _, grad_weight = _run(*inputs, backend="fused", accumulate_into_main_grad=True)
    exact = _exact(*inputs, torch.bfloat16)[2]
    wrong = (grad_weight.double() - exact).abs() > 1e-6
    assert wrong.float().mean() < 0.02  # those whose logit lies beside a rounding
    assert not torch.equal(grad_weight, grad_weight.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_reference(dtype):
    inputs = _case(CASES["several chunks"], dtype)
    settings = {"keep_probabilities": False, "product_backend": "via_fp32", "chunk_tokens": 7}
    for got, expected in zip(_run(*inputs, backend="fused"), _run(*inputs, backend="chunked", **settings), strict=True):
        tolerance = 1e-5 if got.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_no_token_counts():
    h, w, targets, _ = _case(CASES["several chunks"], torch.bfloat16)
    for grad, own in ((torch.zeros(2, 18), targets), (torch.ones(2, 18), torch.full_like(targets, -100))):
        losses, *grads = _run(h, w, own, grad, backend="fused")
        assert losses.isfinite().all() and not any(grad.any() for grad in grads)
    assert not losses.any()


def test_the_weight_gradient_does_not_wait():
    h, w, targets, grad = _case(CASES["several chunks"], torch.float32)
    queue = []
    deferred = _run(h, w, targets, grad, backend="fused", accumulate_into_main_grad=True,
                    defer_weight_grad=queue.append)
    at_once = _run(h, w, targets, grad, backend="fused", accumulate_into_main_grad=True)
    assert not queue and all(map(torch.equal, deferred, at_once))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    h, w, targets, grad = _case(CASES["several chunks"], torch.float32)
    h.requires_grad_(frozen != "hidden")
    w.requires_grad_(frozen != "weight")
    linear_cross_entropy(h, w, targets, backend="fused").backward(grad)
    assert (h.grad is None) == (frozen == "hidden") and (w.grad is None) == (frozen == "weight")


def test_mtp_and_main_head_share_one_weight():
    h, w, targets, grad = _case(CASES["several chunks"], torch.float32)
    w.requires_grad_()
    w.main_grad = torch.zeros_like(w)
    others = targets.flip(0)
    losses = [linear_cross_entropy(hidden, w, own, backend="fused", accumulate_into_main_grad=True)
              for hidden, own in ((h, targets), (h.flip(1), others))]
    (losses[0] * grad + 0.3 * losses[1] * grad).sum().backward()
    expected = _exact(h, w.detach(), targets, grad, torch.float64)[2] + 0.3 * _exact(
        h.flip(1), w.detach(), others, grad, torch.float64)[2]
    torch.testing.assert_close(w.main_grad.double(), expected, rtol=1e-5, atol=1e-5)
