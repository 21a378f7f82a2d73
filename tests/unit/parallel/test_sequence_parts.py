"""Every token is some rank's once, the parts make the whole, and what is seen is what causal attention sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.parallel.sequence_parts import WHOLE, SequenceParts

SIZES = (1, 2, 3, 4)


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_has_an_early_and_a_late_chunk_and_all_make_the_whole(size: int) -> None:
    length = 24
    whole = torch.arange(length)
    parts = [SequenceParts(size, rank).take(whole, 0) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == whole.tolist()
    assert torch.equal(SequenceParts(size, 0).join(parts, 0), whole)
    # The k-th position sees k + 1 positions: each rank's sees equally many in all.
    assert len({int((part + 1).sum()) for part in parts}) == 1
    for rank, part in enumerate(parts):
        assert part.tolist() == sorted(part.tolist()) == SequenceParts(size, rank).positions(length).tolist()


def test_the_parts_of_three_ranks_by_hand() -> None:
    taken = [SequenceParts(3, rank).take(torch.arange(12).expand(2, -1), 1)[1].tolist() for rank in range(3)]
    assert taken == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert WHOLE.take(taken_whole := torch.arange(5), 0) is taken_whole


@pytest.mark.parametrize("size", SIZES)
def test_each_position_has_a_place_in_one_part(size: int) -> None:
    for rank in range(size):
        own = SequenceParts(size, rank).positions(24).tolist()
        expected = [own.index(position) if position in own else -1 for position in range(24)]
        assert SequenceParts(size, rank).places(24).tolist() == expected


@settings(max_examples=60, deadline=None)
@given(size=st.sampled_from(SIZES), chunk=st.integers(1, 4), data=st.data())
def test_every_visible_pair_is_in_one_region(size: int, chunk: int, data: st.DataObject) -> None:
    """Against the definition, pair by pair: a query sees a key of its document that does not come later."""
    length, batch = 2 * size * chunk, data.draw(st.integers(1, 3))
    bounds = None
    if data.draw(st.booleans()):
        cuts = [data.draw(st.sets(st.integers(1, length - 1), max_size=5)) if length > 1 else set()
                for _ in range(batch)]
        bounds = tuple((0, *sorted(row), length) for row in cuts)
    for rank in range(size):
        parts = SequenceParts(size, rank)
        own = parts.positions(length).tolist()
        for other in range(size):
            theirs = SequenceParts(size, other).positions(length).tolist()
            seen: list[tuple[int, int, int]] = []
            for region in parts.visible(other, length, batch, bounds):
                for sequence in range(*region.sequences):
                    for query_index, query in enumerate(own[slice(*region.queries)]):
                        for key_index, key in enumerate(theirs[slice(*region.keys)]):
                            if not region.is_causal or key_index <= query_index:
                                seen.append((sequence, query, key))
            expected = {(sequence, query, key) for sequence in range(batch) for query in own for key in theirs
                        if key <= query and (bounds is None or not any(
                            key < bound <= query for bound in bounds[sequence]))}
            assert len(seen) == len(set(seen)) and set(seen) == expected
