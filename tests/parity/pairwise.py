"""A small set of configurations in which every value of each factor meets every value of each other factor.

All combinations of eight factors are tens of thousands; most mistakes need one value, or two together.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Pair = frozenset[tuple[str, Any]]


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    """Every pair of values of two different factors."""
    return {frozenset({(a, x), (b, y)}) for a, b in itertools.combinations(factors, 2)
            for x, y in itertools.product(factors[a], factors[b])}


def pairs_of(row: Mapping[str, Any]) -> set[Pair]:
    """The pairs that one configuration has."""
    return {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}


def covering_rows(factors: Mapping[str, Sequence[Any]], candidates: int = 60) -> list[dict[str, Any]]:
    """Configurations that have all pairs, the same at every call.

    Greedy: of some random configurations with a pair that is still missing, the one with most missing pairs is next.
    """
    generator, missing, rows = random.Random(0), all_pairs(factors), []
    order = {pair: index for index, pair in enumerate(sorted(missing, key=lambda pair: sorted(map(str, pair))))}
    while missing:
        wanted = dict(min(missing, key=order.__getitem__))
        drawn = [{name: wanted.get(name, generator.choice(values)) for name, values in factors.items()}
                 for _ in range(candidates)]
        rows.append(max(drawn, key=lambda row: len(pairs_of(row) & missing)))
        missing -= pairs_of(rows[-1])
    return rows
