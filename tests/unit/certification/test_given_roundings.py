"""Roundings that a sum's order decides: taken where they may be, and nowhere else."""

from __future__ import annotations

import pickle

import pytest
import torch

from dsv3_megatron.certification.given_roundings import MARGIN, RoundingWatch, merge_roundings
from dsv3_megatron.ops.fp8.packed_rows import pack_rows
from dsv3_megatron.ops.fp8.quantize import Quantized, quantize, quantize_columns

# E4M3 has 416 and 448, and 1.125 and 1.25: these are the middles, each in a tile whose largest value is 448.
MIDDLES = (432.0, 1.1875)


def tile(*values: float, largest: float = 448.0) -> torch.Tensor:
    x = torch.zeros(1, 128)
    x[0, 0] = largest
    x[0, 1:1 + len(values)] = torch.tensor(values)
    return x


def rounded(x: torch.Tensor, given: RoundingWatch | None = None, **rest: object) -> tuple[Quantized, RoundingWatch]:
    watch = RoundingWatch(given.notes if given else None)
    with watch.watched():
        watch.begin("step 1")
        result = quantize(x, **rest)  # type: ignore[arg-type]
    return result, watch


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("middle", MIDDLES)
def test_a_value_near_a_middle_goes_where_the_other_run_went(middle: float, sign: float) -> None:
    above, below = (tile(sign * (middle + change)) for change in (2e-4, -2e-4))
    assert not torch.equal(quantize(above).dequantize(), quantize(below).dequantize())
    first, watch = rounded(above)
    assert torch.equal(first.dequantize(), quantize(above).dequantize()), "noting changes nothing"
    second, other = rounded(below, watch)
    assert torch.equal(second.dequantize(), first.dequantize()) and other.num_taken == 1
    # And the other way round, and what was taken is what is noted.
    assert torch.equal(rounded(above, other)[0].dequantize(), first.dequantize())
    _, low = rounded(below)
    assert torch.equal(rounded(above, low)[0].dequantize(), quantize(below).dequantize())


def test_nothing_is_taken_for_a_value_off_a_middle_or_of_another_group() -> None:
    _, watch = rounded(tile(432.0 + 2e-4))
    off = 448 * MARGIN * 2
    for other in (tile(432.0 - off), tile(432.0 * 1.001, largest=448.0 * 1.001 + 1), tile(-432.0 + 2e-4), tile(1.25)):
        found, taking = rounded(other, watch)
        assert torch.equal(found.dequantize(), quantize(other).dequantize()) and taking.num_taken == 0


def test_groups_with_the_same_power_of_2_are_told_apart() -> None:
    """Their scales are the same, and so are the middles; the nearer of two distances is the wrong one's."""
    given = torch.cat([tile(432.0 + 2e-4, largest=440.0), tile(432.0 - 4e-4, largest=430.0)])
    _, watch = rounded(given, power_of_2=True)
    found, _ = rounded(tile(432.0 - 3e-4, largest=440.0), watch, power_of_2=True)
    assert found.dequantize()[0, 1] == 448.0


def test_values_of_one_group_near_the_same_middle_are_told_apart() -> None:
    _, watch = rounded(tile(432.0 + 9e-4, 432.0 - 9e-4))
    found, _ = rounded(tile(432.0 - 9e-4, 432.0 + 9e-4), watch)
    assert found.dequantize()[0, 1:3].tolist() == [416.0, 448.0]


def test_e5m6_and_the_ends_of_both_formats() -> None:
    x = tile(65024 - 256.0 + 0.01, 1.0 + 2**-7, largest=65024.0)
    first, watch = rounded(x, format="e5m6")
    moved = tile(65024 - 256.0 - 0.01, 1.0 + 2**-7 + 1e-6, largest=65024.0)
    second, other = rounded(moved, watch, format="e5m6")
    assert torch.equal(first.dequantize(), second.dequantize()) and other.num_taken == 2
    odd = torch.tensor([[0.0, -0.0, 448.0, float("inf")], [0.0, 0.0, 0.0, 0.0], [1e-30, -1e-30, 448.0, 3.0]])
    for form in ("e4m3", "e5m6"):
        found, _ = rounded(odd, format=form)
        assert torch.equal(found.values.view(torch.uint8), quantize(odd, format=form).values.view(torch.uint8))


def test_rows_that_are_split_over_ranks_keep_their_roundings_in_any_order() -> None:
    """Rows of four ranks, perturbed as sums in another order are, quantized in another order: the same values."""
    torch.manual_seed(0)
    x = torch.randn(512, 256)
    moved = x + x.abs().amax(-1, keepdim=True) * (torch.rand_like(x) - 0.5) * 2e-6
    apart = (quantize(x).values.view(torch.uint8) != quantize(moved).values.view(torch.uint8)).sum()
    assert apart > 3, "else nothing is shown"
    watches, whole = [], []
    for rows in x.chunk(4):
        result, watch = rounded(rows)
        watches.append(pickle.loads(pickle.dumps(watch.notes)))
        whole.append(result.values.view(torch.uint8))
    given = RoundingWatch(merge_roundings(watches))
    given.notes = given.given
    order = torch.randperm(512)
    found, taking = rounded(moved[order], given)
    assert torch.equal(found.values.view(torch.uint8), torch.cat(whole)[order])
    assert taking.num_taken == apart


def test_rows_that_travel_and_columns_for_weight_gradients_are_watched_too() -> None:
    for function in (pack_rows, quantize_columns):
        watch = RoundingWatch()
        with watch.watched():
            watch.begin("step 1")
            function(tile(432.0 + 2e-4, 1.1875) if function is pack_rows else tile(432.0 + 2e-4, 1.1875).t())
        assert sum(map(len, watch.notes["step 1"].sides.values())) >= 1
