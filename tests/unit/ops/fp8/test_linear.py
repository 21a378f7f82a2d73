"""FP8 linear and experts against a composition of slow pieces, and against the exact layer within FP8's error."""

import dataclasses

import pytest
import torch

from dsv3_megatron.config.precision import BF16, LinearPrecision
from dsv3_megatron.ops.experts import reference_experts
from dsv3_megatron.ops.fp8.experts import fp8_swiglu_experts
from dsv3_megatron.ops.fp8.held_weights import constant_weights
from dsv3_megatron.ops.fp8.linear import fp8_linear
from dsv3_megatron.ops.linear import linear
from tests.slow_fp8 import rounded

TILE, SQUARE = (1, 128), (128, 128)
DEFAULT = LinearPrecision()
AFTER_ATTENTION = LinearPrecision(cached_input="e5m6", input_scales="power_of_2")


def columns(x, power_of_2=False):
    return rounded(x.t(), TILE, power_of_2=power_of_2).t()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_gradients(function, inputs, grad):
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    y = function(*leaves)
    return y, *torch.autograd.grad(y, leaves, grad)


def close(got, expected, dtype=torch.float32):
    """Equal but for sums in fp32, and the result's own rounding."""
    tolerance = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


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


def test_weights_are_quantized_once_where_they_are_constant(monkeypatch):
    from dsv3_megatron.ops.fp8.reference_backend import ReferenceBackend

    counted = []

    class Counting(ReferenceBackend):
        def quantize(self, x, group=TILE, **options):
            counted.extend([group] if group == SQUARE else [])
            return super().quantize(x, group, **options)

    x, weight = random(8, 128), random(128, 128, seed=1).requires_grad_()

    def step():
        counted.clear()
        for _ in range(3):
            fp8_linear(x, weight, DEFAULT, backend=Counting()).sum().backward()
        return len(counted)

    assert step() == 3  # no input gradient asked for; each forward quantizes
    with constant_weights():
        assert step() == 1
        assert step() == 0
    before = fp8_linear(x, weight, DEFAULT)
    weight.data.mul_(2)
    with constant_weights():
        assert not torch.equal(fp8_linear(x, weight, DEFAULT), before), "forgotten at the end"


def test_not_a_number_reaches_output_and_gradients():
    x, weight, grad = random(5, 128), random(128, 128, seed=1), random(5, 128, seed=2)
    x[2, 3] = float("inf")
    y, _, grad_w = with_gradients(lambda x, w: fp8_linear(x, w, DEFAULT), (x, weight), grad)
    assert y[2].isnan().all() and torch.isfinite(y[:2]).all()
    assert grad_w[:, :128].isnan().any()


# -- experts -------------------------------------------------------------------------------------------

COUNTS = [70, 0, 133, 1]
FIRST = dataclasses.replace(DEFAULT, input_scales="power_of_2")


def experts_case(dtype=torch.float32, hidden=136, width=72):
    shapes = ((sum(COUNTS), hidden), (4, 2 * width, hidden), (4, hidden, width), (sum(COUNTS),), (sum(COUNTS), hidden))
    x, fc1, fc2, gates, grad = (random(*shape, seed=i) * (shape[-1] ** -0.5 if i in (1, 2) else 1)
                                for i, shape in enumerate(shapes))
    return [x.to(dtype), fc1.to(dtype), fc2.to(dtype), gates.sigmoid()], grad.to(dtype)


def call(first=FIRST, second=DEFAULT, **options):
    return lambda x, fc1, fc2, gates: fp8_swiglu_experts(x, COUNTS, fc1, fc2, gates, (first, second), **options)


def test_experts_are_their_pieces():
    (x, fc1, fc2, gates), grad = experts_case()
    got = with_gradients(call(), (x, fc1, fc2, gates), grad)
    start = 0
    for expert, count in enumerate(COUNTS):
        rows = slice(start, start + count)
        start += count
        if not count:
            assert got[2][expert].eq(0).all() and got[3][expert].eq(0).all()
            continue
        w1, w2 = rounded(fc1[expert], SQUARE), rounded(fc2[expert], SQUARE)
        rounded_x = rounded(x[rows], TILE, power_of_2=True)
        gate_up = (rounded_x @ w1.T).float()
        row_gates = gates[rows].double().unsqueeze(1)

        def swiglu(h, row_gates=row_gates):
            gate, up = h.chunk(2, dim=1)
            return gate * torch.sigmoid(gate) * up * row_gates

        active = swiglu(gate_up.double()).float()
        close(got[0][rows], rounded(active, TILE) @ w2.T)
        # Backward: SwiGLU again, of its kept input.
        kept = rounded(gate_up, TILE).requires_grad_()
        leaf_gates = row_gates.clone().requires_grad_()
        again = swiglu(kept, leaf_gates)
        grad_active = rounded(grad[rows], TILE) @ w2
        grad_kept, grad_gates = torch.autograd.grad(again, (kept, leaf_gates), grad_active)
        grad_kept = grad_kept.float()
        # Where fp32 and float64 fall on two sides of a rounding point, one E4M3 step of one value differs.
        for value, expected in ((got[1][rows], rounded(grad_kept, TILE) @ w1),
                                (got[2][expert], columns(grad_kept).T @ columns(rounded_x.float(), True)),
                                (got[3][expert], columns(grad[rows]).T @ columns(again.detach().float())),
                                (got[4][rows], grad_gates.squeeze(1))):
            assert relative_error(value, expected) < 2e-3


@pytest.mark.parametrize("precisions", [(FIRST, DEFAULT), (BF16, BF16), (DEFAULT, BF16), (
    dataclasses.replace(FIRST, grad_grouping="block"), dataclasses.replace(DEFAULT, grad_grouping="block"))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_against_the_exact_ones(dtype, precisions):
    inputs, grad = experts_case(dtype)
    exact = with_gradients(lambda x, a, b, g: reference_experts(x, COUNTS, a, b, g), [t.double() for t in inputs],
                           grad.double())
    got = with_gradients(call(*precisions), inputs, grad)
    bound = 0.15 if any(p.is_fp8 for p in precisions) else (2e-2 if dtype == torch.bfloat16 else 1e-5)
    for value, true in zip(got, exact, strict=True):
        assert value.dtype == dtype or value.dtype == torch.float32
        assert relative_error(value, true) < bound


def test_experts_deferred_equal_at_once():
    inputs, grad = experts_case(torch.bfloat16)
    results = {}
    for deferred in (False, True):
        x, fc1, fc2, gates = (t.detach().clone().requires_grad_() for t in inputs)
        for weight in (fc1, fc2):
            weight.main_grad = torch.zeros(weight.shape)
        queue = []
        call(accumulate_into_main_grad=True, defer_weight_grad=queue.append if deferred else None)(
            x, fc1, fc2, gates).backward(grad)
        assert len(queue) == 2 * deferred
        assert not deferred or not hasattr(fc1, "grad_added_to_main_grad")
        for compute in queue:
            compute()
        assert fc1.grad_added_to_main_grad and fc2.grad_added_to_main_grad
        results[deferred] = (x.grad, gates.grad, fc1.main_grad, fc2.main_grad)
    for a, b in zip(results[False], results[True], strict=True):
        assert torch.equal(a, b)


def test_experts_keep_narrow_tensors():
    kept = []
    (x, fc1, fc2, gates), _ = experts_case(torch.bfloat16, hidden=256, width=128)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        call()(x.requires_grad_(), fc1.requires_grad_(), fc2.requires_grad_(), gates)
    rows = sum(COUNTS)
    assert sum(kept) == rows * (256 + 2 * 4) * 2 + gates.nbytes


def test_experts_without_rows_and_with_wrong_counts():
    (x, fc1, fc2, gates), _ = experts_case()
    fc1.requires_grad_()
    out = fp8_swiglu_experts(x[:0], [0] * 4, fc1, fc2, gates[:0], (FIRST, DEFAULT))
    out.sum().backward()
    assert out.shape == (0, 136) and fc1.grad.eq(0).all()
    with pytest.raises(ValueError, match=r"counts=\[1, 2\] must have one entry for each of 4 experts"):
        fp8_swiglu_experts(x, [1, 2], fc1, fc2, gates, (FIRST, DEFAULT))
