"""What is computed again in backward: the same gradients, nothing kept, and independence of who drives backward."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

from dsv3_megatron.ops import recompute
from dsv3_megatron.ops.attention import causal_attention
from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.linear import linear
from dsv3_megatron.ops.recompute import held, is_at_hand, recomputed, remembered, saving
from dsv3_megatron.ops.rms_norm import rms_norm


def leaf(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


class Norm:
    """rms_norm that counts how often it is computed."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return rms_norm(x, weight)


def two_products(is_recomputed: bool) -> tuple[dict[str, torch.Tensor], Norm, list[Any]]:
    """A normed input that two products keep; leaves, the norm, and the results."""
    leaves = {"x": leaf(6, 4, 8), "weight": leaf(8, seed=1), "first": leaf(5, 8, seed=2), "second": leaf(3, 8, seed=3)}
    norm = Norm()
    y = recomputed(norm, leaves["x"], leaves["weight"]) if is_recomputed else norm(leaves["x"], leaves["weight"])
    freed = weakref.ref(y.untyped_storage())
    results = [linear(y, leaves["first"]), linear(y[2:], leaves["second"]), freed]
    return leaves, norm, results


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_gradients_are_the_same_whoever_asks_first_and_nothing_is_kept(order):
    expected, _, (first, second, kept) = two_products(False)
    assert kept() is not None
    (first.square().sum() + second.square().sum()).backward()
    leaves, norm, results = two_products(True)
    gc.collect()
    assert results[2]() is None, "the output is kept"
    assert norm.num_calls == 1
    losses = [results[index].square().sum() for index in order]
    torch.autograd.backward(losses)
    assert norm.num_calls == 2, "computed again once for both products"
    for name, tensor in leaves.items():
        assert torch.equal(tensor.grad, expected[name].grad), name


def test_a_detached_copy_is_recognised_and_backward_may_be_driven_in_parts():
    """As a schedule that runs a layer in segments does."""
    expected, _, (first, second, _) = two_products(False)
    (first.sum() + second.square().sum()).backward()
    leaves, norm = {name: tensor.detach().requires_grad_() for name, tensor in expected.items()}, Norm()
    y = recomputed(norm, leaves["x"], leaves["weight"])
    boundary = y.detach().requires_grad_()
    freed = weakref.ref(y.untyped_storage())
    loss = linear(boundary, leaves["first"]).sum() + linear(boundary[2:], leaves["second"]).square().sum()
    # The end of the first segment and the boundary need no data any more.
    gradient, node = boundary, y.grad_fn
    boundary.data = torch.empty(0)
    y.data = torch.empty(0)
    gc.collect()
    assert freed() is None
    boundary.data = torch.empty(6, 4, 8)
    loss.backward()
    assert gradient.grad is not None and node is not None
    y.data = torch.empty(6, 4, 8)
    y.backward(gradient.grad)
    assert norm.num_calls == 2
    for name in ("first", "second", "weight", "x"):
        assert torch.equal(leaves[name].grad, expected[name].grad), name


def test_backward_twice():
    leaves, norm, (first, second, _) = two_products(True)
    loss = first.sum() + second.square().sum()
    loss.backward(retain_graph=True)
    once = {name: tensor.grad.clone() for name, tensor in leaves.items()}
    loss.backward()
    assert norm.num_calls == 4  # the second time by each product for itself
    assert all(torch.equal(tensor.grad, 2 * once[name]) for name, tensor in leaves.items())


def test_a_recomputed_input_of_something_recomputed():
    def run(wrap: Any) -> tuple[list[torch.Tensor], weakref.ref]:
        x, weight, matrix = leaf(6, 4, 8), leaf(8, seed=1), leaf(12, 8, seed=2)
        y = wrap(rms_norm, x, weight)
        up = wrap(lambda y: linear(y, matrix), y)
        inner = weakref.ref(y.untyped_storage())
        linear(up, leaf(3, 12, seed=4)).square().sum().backward()
        return [x.grad, weight.grad, matrix.grad], inner

    for ours, plain in zip(run(recomputed)[0], run(lambda function, *inputs: function(*inputs))[0], strict=True):
        assert torch.equal(ours, plain)


def test_attention_keeps_neither_its_inputs_nor_copies_of_them():
    from dsv3_megatron.metrics.live_bytes import count_live_bytes

    def run(is_recomputed: bool) -> tuple[torch.Tensor, int]:
        x = leaf(40, 2, 3 * 2 * 8)

        def split(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            query, key, value = (x * 1.5).view(40, 2, 2, 24).split([8, 8, 8], dim=-1)
            return query.contiguous(), key.contiguous(), value

        with count_live_bytes() as live:
            out = causal_attention(*(recomputed(split, x) if is_recomputed else split(x)), softmax_scale=0.3)
        out.square().sum().backward()
        return x.grad, live.at_end

    (plain, kept), (ours, left) = run(False), run(True)
    assert torch.equal(plain, ours)
    assert kept - left == 3 * 40 * 2 * 2 * 8 * 4  # queries, keys and values in fp32


@pytest.mark.parametrize("backend", ["looped", "grouped_mm"])
def test_experts_without_the_activations_output(backend):
    def run(is_recomputed: bool) -> list[torch.Tensor]:
        dtype = torch.bfloat16
        x, gates = leaf(12, 16).detach().to(dtype).requires_grad_(), leaf(12, seed=1)
        fc1, fc2 = (leaf(2, rows, columns, seed=2).detach().to(dtype).requires_grad_()
                    for rows, columns in ((16, 16), (16, 8)))
        swiglu_experts(x, [5, 7], fc1, fc2, gates, backend=backend, is_activation_recomputed=is_recomputed
                       ).float().square().sum().backward()
        return [x.grad, gates.grad, fc1.grad, fc2.grad]

    assert all(torch.equal(ours, plain) for ours, plain in zip(run(True), run(False), strict=True))


def test_an_input_changed_in_place_is_an_error():
    x = torch.randn(4, 8)
    y = recomputed(lambda x: x * 2, x)
    loss = linear(y, leaf(3, 8)).sum()
    x.add_(1)
    with pytest.raises(RuntimeError, match=r"an input \(4, 8\) of what is recomputed in backward was changed in place"):
        loss.backward()


def test_nothing_is_noted_without_gradients_or_left_behind():
    with torch.no_grad():
        y = recomputed(torch.exp, leaf(4))
        assert not recompute.is_recomputed(y)
    y = recomputed(torch.exp, leaf(4))
    assert recompute.is_recomputed(y) and recompute.is_recomputed(y[1:].detach())
    assert not recompute.is_recomputed(y.clone())
    del y
    gc.collect()
    assert not recompute._live


def test_what_is_remembered_stands_for_an_output_of_rounded_inputs():
    """As SwiGLU's output is made again from its input in FP8: backward multiplies what the rounded input makes."""
    x, weight = leaf(4, 8), leaf(3, 8, seed=1)
    rounded_x = x.detach().half().float()
    y = remembered(x * 2, lambda rows: rows * 2, rounded_x)
    freed = weakref.ref(y.untyped_storage())
    result = linear(y.view(2, 2, 8), weight)
    del y
    gc.collect()
    assert freed() is None
    result.sum().backward()
    torch.testing.assert_close(weight.grad, (rounded_x * 2).sum(0).expand(3, 8))
    assert not torch.equal(rounded_x, x.detach())


def test_what_is_at_hand():
    x = leaf(4, 8)
    kept, other = held(x * 2), x * 2
    assert is_at_hand(kept) and is_at_hand(kept.detach()[1:].view(-1)) and not is_at_hand(other)
    assert is_at_hand(recomputed(torch.exp, x)) and not is_at_hand(x)
    with torch.no_grad():
        assert not is_at_hand(held(x * 2))
    with saving():
        assert (kept * kept).grad_fn._saved_self.untyped_storage().data_ptr() == kept.untyped_storage().data_ptr()
    del kept, other
    gc.collect()
    assert not recompute._held and not recompute._live


def test_an_input_may_be_from_inference_mode():
    """As rotary tables are that were made when a model was looked at before its first step."""
    with torch.inference_mode():
        table = torch.ones(4, 8)
    x = leaf(4, 8)
    y = recomputed(torch.add, table, table)
    with saving():
        product = x * y
    product.sum().backward()
    assert torch.equal(x.grad, torch.full((4, 8), 2.0))
