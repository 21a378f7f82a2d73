"""Which rows go where, against loops over tokens and experts."""

from __future__ import annotations

import pytest
import torch

from dsv3_megatron.ops.routes import chosen_experts, parts_of_rows, parts_of_tokens, rows_of_parts, slots_of_experts

EXPERTS, TOP_K = 12, 3


def routing(num_tokens: int) -> tuple[torch.Tensor, list[list[int]]]:
    """A routing map, and each token's experts in ascending order."""
    generator = torch.Generator().manual_seed(num_tokens)
    chosen = [sorted(torch.randperm(EXPERTS, generator=generator)[:TOP_K].tolist()) for _ in range(num_tokens)]
    routing_map = torch.zeros(num_tokens, EXPERTS, dtype=torch.bool)
    for token, experts in enumerate(chosen):
        routing_map[token, experts] = True
    return routing_map, chosen


@pytest.mark.parametrize("num_tokens", [0, 1, 40])
def test_experts_of_tokens(num_tokens):
    routing_map, chosen = routing(num_tokens)
    assert chosen_experts(routing_map, TOP_K).tolist() == chosen


@pytest.mark.parametrize("num_parts", [1, 2, 4, 6])
@pytest.mark.parametrize("num_tokens", [0, 40])
def test_rows_go_to_each_part_once(num_tokens, num_parts):
    routing_map, chosen = routing(num_tokens)
    size = EXPERTS // num_parts
    expected = [token for part in range(num_parts) for token, experts in enumerate(chosen)
                if any(expert // size == part for expert in experts)]
    is_in = parts_of_tokens(routing_map, num_parts)
    assert rows_of_parts(is_in, len(expected)).tolist() == expected
    ids = chosen_experts(routing_map, TOP_K).to(torch.int16)
    assert torch.equal(parts_of_rows(ids, 0, size, num_parts), is_in)


def test_parts_of_a_node_alone():
    """Experts of other nodes, below and above, are in none of its parts."""
    ids = torch.tensor([[0, 4, 11], [5, 6, 7], [0, 1, 11]], dtype=torch.int16)
    assert parts_of_rows(ids, 4, 2, 2).tolist() == [[True, False], [True, True], [False, False]]


@pytest.mark.parametrize("first", [0, 4, 9])
def test_slots_are_sorted_by_expert_and_row(first):
    routing_map, chosen = routing(40)
    ids = chosen_experts(routing_map, TOP_K).to(torch.int16)
    expected = [row * TOP_K + experts.index(expert) for expert in range(first, first + 3)
                for row, experts in enumerate(chosen) if expert in experts]
    assert slots_of_experts(ids, first, 3, len(expected)).tolist() == expected
