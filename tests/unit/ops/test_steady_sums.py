"""Products and functions have the same bits whatever is computed beside them; the values are torch's in float64.

That some have other bits without these functions is shown too, or the tests could pass on a machine where nothing is to
be done.
"""

import pytest
import torch

from dsv3_megatron.ops.experts import swiglu_experts
from dsv3_megatron.ops.steady_sums import (
    KEY_BLOCK,
    LEAST_ROWS,
    in_whole_vectors,
    least_queries,
    steady_context,
    steady_scores,
)

WIDTHS = [(18, 6), (24, 16), (48, 32), (192, 128)]


def randn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def probabilities(num_queries, num_keys, num_seen):
    """Of 3 heads; 0 behind the keys that are seen."""
    scores = 2 * randn(3, num_queries, num_keys)
    scores[:, :, num_seen:] = float("-inf")
    return scores.softmax(-1)


@pytest.mark.parametrize(("width", "value_width"), WIDTHS)
def test_a_query_has_the_bits_that_it_has_among_many_queries_and_keys(width, value_width):
    query, keys, values = randn(3, 128, width), randn(3, 700, width), randn(3, 700, value_width)
    scores = steady_scores(query, keys)
    torch.testing.assert_close(scores.double(), query.double() @ keys.double().mT, rtol=1e-5, atol=1e-4)
    for num_keys in (1, 3, 9, 17, 40, 255, 256, 257, 300, 384, 385, 513, 690):
        weights = probabilities(128, 700, num_keys)
        context = steady_context(weights, values)
        torch.testing.assert_close(context.double(), weights.double() @ values.double(), rtol=1e-5, atol=1e-5)
        for num_queries in (1, 2, 5, 13, 16, 30):
            few = slice(5, 5 + num_queries)
            assert torch.equal(steady_scores(query[:, few], keys[:, :num_keys]), scores[:, few, :num_keys])
            assert torch.equal(steady_context(weights[:, few, :num_keys], values[:, :num_keys]), context[:, few])


def test_a_sum_over_more_keys_has_other_bits_without_blocks():
    """MKL's parts of 500 and of 700 keys end at other places."""
    weights, values = probabilities(128, 700, 500), randn(3, 700, 32)
    whole = torch.bmm(weights, values)
    alone = torch.bmm(weights[:, :, :500].contiguous(), values[:, :500])
    if torch.equal(alone, whole):
        pytest.skip("this machine's library adds up keys in an order that does not depend on their number")
    assert torch.equal(steady_context(weights, values), steady_context(weights[:, :, :500], values[:, :500]))
    assert KEY_BLOCK < 384


@pytest.mark.parametrize("function", [torch.sigmoid, torch.log, torch.exp])
@pytest.mark.parametrize("shape", [(1,), (45,), (64,), (7, 12), (33, 8), (3, 1)])
def test_a_function_has_the_bits_of_a_long_tensor(function, shape):
    values = randn(4000, *shape[1:]).abs() + 0.01
    whole = function(values)
    for first in range(0, len(values) - shape[0], shape[0]):
        part = slice(first, first + shape[0])
        assert torch.equal(in_whole_vectors(function, values[part]), whole[part])


def test_the_last_elements_have_other_bits_without_whole_vectors():
    values = randn(4096)
    tails = torch.cat([torch.sigmoid(part) for part in values.split(16)])
    assert not torch.equal(tails, torch.sigmoid(values)), "in_whole_vectors has nothing to do here"


@pytest.mark.parametrize("is_learning", [False, True])
def test_an_experts_row_has_the_bits_that_it_has_among_many(is_learning):
    """Of five rows for one of three experts, alone and among 60 for each, of widths as the quickstart's."""
    fc1, fc2, x, gates = 0.1 * randn(3, 192, 128), 0.1 * randn(3, 128, 96), randn(180, 128), randn(180).abs()
    with torch.set_grad_enabled(is_learning):
        whole = swiglu_experts(x, (60, 60, 60), fc1, fc2, gates, least_rows=LEAST_ROWS)
        rows = torch.cat([torch.arange(3), torch.arange(60, 61), torch.arange(120, 125)])
        few = swiglu_experts(x[rows], (3, 1, 5), fc1, fc2, gates[rows], least_rows=LEAST_ROWS)
        plain = swiglu_experts(x, (60, 60, 60), fc1, fc2, gates)
    assert torch.equal(few, whole[rows]) and torch.equal(whole, plain)


def test_experts_gradients_do_not_see_the_rows_beside():
    fc1, fc2, x, gates = randn(3, 32, 16), randn(3, 16, 16), randn(9, 16), randn(9).abs()
    found = []
    for least_rows in (1, LEAST_ROWS):
        operands = [tensor.clone().requires_grad_() for tensor in (x, fc1, fc2, gates)]
        out = swiglu_experts(operands[0], (3, 1, 5), *operands[1:], least_rows=least_rows)
        out.square().sum().backward()
        found.append([out, *(operand.grad for operand in operands)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_queries_are_as_few_as_will_do():
    assert {least_queries(width, torch.float32) for pair in WIDTHS for width in pair} <= {4, 8, LEAST_ROWS}
