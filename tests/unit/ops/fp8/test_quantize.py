"""Quantization in groups against a search over every value of the format, and its properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3_megatron.ops.fp8.quantize import (
    E5M6_MAX,
    Quantized,
    decode_e4m3,
    pack_e5m6,
    quantize,
    quantize_columns,
    round_to_e5m6,
    unpack_e5m6,
)
from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE
from tests.slow_fp8 import E4M3_VALUES, E5M6_VALUES, nearest, quantize_slowly


def values_of(quantized: Quantized) -> torch.Tensor:
    if quantized.format == "e4m3":
        return quantized.values.double()
    return unpack_e5m6(quantized.values, quantized.shape).double()


def random(shape, seed=0, spread=2.0):
    stream = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=stream) * torch.exp(torch.randn(shape, generator=stream) * spread)


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize(("format", "group", "shape"), [
    ("e4m3", TILE, (3, 130)), ("e4m3", SQUARE, (130, 5)), ("e5m6", TILE, (2, 131)), ("e4m3", TILE, (1, 1)),
])
def test_against_a_search(format, group, shape, power_of_2):
    x = random(shape)
    x[0, :5] = 0
    quantized = quantize(x, group, format=format, power_of_2=power_of_2)
    values, scales = quantize_slowly(x, group, format, power_of_2)
    assert torch.equal(quantized.scales, scales)
    assert torch.equal(values_of(quantized), values)
    expanded = scales.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)[: shape[0], : shape[1]]
    assert torch.equal(quantized.dequantize(), values.float() * expanded)


def test_formats_hold_the_values_they_should():
    assert max(E4M3_VALUES) == 448 and len(E4M3_VALUES) == 253  # +0 and -0 are equal
    assert max(E5M6_VALUES) == E5M6_MAX and len(E5M6_VALUES) == 2 * 31 * 64 - 1
    bits = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(torch.nan_to_num(decode_e4m3(bits), 999), torch.nan_to_num(bits.float(), 999))


def test_every_e5m6_value_survives_rounding_and_packing():
    exact = torch.tensor(E5M6_VALUES)
    assert torch.equal(round_to_e5m6(exact).float(), exact)
    assert torch.equal(unpack_e5m6(pack_e5m6(exact.half()), exact.shape).float(), exact)
    assert pack_e5m6(exact.half()).numel() == 3 * math.ceil(len(exact) / 2)


def test_e5m6_rounds_to_nearest_even_between_any_two_neighbours():
    exact = torch.tensor(E5M6_VALUES, dtype=torch.float64)
    middle = ((exact[:-1] + exact[1:]) / 2).float()
    below, above = middle.nextafter(torch.tensor(-math.inf)), middle.nextafter(torch.tensor(math.inf))
    assert torch.equal(round_to_e5m6(below).double(), exact[:-1])
    assert torch.equal(round_to_e5m6(above).double(), exact[1:])
    for index in range(0, len(middle), 97):
        assert round_to_e5m6(middle[index: index + 1]).item() == nearest(middle[index].item(), "e5m6")
    assert round_to_e5m6(torch.tensor([-0.0])).view(torch.int16).item() == -32768, "the sign of zero is kept"
    assert round_to_e5m6(torch.tensor([70000.0, -math.inf, 65055.0])).tolist() == [math.inf, -math.inf, E5M6_MAX]


@pytest.mark.parametrize("format", ["e4m3", "e5m6"])
@pytest.mark.parametrize("group", [TILE, SQUARE])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so_and_spoils_its_group_alone(bad, group, format):
    x = torch.ones(130, 300)
    x[129, 140] = bad
    quantized = quantize(x, group, format=format)
    got = quantized.dequantize()
    spoilt = torch.zeros_like(x, dtype=torch.bool)
    spoilt[129 if group == TILE else 128:, 128:256] = True
    if group == TILE:
        spoilt[:129] = False
    assert torch.equal(got.isnan(), spoilt)
    assert torch.equal(got[~spoilt], x[~spoilt])
    assert quantize_columns(quantized).dequantize().isnan().any(), "requantization keeps it too"


def test_zeros_and_extremes():
    x = torch.zeros(3, 384)
    x[0, 0], x[0, 1] = -0.0, 0.0
    x[1, 128] = 1e-44
    x[2, 256] = torch.finfo(torch.float32).max
    for power_of_2 in (False, True):
        quantized = quantize(x, power_of_2=power_of_2)
        assert quantized.scales[0].eq(1).all() and quantized.scales[1, 1] == 2.0**-126
        # Rounded up past the largest fp32 number it is infinite: seen, not saturated.
        assert torch.isfinite(quantized.dequantize()).all() or power_of_2
        assert quantized.values.view(torch.uint8)[0, 0] == 0x80
    assert quantize(x).dequantize()[2, 256] == x[2, 256]
    assert torch.isfinite(quantize(x / 2, power_of_2=True).dequantize()).all()


shapes = st.tuples(st.integers(1, 300), st.integers(1, 300))


@settings(max_examples=20)
@given(shape=shapes, seed=st.integers(0, 99), spread=st.sampled_from([0.0, 2.0, 20.0]), group=st.sampled_from(
    [TILE, SQUARE]), format=st.sampled_from(["e4m3", "e5m6"]), power_of_2=st.booleans(), zero=st.booleans())
def test_error_is_at_most_half_a_step(shape, seed, spread, group, format, power_of_2, zero):
    x = random(shape, seed, spread).clamp(-1e30, 1e30)
    if zero:
        x[: max(1, shape[0] // 2)] = 0
    quantized = quantize(x, group, format=format, power_of_2=power_of_2)
    scale = quantized.scales.repeat_interleave(group[0], 0).repeat_interleave(group[1], 1)[: shape[0], : shape[1]]
    bits, smallest = (3, -9) if format == "e4m3" else (6, -20)
    # Half a last bit, or half the subnormals' step; the division's and the product's rounding besides.
    bound = torch.maximum(x.abs() * 2.0 ** -(bits + 1), scale * 2.0 ** (smallest - 1)) * (1 + 2**-20)
    assert ((quantized.dequantize() - x).abs() <= bound).all()
    if power_of_2:
        assert torch.frexp(quantized.scales)[0].eq(0.5).all()


@settings(max_examples=20)
@given(shape=shapes, seed=st.integers(0, 99), spread=st.sampled_from([0.0, 0.5, 8.0]))
def test_power_of_2_requantization_is_exact_above_the_subnormals(shape, seed, spread):
    """Section 3.3.3, and its limit: what falls below 2^-6 of the new scale moves by at most 2^-10 of it."""
    cached = quantize(random(shape, seed, spread), power_of_2=True)
    exact = cached.dequantize()
    columns = quantize_columns(cached, power_of_2=True)
    got = columns.dequantize().t()
    scale = columns.scales.repeat_interleave(128, 1)[:, : shape[0]].t()
    normal = exact.abs() >= scale * 2.0**-6
    assert torch.equal(got[normal], exact[normal])
    assert ((got - exact).abs() <= scale * 2.0**-10).all()


def test_arbitrary_scales_do_add_error_in_requantization():
    """The negative control: without powers of two the same path rounds again."""
    x = random((256, 256), spread=0.5)
    for power_of_2, moved in ((True, 0.002), (False, 0.3)):
        cached = quantize(x, power_of_2=power_of_2)
        share = (quantize_columns(cached, power_of_2=power_of_2).dequantize().t() != cached.dequantize()).float().mean()
        assert (share < moved) if power_of_2 else (share > moved)


@settings(max_examples=15)
@given(shape=shapes, seed=st.integers(0, 99))
def test_quantizing_twice_is_quantizing_once(shape, seed):
    """With powers of two: so the FP8 payload of a dispatch may be handed on in bf16 without loss."""
    once = quantize(random(shape, seed), power_of_2=True).dequantize()
    assert torch.equal(once.bfloat16().float(), once)
    assert torch.equal(quantize(once.bfloat16(), power_of_2=True).dequantize(), once)


def test_stacks_views_and_bytes():
    x = random((2, 130, 200))
    stacked = quantize(x, SQUARE)
    for index in range(2):
        alone = quantize(x[index], SQUARE)
        assert torch.equal(stacked[index].dequantize(), alone.dequantize())
        assert torch.equal(alone.transpose().dequantize(), alone.dequantize().t())
    tiles = quantize(x[0])
    assert torch.equal(tiles.rows(slice(3, 9)).dequantize(), tiles.dequantize()[3:9])
    assert quantize(torch.zeros(5, 7168)).num_bytes == 5 * 7392
    assert quantize(torch.zeros(5, 7168), format="e5m6").num_bytes == 5 * (7168 * 3 // 2 + 224)


def test_unknown_format():
    with pytest.raises(ValueError, match="format='e5m2' of quantize must be one of e4m3, e5m6"):
        quantize(torch.zeros(1, 1), format="e5m2")
