"""A printed figure is equal to what rounds to it and to nothing else; bounds and words are meant as they stand."""

from __future__ import annotations

import pytest

from dsv3_megatron.papers.claim import REPORT, Agreement, Claim, Relation, judge


def claimed(said: str, given: float | str, unit: float = 1.0, relation: Relation = Relation.IS) -> Claim:
    return Claim("a figure", REPORT, "1", said, lambda: given, unit, relation)


@pytest.mark.parametrize(("said", "unit", "inside", "outside"), [
    ("671B", 1e9, (670.5e9, 671_026_404_352, 671.5e9), (670.4e9, 671.6e9)),
    ("0.9B", 1e9, (0.85e9, 926_679_040), (0.96e9,)),
    ("70.272 KB", 1e3, (70_272, 70_272.5), (70_273,)),
    ("2.2e-4", 1.0, (2.2e-4, 2.24e-4), (2.26e-4, 2.2e-5)),
    ("7.3e-6", 1.0, (7.3e-6,), (7.4e-6, 7.3e-5)),
    ("$5.328M", 1e6, (5.3284e6,), (5.329e6,)),
    ("129,280", 1.0, (129_280,), (129_281,)),
    ("38.94%", 0.01, (0.38943,), (0.3895,))])
def test_a_number_is_equal_to_what_rounds_to_it(said, unit, inside, outside) -> None:
    assert [judge(claimed(said, given, unit)).verdict for given in inside] == [Agreement.EQUAL] * len(inside)
    assert [judge(claimed(said, given, unit)).verdict for given in outside] == [Agreement.APART] * len(outside)


def test_the_distance_is_of_the_printed_number() -> None:
    judged = judge(claimed("180K", 171e3, 1e3))
    assert judged.verdict is Agreement.APART and judged.distance == pytest.approx(-0.05) and judged.given == "171K"


@pytest.mark.parametrize(("relation", "given", "verdict"), [
    (Relation.AT_MOST, 3.63, Agreement.EQUAL), (Relation.AT_MOST, 4.0, Agreement.EQUAL),
    (Relation.AT_MOST, 5.0, Agreement.APART), (Relation.AT_LEAST, 5.0, Agreement.EQUAL),
    (Relation.AT_LEAST, 3.0, Agreement.APART)])
def test_a_bound_holds_or_does_not(relation, given, verdict) -> None:
    assert judge(claimed("4 nodes", given, relation=relation)).verdict is verdict


def test_words_are_equal_or_not() -> None:
    assert judge(claimed("e5m6", "e5m6")).verdict is Agreement.EQUAL
    other = judge(claimed("e5m6", "e4m3"))
    assert (other.verdict, other.given, other.distance) == (Agreement.APART, "e4m3", None)


@pytest.mark.parametrize(("said", "given", "unit", "shown"), [
    ("671B", 671_026_404_352, 1e9, "671.03B"), ("61", 61, 1, "61"), ("3.7 days", 3.603, 1, "3.603 days"),
    ("4K", 4096, 1024, "4K"), ("2.2e-4", 2.2e-4, 1, "0.00022"), ("$5.328M", 5.2609e6, 1e6, "$5.2609M")])
def test_what_is_given_is_shown_in_the_printed_unit(said, given, unit, shown) -> None:
    assert judge(claimed(said, given, unit)).given == shown


def test_what_cannot_be_computed_is_told_apart_from_what_was_not() -> None:
    assert judge(Claim("a figure", REPORT, "1", "5K", why="It takes a cluster.")).verdict is Agreement.NOT_HERE
    slow = Claim("a figure", REPORT, "1", "5K", lambda: 5e3, 1e3, is_slow=True)
    assert judge(slow, with_slow=False).verdict is Agreement.NOT_RUN
    assert judge(slow).verdict is Agreement.EQUAL


def test_a_number_where_words_were_printed_is_an_error() -> None:
    with pytest.raises(ValueError, match="said='diverges' has no number, though `gives` returns one; return words"):
        judge(claimed("diverges", 1.0))
