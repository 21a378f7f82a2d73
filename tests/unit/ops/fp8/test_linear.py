"""FP8 linear and experts against a composition of slow pieces, and against the exact layer within FP8's error."""

import dataclasses
from functools import partial

import pytest
import torch

from dsv3_megatron.config.precision import BF16, LinearPrecision
from dsv3_megatron.ops.fp8.linear import fp8_linear
from dsv3_megatron.ops.linear import linear
from dsv3_megatron.ops.recompute import held, recomputed
from dsv3_megatron.ops.rms_norm import rms_norm
from tests.slow_fp8 import rounded
from tests.unit.ops.fp8.layers import (
    DEFAULT,
    SQUARE,
    TILE,
    close,
    columns,
    random,
    relative_error,
    with_gradients,
)

AFTER_ATTENTION = LinearPrecision(cached_input="e5m6", input_scales="power_of_2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("precision", [
    DEFAULT, AFTER_ATTENTION, dataclasses.replace(DEFAULT, input_scales="power_of_2", scales="power_of_2"),
    dataclasses.replace(DEFAULT, grad_grouping="block"), dataclasses.replace(DEFAULT, wgrad="bf16"),
    dataclasses.replace(DEFAULT, dgrad="bf16", cached_input="bf16"), dataclasses.replace(BF16, wgrad="fp8"),
])
def test_linear_is_its_pieces(precision, dtype):
    """Odd sizes: 3 x 70 tokens, 200 inputs, 130 outputs."""
    x, weight, grad = (random(*shape, seed=i).to(dtype) for i, shape in enumerate(((3, 70, 200), (130, 200),
                                                                                   (3, 70, 130))))
    y, grad_x, grad_w = with_gradients(lambda x, w: fp8_linear(x, w, precision), (x, weight), grad)
    rows, grad_rows = x.flatten(0, 1), grad.flatten(0, 1)
    x_pow2, pow2 = precision.input_scales == "power_of_2", precision.scales == "power_of_2"
    rounded_weight = rounded(weight, SQUARE, power_of_2=pow2)
    if precision.fprop == "fp8":
        expected = rounded(rows, TILE, power_of_2=x_pow2) @ rounded_weight.T
    else:
        expected = rows.double() @ weight.double().T
    close(y.flatten(0, 1), expected, dtype)
    if precision.dgrad == "fp8":
        group = TILE if precision.grad_grouping == "tile" else SQUARE
        expected = rounded(grad_rows, group, power_of_2=pow2) @ rounded_weight
    else:
        expected = grad_rows.double() @ weight.double()
    close(grad_x.flatten(0, 1), expected, dtype)
    kept = precision.cached_input
    cached = rows.double() if kept == "bf16" else rounded(rows, TILE, kept, x_pow2)
    if precision.wgrad == "fp8":
        cached = columns(cached.float(), x_pow2)
        expected = columns(grad_rows, pow2).T @ cached
    else:
        expected = grad_rows.double().T @ cached
    close(grad_w, expected, dtype)


def test_error_against_the_exact_layer():
    """E4M3 rounds by 2^-4 at most, about 2.6% in the mean square: a product of two such operands errs by 3 to 5%."""
    x, weight, grad = random(256, 384), random(256, 384, seed=1), random(256, 256, seed=2)
    exact = with_gradients(linear, (x.double(), weight.double()), grad.double())
    got = with_gradients(lambda x, w: fp8_linear(x, w, DEFAULT), (x, weight), grad)
    for value, true in zip(got, exact, strict=True):
        assert 0.01 < relative_error(value, true) < 0.06


def test_blocks_of_gradients_lose_tokens_with_small_ones():
    """Appendix B.2: gradients differ much between tokens, and one scale for 128 of them loses the small."""
    x, weight = random(256, 128), random(128, 128, seed=1)
    grad = random(256, 128, seed=2) * torch.logspace(0, -8, 256)[torch.randperm(256)].unsqueeze(1)
    exact = grad.double() @ weight.double()
    errors = {}
    for grouping in ("tile", "block"):
        precision = dataclasses.replace(DEFAULT, grad_grouping=grouping)
        _, grad_x, _ = with_gradients(lambda x, w, p=precision: fp8_linear(x, w, p), (x, weight), grad)
        errors[grouping] = ((grad_x.double() - exact).norm(dim=1) / exact.norm(dim=1)).mean().item()
    assert errors["tile"] < 0.06 and errors["block"] > 0.3


def test_the_accumulation_model_is_visible():
    x, weight = random(64, 1024).abs(), random(64, 1024, seed=1).abs()
    exact, modelled = (fp8_linear(x, weight, dataclasses.replace(DEFAULT, accumulation=a)) for a in ("fp32", "fp22"))
    bias = ((modelled - exact) / exact).mean().item()
    assert -1e-3 < bias < -1e-5


@pytest.mark.parametrize("precision", [DEFAULT, AFTER_ATTENTION])
def test_what_is_kept_is_narrow(precision):
    kept = []
    x = random(64, 256).bfloat16().requires_grad_()
    weight = random(128, 256, seed=1).bfloat16().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        fp8_linear(x, weight, precision)
    expected = x.numel() + x.numel() // 128 * 4 if precision == DEFAULT else x.numel() * 3 // 2 + x.numel() // 128 * 4
    assert sum(kept) == expected


@pytest.mark.parametrize("precision", [DEFAULT, AFTER_ATTENTION, dataclasses.replace(DEFAULT, cached_input="bf16")])
@pytest.mark.parametrize("at_hand", ["made again", "held"])
def test_a_copy_of_what_is_at_hand_is_made_again_with_the_same_bits(precision, at_hand):
    """A norm's output that is computed again, a result that its operation keeps: no FP8 copy is kept beside them."""
    inputs = random(70, 256).bfloat16(), random(256, seed=1).bfloat16(), random(130, 256, seed=2).bfloat16()
    grad = random(70, 130, seed=3).bfloat16()

    def layer(x, scale, weight, norm):
        return fp8_linear(norm(x, scale), weight, precision)

    expected = with_gradients(lambda *leaves: layer(*leaves, rms_norm), inputs, grad)
    kept = []
    norm = partial(recomputed, rms_norm) if at_hand == "made again" else lambda x, scale: held(rms_norm(x, scale))
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    normed = norm(*leaves[:2])
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = fp8_linear(normed, leaves[2], precision)
    addresses = {t.untyped_storage().data_ptr() for t in kept}
    assert addresses <= {normed.untyped_storage().data_ptr()}, "nothing but what is there in any case"
    for got, other in zip((y, *torch.autograd.grad(y, leaves, grad)), expected, strict=True):
        assert torch.equal(got, other)


@pytest.mark.parametrize("precision", [DEFAULT, AFTER_ATTENTION, dataclasses.replace(DEFAULT, wgrad="bf16")])
def test_what_waits_for_long_waits_narrow_with_the_same_bits(precision):
    x, weight, grad = random(140, 256), random(130, 256, seed=1).requires_grad_(), random(140, 130, seed=2)
    main_grads = []
    for is_long in (False, True):
        weight.main_grad, queue = torch.ones(130, 256), []
        fp8_linear(x.clone().requires_grad_(), weight, precision, accumulate_into_main_grad=True,
                   defer_weight_grad=queue.append).backward(grad)
        (work,) = queue
        if is_long:
            work.narrow()
            if precision.wgrad == "fp8":
                (operands,) = next(held for held in work.held if isinstance(held, list))
                assert operands.grad.num_bytes == (140 + 2 * 4) * 130
                assert operands.cached.num_bytes == (140 + 2 * 4) * 256
                assert not any(torch.is_tensor(held) for held in work.held), "nothing wide is left"
        work()
        main_grads.append(weight.main_grad)
    assert torch.equal(*main_grads)


def test_main_grad_and_deferral():
    x, weight, grad = random(40, 130), random(50, 130, seed=1).requires_grad_(), random(40, 50, seed=2)
    _, _, expected = with_gradients(lambda x, w: fp8_linear(x, w, DEFAULT), (x, weight), grad)
    for main in (True, False):
        for deferred in (True, False):
            weight.grad = weight.main_grad = None
            if main:
                weight.main_grad, weight.grad_added_to_main_grad = torch.ones(50, 130), False
            queue = []
            leaf = x.clone().requires_grad_()
            fp8_linear(leaf, weight, DEFAULT, accumulate_into_main_grad=main,
                       defer_weight_grad=queue.append if deferred else None).backward(grad)
            assert leaf.grad is not None and len(queue) == deferred
            for compute in queue:
                assert weight.grad is None
                compute()
                with pytest.raises(RuntimeError, match="computed twice"):
                    compute()
            got = weight.main_grad - 1 if main else weight.grad
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
            assert not main or weight.grad_added_to_main_grad


def test_not_a_number_reaches_output_and_gradients():
    x, weight, grad = random(5, 128), random(128, 128, seed=1), random(5, 128, seed=2)
    x[2, 3] = float("inf")
    y, _, grad_w = with_gradients(lambda x, w: fp8_linear(x, w, DEFAULT), (x, weight), grad)
    assert y[2].isnan().all() and torch.isfinite(y[:2]).all()
    assert grad_w[:, :128].isnan().any()


# -- experts -------------------------------------------------------------------------------------------
