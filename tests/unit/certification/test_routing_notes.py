"""Margins of choices, and what the comparison of two runs' routing says of notes that differ."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.certification.reference import select_experts
from dsv3_megatron.certification.routing_notes import (
    FP32_SUMS,
    ChoiceKind,
    Choices,
    Notes,
    in_steps,
    margin,
    merge_notes,
)
from tests.parity.test_router import architecture, is_a_best_choice, routing_problems
from tests.routing import compare_routing

ROUNDING = 1e-5
KEY = ("step 1", "experts of layer 2")


def kind_of(options: dict[str, Any]) -> ChoiceKind:
    return ChoiceKind(options["top_k"], options["num_groups"], options["group_top_k"],
                options.get("group_score_topk") or max(1, options["top_k"] // options["group_top_k"]))


class TestMargin:
    @settings(max_examples=200)
    @given(routing_problems(ties=True), st.data())
    def test_not_above_zero_for_the_best_choices_alone(self, problem, data):
        """Against every order among equals, in exact arithmetic; for choices at random as for best ones."""
        scores_TE, bias_E, options = problem
        for scores_E in scores_TE:
            biased = [Fraction(s) + Fraction(b) for s, b in zip(scores_E.tolist(), bias_E.tolist(), strict=True)]
            order = data.draw(st.permutations(range(len(biased))))
            for chosen in (order[:options["top_k"]],
                           select_experts([float(b) for b in biased], architecture(
                               len(biased), {**options, "group_score_topk": None}))):
                is_best = is_a_best_choice(list(chosen), biased, options)
                assert (margin([float(b) for b in biased], set(chosen), kind_of(options)) <= 0) == is_best

    @settings(max_examples=200)
    @given(routing_problems(ties=False), st.integers(0, 2**31), st.sampled_from([1e-1, 1e-3, 1e-6]))
    def test_of_a_choice_by_scores_nearby(self, problem, seed, distance):
        """At most twice the distance."""
        scores_TE, bias_E, options = problem
        generator = torch.Generator().manual_seed(seed)
        for scores_E in scores_TE:
            nearby_E = scores_E + distance * (2 * torch.rand(len(scores_E), generator=generator).double() - 1)
            chosen = select_experts((nearby_E + bias_E).tolist(), architecture(len(scores_E), options))
            assert margin((scores_E + bias_E).tolist(), set(chosen), kind_of(options)) <= 2 * distance + 1e-12

    @pytest.mark.parametrize(("chosen", "expected"), [({0, 1, 4, 5}, -1), ({0, 1, 4, 6}, 1), ({0, 1, 8, 9}, 5.5)])
    def test_by_hand(self, chosen, expected):
        """Groups of four with scores 17, 13 and 2, of two experts each; the last two choices are worse by one expert's
        score, and by a group's score (13 to 2) for each of its experts.
        """
        biased = [9.0, 8.0, 0.0, 0.0, 7.0, 6.0, 5.0, 0.0, 1.0, 1.0, 0.0, 0.0]
        assert margin(biased, chosen, ChoiceKind(4, num_groups=3, group_top_k=2, group_score_topk=2)) == expected


def notes(scores: list[list[float]], ids: list[list[int]], bias: list[float] | None = None) -> Notes:
    """Tokens of sample 5, two of four experts each."""
    choices = Choices(ChoiceKind(2), torch.tensor(bias or [0.0] * 4))
    for position, (row, chosen) in enumerate(zip(scores, ids, strict=True)):
        choices.scores[5, position] = torch.tensor(row)
        choices.ids[5, position] = torch.tensor(chosen)
    return {KEY: choices}


FIRST = notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.8, 0.7, 0.1]], [[0, 2], [1, 2]])


class TestComparison:
    def test_equal_runs_and_another_order_have_no_ties(self):
        assert compare_routing(FIRST, FIRST, rounding=ROUNDING) == 0
        assert compare_routing(FIRST, notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.8, 0.7, 0.1]], [[2, 0], [2, 1]]),
                               rounding=ROUNDING) == 0

    def test_a_tie_is_counted(self):
        """Rounding of 4e-6 turned the order of two affinities that were 3e-6 apart."""
        second = notes([[0.9, 0.500004, 0.500001, 0.1], [0.2, 0.8, 0.7, 0.1]], [[0, 1], [1, 2]])
        assert compare_routing(FIRST, second, rounding=ROUNDING) == 1

    @pytest.mark.parametrize(("second", "message"), [
        # The affinities are the first run's: rounding cannot have decided.
        (notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.8, 0.7, 0.1]], [[0, 1], [1, 2]]),
         r"\(5, 0\) went to experts \[0, 1\] instead of \[0, 2\] by a margin of 2.98e-06, and rounding explains"),
        (notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.8, 0.7, 0.1]], [[0, 2], [1, 0]]),
         r"\(5, 1\) went to experts \[0, 1\] instead of \[1, 2\] by a margin of 0.5"),
        (notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.80002, 0.7, 0.1]], [[0, 2], [1, 2]]),
         r"an affinity of sample and position \(5, 1\) differs by 2e-05, more than rounding's 1e-05"),
        (notes([[0.9, 0.5, 0.500003, 0.1]], [[0, 2]]), r"\[\(5, 1\)\] were not routed in the second run"),
        (notes([[0.9, 0.5, 0.500003, 0.1], [0.2, 0.8, 0.7, 0.1]], [[0, 2], [1, 2]], [1e-7, 0.0, 0.0, 0.0]),
         "the balancing bias differs"),
        ({}, "step 1, experts of layer 2: nothing noted in the second run"),
        ({KEY: Choices(ChoiceKind(3), torch.zeros(4))}, "instead of"),
    ], ids=["flip", "wrong", "drift", "lost token", "bias", "lost router", "kind"])
    def test_everything_else_is_a_fault(self, second, message):
        with pytest.raises(AssertionError, match=message):
            compare_routing(FIRST, second, rounding=ROUNDING)

    def test_rounding_grows_with_the_steps_since_the_runs_parted(self):
        first = {("validation 1 after step 7", "experts of layer 2"): FIRST[KEY]}
        second = copy.deepcopy(first)
        next(iter(second.values())).scores[5, 1] += 2.5 * ROUNDING
        assert compare_routing(first, second, rounding=ROUNDING, common_steps=4) == 0
        with pytest.raises(AssertionError, match="more than rounding's 2e-05"):
            compare_routing(first, second, rounding=ROUNDING, common_steps=5)
        assert in_steps(first, range(7, 8)) == first and not in_steps(first, range(1, 7))

    def test_nothing_to_compare_is_no_comparison(self):
        with pytest.raises(AssertionError, match="noted no choices"):
            compare_routing({}, FIRST, rounding=ROUNDING)

    def test_ranks_are_put_together_and_agree_on_the_bias(self):
        rank_1 = copy.deepcopy(FIRST)
        rank_1[KEY].scores = {(6, 0): torch.zeros(4)}
        rank_1[KEY].ids = {(6, 0): torch.tensor([0, 1])}
        assert set(merge_notes([FIRST, rank_1])[KEY].ids) == {(5, 0), (5, 1), (6, 0)}
        rank_1[KEY].bias_E = torch.ones(4)
        with pytest.raises(AssertionError, match="ranks have different biases"):
            merge_notes([FIRST, rank_1])

    def test_sums_in_fp32_are_far_below_what_tests_allow(self):
        assert FP32_SUMS < 1e-6
