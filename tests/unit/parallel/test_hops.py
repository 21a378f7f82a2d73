"""Two transfers as one: the second starts by itself, in order, and what goes wrong is said to who waits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from dsv3_megatron.parallel.exchange import Splits
from dsv3_megatron.parallel.hops import post_hops

GROUPS: Any = ("across", "within")
HOPS = [Splits((2,), (2,), group) for group in GROUPS]


class Held:
    """Transfers that end when they are let go, of which the first of each journey is."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, float]] = []
        self.arrived = threading.Event()
        self.relayed = threading.Event()

    def __call__(self, rows: torch.Tensor, splits: Splits) -> Any:
        self.posted.append((str(splits.group), rows[0].item()))
        if splits.group == "within":
            self.relayed.set()
        return _Transfer(rows, self.arrived if splits.group == "across" else None)


class _Transfer:
    def __init__(self, rows: torch.Tensor, arrived: threading.Event | None) -> None:
        self.rows, self.arrived = rows, arrived

    def wait(self) -> torch.Tensor:
        if self.arrived is not None:
            assert self.arrived.wait(20)
        return self.rows


def test_the_second_starts_while_nobody_waits():
    post = Held()
    journeys = [post_hops(torch.full((2,), float(number)), HOPS, lambda came: came + 10, post) for number in (1, 2)]
    assert not post.relayed.is_set()
    post.arrived.set()
    assert post.relayed.wait(20), "though nobody waits"
    assert [journey.wait().tolist() for journey in journeys] == [[11, 11], [12, 12]]
    assert post.posted == [("across", 1), ("within", 11), ("across", 2), ("within", 12)], "in the order of journeys"


def test_one_hop_is_posted_at_once():
    post = Held()
    post_hops(torch.ones(2), HOPS[:1], lambda came: came, post)
    assert post.posted == [("across", 1)]


def test_an_error_is_who_waits_for_it():
    def fail(came: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("a rank is gone")

    post = Held()
    post.arrived.set()
    lost, next_one = post_hops(torch.ones(2), HOPS, fail, post), post_hops(torch.ones(2), HOPS, torch.neg, post)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        lost.wait()
    assert next_one.wait().tolist() == [-1, -1]


def test_no_graph_is_made_on_the_way():
    post = Held()
    post.arrived.set()
    weight = torch.ones(2, requires_grad=True)
    assert not post_hops(torch.ones(2), HOPS, lambda came: came * weight, post).wait().requires_grad
