"""Two ranks' messages on a group: what is the same passes, and each kind of difference is named with its lines."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.rehearsal.collective_calls import RankCall, calls_as_json, calls_of_json
from dsv3_megatron.rehearsal.message_comparison import compare_calls, name_group

SUM = RankCall("all_reduce", (0, 1), 0, "float32", ((8,),), None, 32, "a.py:1", "step")
SENT = RankCall("send", (0, 1), 1, "bfloat16", ((16,),), 1, 32, "a.py:2", "step")
RECEIVED = dataclasses.replace(SENT, operation="receive", peer=0, line="a.py:3")
ROWS = RankCall("all_to_all", (0, 1), 0, "bfloat16", ((1, 2), (1, 5)), None, 6, "a.py:4", "step")
ROWS_OF_OTHER = dataclasses.replace(ROWS, sizes=((5, 7), (2, 7)))


def test_the_same_messages_are_no_mismatch() -> None:
    assert compare_calls({0: [SUM, SENT, ROWS], 1: [RECEIVED, SUM, ROWS_OF_OTHER]}) == []


@pytest.mark.parametrize(("first", "second", "why"), [
    ([SUM, SUM], [SUM], "one of them posts fewer"),
    ([SUM], [dataclasses.replace(SUM, dtype="int64")], "other dtypes"),
    ([SUM], [dataclasses.replace(SUM, sizes=((9,),))], "other sizes"),
    ([SUM], [dataclasses.replace(SUM, operation="broadcast")], "other operations"),
    ([dataclasses.replace(SUM, peer=0)], [dataclasses.replace(SUM, peer=1)], "other roots"),
    ([ROWS], [dataclasses.replace(ROWS, sizes=((5, 7), (3, 7)))], "rank 0 sends 2 and rank 1 receives 3 elements"),
    ([SENT], [dataclasses.replace(RECEIVED, sizes=((8,),))], "other sizes"),
    ([SENT], [dataclasses.replace(RECEIVED, dtype="float32")], "other dtypes"),
    ([SENT], [], "one of them posts fewer"),
])
def test_a_difference_is_named_with_both_ranks_and_lines(first: list[RankCall], second: list[RankCall], why: str
                                                         ) -> None:
    (found,) = compare_calls({0: first, 1: second})
    assert found.why.startswith(why) and found.ranks == (0, 1)
    text = found.describe()
    assert "rank 0: " in text and "rank 1: " in text and "at a.py:" in text


def test_only_ranks_of_one_group_are_compared() -> None:
    elsewhere = dataclasses.replace(SUM, ranks=(2, 3))
    assert compare_calls({0: [SUM], 1: [SUM], 2: [elsewhere]}) == []


def test_a_rank_that_was_rehearsed_and_posts_nothing_is_compared() -> None:
    (found,) = compare_calls({0: [SUM], 1: []})
    assert found.second is None and "nothing more" in found.describe()


def test_calls_survive_json_and_groups_are_told_apart() -> None:
    assert calls_of_json(calls_as_json([SUM, SENT, ROWS])) == [SUM, SENT, ROWS]
    assert name_group(SUM.group) == "the group of 2 ranks (0, 1)"
    assert name_group(SENT.group) == "the group of 2 ranks (0, 1, number 2 of these)"
    assert name_group((tuple(range(9)), 0)) == "the group of 9 ranks (0, 1, ... 8)"
