"""Products and functions whose bits do not depend on what is computed beside them, where a run asks for that.

A token is generated with few others, and learnt from among many. Its log-probability has the same bits both times if
each of its numbers has. On a CPU five things stand against that, and each has its remedy here or where it is named:

    few rows are multiplied by another kernel, which sums in another order   at least so many: `LEAST_ROWS` of an expert
                                                                             (row_blocks.py), `least_queries` of a head
    a product over many keys is added up in parts whose number depends on     blocks of `KEY_BLOCK` keys, one behind the
    that of the keys                                                         other, counted from the first key
    products of few numbers are made by a plain loop                         at least `LEAST_ROWS` keys
    torch computes the last elements of a tensor by another function than    `in_whole_vectors`
    those that fill a vector
    a token's experts are added up in the order in which they were chosen    by their numbers, as training does
                                                                             (generation/cached_layers.py)

Shapes: B sequences, N heads, A = B N rows of heads, Q new tokens, C positions looked at, D query and key width, U value
width, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

# Rows of a product from which on their number changes no bits.
LEAST_ROWS = 16
# Keys whose products with probabilities are summed at once. MKL sums up to 384 at once, and more in parts of equal
# length.
KEY_BLOCK = 256
# Queries of a head that may be enough.
_QUERIES = (4, 8, LEAST_ROWS)
# A multiple of what torch computes with vectors at a time: two of 16 numbers of 4 bytes.
_WHOLE_VECTORS = 32


def steady_scores(q_AQD: torch.Tensor, k_ACD: torch.Tensor) -> torch.Tensor:
    """Products of queries and keys, contiguous [A, Q, C]: each has the bits that it has among more of both.

    Args:
        q_AQD: Scaled queries, fp32 or fp64.
        k_ACD: Keys, of the queries' dtype.
    """
    num_queries, num_keys = q_AQD.shape[1], k_ACD.shape[1]
    few_AQD = _at_least(q_AQD, least_queries(q_AQD.shape[-1], q_AQD.dtype))
    scores_AQC = torch.bmm(few_AQD, _at_least(k_ACD, LEAST_ROWS).transpose(1, 2))
    return scores_AQC[:, :num_queries, :num_keys].contiguous()


def steady_context(probabilities_AQC: torch.Tensor, v_ACU: torch.Tensor) -> torch.Tensor:
    """Sums of values, weighed by probabilities, [A, Q, U]: a query's has the bits that it has among others, and where
    further keys with a probability of 0 come behind.

    Args:
        probabilities_AQC: fp32 or fp64.
        v_ACU: Values, of the probabilities' dtype.
    """
    num_queries, num_keys = probabilities_AQC.shape[1:]
    few_AQC = _at_least(probabilities_AQC, least_queries(v_ACU.shape[-1], v_ACU.dtype))
    total_AQU: torch.Tensor | None = None
    for first in range(0, num_keys, KEY_BLOCK):
        left, right = few_AQC[:, :, first: first + KEY_BLOCK], v_ACU[:, first: first + KEY_BLOCK]
        missing = LEAST_ROWS - right.shape[1]
        if missing > 0:
            left, right = torch.nn.functional.pad(left, (0, missing)), _at_least(right, LEAST_ROWS)
        total_AQU = torch.bmm(left, right) if total_AQU is None else total_AQU.baddbmm_(left, right)
    assert total_AQU is not None, "there is a key"
    return total_AQU[:, :num_queries]


def in_whole_vectors(function: Callable[[torch.Tensor], torch.Tensor], values: torch.Tensor) -> torch.Tensor:
    """Apply a function of rows so that a row's bits do not depend on its place among the others.

    Args:
        function: Gives as many rows as it takes, each made of one, with as many elements.
        values: [T, ...], any number of rows.
    """
    if values.device.type != "cpu" or not values.numel() % _WHOLE_VECTORS:
        return function(values)
    missing = -len(values) % _WHOLE_VECTORS
    return function(torch.nn.functional.pad(values, (*(0, 0) * (values.dim() - 1), 0, missing)))[:len(values)]


@functools.cache
def least_queries(width: int, dtype: torch.dtype) -> int:
    """The fewest queries of a head whose products have the bits that they have among many, by trying it.

    A CPU's library multiplies few rows by other kernels, which sum in another order. MKL, one thread of a Xeon: up to 2
    rows of heads of 48, 4 of 96, 8 of 192.

    Args:
        width: Width of queries and keys, or of values.
        dtype: Dtype of the products.
    """
    draws = torch.Generator().manual_seed(0)
    query, keys, probabilities = (torch.randn(2, KEY_BLOCK, size, generator=draws, dtype=dtype)
                                  for size in (width, width, KEY_BLOCK))
    for count in _QUERIES[:-1]:
        if all(_has_bits_of_many(*operands, count) for num_keys in (LEAST_ROWS, 20, 57, KEY_BLOCK) for operands in (
                (query, keys[:, :num_keys].transpose(1, 2)), (probabilities[..., :num_keys], keys[:, :num_keys]))):
            return count
    return _QUERIES[-1]


def _has_bits_of_many(left: torch.Tensor, right: torch.Tensor, count: int) -> bool:
    return torch.equal(torch.bmm(left[:, :count], right), torch.bmm(left, right)[:, :count])


def _at_least(rows_ARX: torch.Tensor, count: int) -> torch.Tensor:
    """The rows of each head, and zeros behind them where they are fewer."""
    missing = count - rows_ARX.shape[1]
    return torch.nn.functional.pad(rows_ARX, (0, 0, 0, missing)) if missing > 0 else rows_ARX
