"""Triton's FP8 kernels under its interpreter, against the reference in ops/.

Values are rounded by the kernels' own arithmetic there (the interpreter's cast rounds otherwise), so they are equal
bit for bit, but for the sign of zero and where exp differs between libraries. Its cast to bf16 cuts off instead of
rounding, so results in bf16 may differ by a step, and what is quantized from bf16 results is computed in fp32 here.
"""

import math

import pytest
import torch

from dsv3_megatron.ops.fp8.packed_rows import pack_rows, unpack_rows
from dsv3_megatron.ops.fp8.quantize import Quantized, quantize, quantize_columns
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from dsv3_megatron.ops.fp8.scale_groups import SQUARE, TILE
from dsv3_megatron.ops.swiglu import swiglu_forward
from dsv3_megatron.parallel.narrow_rows import Narrow, exchange_rows, permuted_records
from tests.slow_fp8 import E5M6_VALUES

SHAPES = [(1, 16), (33, 208), (130, 144)]


def random(*shape, seed=0, dtype=torch.bfloat16):
    stream = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=stream) * torch.exp(torch.randn(shape, generator=stream))).to(dtype)


@pytest.fixture
def backend():
    from dsv3_megatron.ops.fp8.triton_backend import TritonBackend

    return TritonBackend()


def same(got: Quantized, expected: Quantized) -> None:
    assert got.shape == expected.shape and got.group == expected.group
    assert torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values.float(), expected.values.float())


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_tiles_blocks_and_columns(backend, shape, power_of_2):
    x = random(*shape)
    x[0, :5] = 0
    same(backend.quantize(x, power_of_2=power_of_2), quantize(x, power_of_2=power_of_2))
    got, expected = (q(x, SQUARE, power_of_2=power_of_2) for q in (backend.quantize, quantize))
    same(got, expected)
    assert torch.equal(got.turned.float(), expected.values.float().t())
    columns = quantize_columns(x, power_of_2=power_of_2)
    same(backend.quantize_columns(x, power_of_2=power_of_2), columns)
    cached = quantize(x, power_of_2=True)
    same(backend.quantize_columns(cached, power_of_2=power_of_2), quantize_columns(cached, power_of_2=power_of_2))


def test_stacks_of_weights(backend):
    weight = random(3, 144, 80, dtype=torch.float32)
    got, expected = backend.quantize(weight, SQUARE), quantize(weight, SQUARE)
    same(got, expected)
    assert torch.equal(got[2].transpose().values.float(), expected.values[2].float().t())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(backend, bad):
    x = torch.ones(130, 144)
    x[129, 130] = bad
    for got, expected in (
        (backend.quantize(x), quantize(x)), (backend.quantize(x, SQUARE), quantize(x, SQUARE)),
        (backend.quantize_columns(x), quantize_columns(x)),
        (backend.quantize_columns(quantize(x)), quantize_columns(quantize(x))),
    ):
        assert torch.equal(got.dequantize().isnan(), expected.dequantize().isnan())
        assert got.dequantize().isnan().any() and not got.dequantize().isnan().all()


def test_zeros_and_extremes(backend):
    x = torch.zeros(3, 256)
    x[1, 5], x[2, 130] = 1e-44, torch.finfo(torch.float32).max
    for power_of_2 in (False, True):
        same(backend.quantize(x, power_of_2=power_of_2), quantize(x, power_of_2=power_of_2))


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize(("rows", "width", "gated"), [(35, 128, True), (3, 256, False)])
def test_swiglu_with_quantization(rows, width, gated, power_of_2):
    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize

    hidden = random(rows, 2 * width, dtype=torch.float32)
    gates = torch.rand(rows) if gated else None
    values, scales, kept, kept_scales = swiglu_quantize(hidden, gates, power_of_2=power_of_2, keep=True)
    active = swiglu_forward(hidden, gates)
    expected = quantize(active, power_of_2=power_of_2)
    # exp differs in the last bits, which can move a value to the next one of E4M3.
    torch.testing.assert_close(scales, expected.scales, rtol=1e-6, atol=0)
    got, wanted = values.float(), expected.values.float()
    assert ((got - wanted).abs() <= torch.maximum(wanted.abs() / 8, torch.tensor(2.0**-9))).all()
    assert (got != wanted).float().mean() < 1e-3
    same(Quantized(kept, kept_scales, TILE, "e4m3", tuple(hidden.shape)), quantize(hidden))


def test_swiglu_refuses_halves_that_share_a_tile():
    from dsv3_megatron.kernels.fp8_quantize import swiglu_quantize

    with pytest.raises(ValueError, match="keep=True needs an expert width that is a multiple of 128, not 96"):
        swiglu_quantize(random(2, 192), None, power_of_2=False, keep=True)
    values, _ = swiglu_quantize(random(2, 192), None, power_of_2=False, keep=False)
    assert values.shape == (2, 96)


@pytest.mark.parametrize("width", [144, 32, 30])
def test_records(backend, width):
    """A token quantized once and written to each of its rows; and back. 30: the reference, whose scales are odd."""
    tokens, top_k = 37, 3
    x = random(tokens, width)
    x[5, 7] = math.nan
    rows = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(2))
    token_of_row = torch.arange(tokens).repeat(top_k)[rows]
    for order in (None, token_of_row):
        got, expected = backend.pack_rows(x, order), pack_rows(x, order)
        assert got.shape == expected.shape
        for dtype in (torch.bfloat16, torch.float32):
            wide = unpack_rows(expected, width, dtype)
            for again in (backend.unpack_rows(expected, width, dtype), unpack_rows(got, width, dtype)):
                assert again.dtype == dtype and torch.equal(again.nan_to_num(7), wide.nan_to_num(7))
    assert backend.pack_rows(x[:0], token_of_row[:0]).shape == (0, expected.shape[1])
    assert backend.unpack_rows(expected[:0], width, torch.float32).shape == (0, width)


def test_a_dispatch_on_this_backend(backend):
    """Records in the order of experts, and gradients back, through the functions that the dispatcher calls."""
    token_of_row = torch.tensor([3, 0, 1, 4, 2, 4, 1, 0, 2, 3])
    results = []
    for each in (backend, REFERENCE):
        x = random(5, 144).requires_grad_()
        rows, records = permuted_records(x, token_of_row, each)
        sent = exchange_rows(rows, None, Narrow("forward", each, records))
        back = exchange_rows(sent * 2, None, Narrow("backward", each))
        back.backward(random(10, 144, seed=1))
        results.append((sent.detach(), back.detach(), x.grad))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("power_of_2", [False, True])
@pytest.mark.parametrize("shape", [(1, 16), (33, 208), (130, 144), (3, 15)])
def test_e5m6(backend, shape, power_of_2):
    """Packed bytes and scales, and their requantization for Wgrad; rows of 15 values are the reference's."""
    x = random(*shape)
    x[0, :5], x[-1, 0] = 0, -1e-30
    got, expected = (q(x, format="e5m6", power_of_2=power_of_2) for q in (backend.quantize, quantize))
    assert got.shape == expected.shape and torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values, expected.values)
    same(backend.quantize_columns(expected, power_of_2=power_of_2), quantize_columns(expected, power_of_2=power_of_2))


def test_every_number_of_e5m6(backend):
    """Values that are exact, halfway between two, and beside halfway; the first of each row sets the scale to 1."""
    exact = torch.tensor([v for v in E5M6_VALUES if v >= 0])
    halfway = (exact[1:] + exact[:-1]) / 2
    beside = torch.cat((torch.nextafter(halfway, halfway * 2), torch.nextafter(halfway, halfway * 0)))
    x = torch.cat((exact, halfway, beside))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.cat((torch.full((len(x), 1), 65024.0), x), dim=1)
    got, expected = backend.quantize(x, format="e5m6"), quantize(x, format="e5m6")
    assert expected.scales.eq(1).all() and torch.equal(got.scales, expected.scales)
    assert torch.equal(got.values, expected.values)


def test_e5m6_of_what_is_not_finite(backend):
    x = torch.ones(2, 256)
    x[0, 3], x[1, 200] = math.inf, math.nan
    got = backend.quantize(x, format="e5m6")
    for kept in (got.dequantize(), backend.quantize_columns(got).dequantize().t()):
        assert kept[0, :128].isnan().all() and kept[1, 128:].isnan().all()
    assert (got.dequantize()[0, 128:] == 1).all() and (got.dequantize()[1, :128] == 1).all()


@pytest.mark.parametrize("width", [128, 96])
def test_swiglu_of_this_backend_is_the_references(backend, width):
    """In one pass where tiles of the input keep within its halves, else in two."""
    hidden, gates = random(33, 2 * width, dtype=torch.float32), torch.rand(33)
    (active, kept), (expected, expected_kept) = (
        each.quantize_swiglu(hidden, gates, power_of_2=False) for each in (backend, REFERENCE))
    same(kept, expected_kept)
    assert active.shape == expected.shape == (33, width)
    share = ((active.dequantize() - expected.dequantize()) / expected.dequantize()).nan_to_num(0).abs()
    # exp differs in the last bits: by as little in the scales, and by a step in few values.
    assert (share <= 1 / 8).all() and (share > 1e-6).float().mean() < 1e-3


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 16), (40, 70, 144), (33, 130, 272), (130, 16, 128)])
def test_gemm(backend, rows, columns, depth):
    a, weight = random(rows, depth), random(columns, depth, seed=1)
    a_tiles, b_blocks = backend.quantize(a), backend.quantize(weight, SQUARE)
    expected = a_tiles.dequantize().double() @ b_blocks.dequantize().double().T
    got = backend.gemm(a_tiles, b_blocks, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    narrow = backend.gemm(a_tiles, b_blocks, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), got, rtol=2**-7, atol=0)
    tiles = backend.quantize(weight)
    total = torch.ones(rows, columns)
    assert backend.gemm(a_tiles, tiles, dtype=torch.float32, add_to=total) is total
    expected = 1 + a_tiles.dequantize().double() @ tiles.dequantize().double().T
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_wgrad_over_a_number_of_tokens_that_is_no_multiple_of_16(backend):
    grad, x = random(70, 48), random(70, 80, seed=1)
    grad_columns, x_columns = backend.quantize_columns(grad), backend.quantize_columns(quantize(x))
    expected = grad_columns.dequantize().double() @ x_columns.dequantize().double().T
    got = backend.gemm(grad_columns, x_columns, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("counts", [[40, 0, 33, 1], [0, 0, 74, 0], [0, 0, 0, 0]])
def test_grouped_gemm(backend, counts):
    a, weight = random(sum(counts), 144), random(4, 70, 144, seed=1)
    a_tiles, b_blocks = backend.quantize(a), backend.quantize(weight, SQUARE)
    got = backend.grouped_gemm(a_tiles, b_blocks, counts, dtype=torch.float32)
    start = 0
    for expert, count in enumerate(counts):
        rows = slice(start, start + count)
        expected = a_tiles.rows(rows).dequantize().double() @ b_blocks[expert].dequantize().double().T
        torch.testing.assert_close(got[rows].double(), expected, rtol=1e-5, atol=1e-4)
        start += count


def test_a_layer_and_experts_on_this_backend(backend):
    """Forward and backward through the same autograd functions as the reference's."""
    from dsv3_megatron.config.precision import LinearPrecision
    from dsv3_megatron.ops.fp8.experts import fp8_swiglu_experts
    from dsv3_megatron.ops.fp8.linear import fp8_linear

    precision, counts = LinearPrecision(input_scales="power_of_2"), [20, 0, 17]
    x, weight = random(37, 80, dtype=torch.float32), random(48, 80, seed=1, dtype=torch.float32)
    fc1, fc2 = (random(3, *shape, seed=2, dtype=torch.float32) * 0.1 for shape in ((64, 80), (80, 32)))
    gates = torch.rand(37, generator=torch.Generator().manual_seed(4))
    results = []
    for each in (backend, REFERENCE):
        leaves = [t.clone().requires_grad_() for t in (x, weight, fc1, fc2)]
        y = fp8_linear(leaves[0], leaves[1], precision, backend=each)
        z = fp8_swiglu_experts(leaves[0], counts, leaves[2], leaves[3], gates, (precision, precision), backend=each)
        (y.float().square().sum() + z.float().square().sum()).backward()
        results.append((y, z, *(leaf.grad for leaf in leaves)))
    for got, expected in zip(*results, strict=True):
        # Sums in another order move some values to the next one of E4M3.
        assert (got - expected).norm() < 2e-3 * expected.norm()


def test_bad_input(backend):
    from dsv3_megatron.kernels.fp8_gemm import gemm

    a, b = backend.quantize(random(4, 144)), backend.quantize(random(16, 144), SQUARE)
    with pytest.raises(ValueError, match="accumulation='fp22' is a model that fp8_backend=reference alone has"):
        backend.gemm(a, b, dtype=torch.float32, accumulation="fp22")
    odd = torch.zeros(4, 150, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match="TMA takes contiguous rows that start at multiples of 16 bytes"):
        gemm(odd, torch.ones(4, 2), odd, torch.ones(4, 2), dtype=torch.float32)
    with pytest.raises(ValueError, match="b of shape .16, 144. with scales .1, 1. does not fit"):
        gemm(a.values, a.scales, b.values, torch.ones(1, 1), dtype=torch.float32)


def test_tuning_table(tmp_path, monkeypatch):
    from dsv3_megatron.kernels import fp8_tuning

    monkeypatch.setenv("DSV3_FP8_TUNING", str(tmp_path / "tuning.json"))
    key = fp8_tuning.shape_key(4096, 7168, 2048, 1)
    assert key == fp8_tuning.shape_key(2049, 7168, 2048, 1) != fp8_tuning.shape_key(4097, 7168, 2048, 1)
    tuned = fp8_tuning.Tuned("deep_gemm", fp8_tuning.GemmConfig(64, 128, 4, 4))
    fp8_tuning.write_tuning({key: tuned}, "a GPU")
    fp8_tuning.write_tuning({"other": tuned}, "another GPU")
    assert fp8_tuning.read_tuning("a GPU") == {key: tuned} and fp8_tuning.read_tuning("none") == {}
    (tmp_path / "tuning.json").write_text('{"a GPU": {"x": {"implementation": "cublas", "config": {}}}}')
    with pytest.raises(ValueError, match="is not a table of measured FP8 configurations: implementations must be of"):
        fp8_tuning.read_tuning("a GPU")
    for config in fp8_tuning.CANDIDATES:
        assert config.stages * (config.block_m + config.block_n) * 128 <= 220_000
