"""The comparison keeps the model; the recommendation follows the numbers, whoever wins."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dsv3_megatron.schedule.compare import Outcome, candidates, compare, recommend
from dsv3_megatron.schedule.plan import SCHEDULES
from dsv3_megatron.schedule.simulate import Costs


def outcomes(ranks: int, microbatches: int, costs: tuple, stages: int | None = None, most: int = 4,
             p2p: Fraction | int = 0) -> dict[str, Outcome]:
    f, b, w, fb = costs
    found = compare(Costs.uniform(1, forward=f, backward=b, weight=w, overlapped=fb, p2p=p2p),
                    num_stages=stages or ranks, num_ranks=ranks, num_microbatches=microbatches, max_virtual_stages=most)
    return {str(outcome.candidate): outcome for outcome in found}


def test_every_schedule_does_the_same_work() -> None:
    found = outcomes(8, 32, (1, 2, 1, 3))
    assert {outcome.step_time - outcome.bubble for outcome in found.values()} == {32 * 3}
    assert set(SCHEDULES) == {outcome.candidate.schedule for outcome in found.values()}
    half = {name: outcome.bubble for name, outcome in found.items()}
    assert half == {"1f1b": 21, "interleaved V=2": Fraction(21, 2), "interleaved V=4": Fraction(21, 4), "zb1p": 7,
                    "zbv": Fraction(7, 2), "dualpipe": 6, "dualpipev": 7}


def test_memory_is_in_shares_of_one_model() -> None:
    found = outcomes(8, 32, (1, 2, 1, 3))
    assert (found["dualpipe"].parameters, found["dualpipe"].activations) == (2, 9)
    assert (found["dualpipev"].parameters, found["dualpipev"].activations) == (1, Fraction(17, 2))
    assert (found["zbv"].parameters, found["zbv"].activations) == (1, 8)
    assert found["interleaved V=2"].activations == Fraction(23, 2)


def test_whose_chunk_the_costs_are_of() -> None:
    """A chunk of DualPipeV is half a chunk of 1F1B: costs twice as high for the same step times."""
    assert [o.step_time * 2 for o in outcomes(4, 8, (1, 2, 1, 3)).values()] == [
        o.step_time for o in outcomes(4, 8, (1, 2, 1, 3), stages=8).values()]


def test_more_virtual_stages_win_where_they_do() -> None:
    """Nothing hidden, weight parts cheap: eight chunks per rank leave (P-1)(F+B)/8."""
    found = outcomes(4, 16, (1, 2, Fraction(1, 4), 3), most=8)
    choice = recommend(list(found.values()))
    assert str(choice.fastest.candidate) == "interleaved V=8"
    assert choice.fastest.bubble == Fraction(9, 8) < min(
        outcome.bubble for name, outcome in found.items() if not name.startswith("interleaved"))
    assert "It needs a model of 32 layers or more." in choice.reason
    assert choice.same_parameters is None and choice.same_memory is not None
    assert choice.same_memory.activations <= found["1f1b"].activations < choice.fastest.activations
    assert f"no more parameters and activations than 1f1b: {choice.same_memory.candidate}, " in choice.reason


def test_interleaved_pairs_compete_where_pairs_save_time() -> None:
    assert not [c for c in candidates(4, is_pair_faster=False) if c.is_overlapped]
    found = outcomes(8, 32, (1, 2, 1, Fraction(12, 5)))
    assert found["interleaved V=4 with pairs"].step_time == found["dualpipe"].step_time
    assert recommend(list(found.values())).fastest.parameters == 1  # of two equally fast ones the smaller


def test_dualpipe_wins_where_it_does() -> None:
    """Slow transfers, which many small chunks pay more often."""
    found = outcomes(8, 16, (1, 2, 1, Fraction(11, 5)), p2p=Fraction(1, 5))
    choice = recommend(list(found.values()))
    assert choice.fastest is found["dualpipe"]
    assert all(choice.fastest.step_time < o.step_time for n, o in found.items() if n != "dualpipe")
    assert "dualpipe has the shortest step" in choice.reason and "parameters: 2, 1f1b 1" in choice.reason
    assert choice.same_parameters is not None and choice.same_parameters.parameters == 1
    assert f"With no more parameters than 1f1b: {choice.same_parameters.candidate}, " in choice.reason


def test_what_cannot_be_had_says_why() -> None:
    found = outcomes(3, 4, (1, 2, 1, 3))
    assert found["dualpipe"].problem is not None and "must be even" in found["dualpipe"].problem
    assert found["interleaved V=2"].problem is not None and "must be a multiple of" in found["interleaved V=2"].problem
    assert recommend(list(found.values())).fastest.problem is None
    with pytest.raises(ValueError, match=r"no schedule can be had with these sizes: .*must be even"):
        recommend([found["dualpipe"]])


def test_one_rank_needs_no_pipeline() -> None:
    choice = recommend(list(outcomes(1, 4, (1, 2, 1, 3)).values()))
    assert choice.fastest.candidate.schedule == "1f1b" and choice.same_parameters is choice.same_memory is None
