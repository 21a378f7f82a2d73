"""The products' kernels against their references."""

import pytest
import torch

from dsv3_megatron.ops.fp8.quantize import quantize
from dsv3_megatron.ops.fp8.scale_groups import SQUARE
from tests.unit.kernels.random_rows import random


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 1, 16), (40, 70, 144), (33, 130, 272), (130, 16, 128)])
def test_gemm(backend, rows, columns, depth):
    a, weight = random(rows, depth), random(columns, depth, seed=1)
    a_tiles, b_blocks = backend.quantize(a), backend.quantize(weight, SQUARE)
    expected = a_tiles.dequantize().double() @ b_blocks.dequantize().double().T
    got = backend.gemm(a_tiles, b_blocks, dtype=torch.float32)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    narrow = backend.gemm(a_tiles, b_blocks, dtype=torch.bfloat16)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, got.bfloat16())
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


def test_tiles_of_experts_do_not_meet():
    from dsv3_megatron.kernels.fp8_gemm import _tile_table

    counts, block = (5, 0, 3, 9), 4
    table = _tile_table(counts, block, torch.device("cpu"))
    expected = [(0, 0, 5), (0, 4, 5), (2, 5, 8), (3, 8, 17), (3, 12, 17), (3, 16, 17)]
    assert table.dtype == torch.int32 and [tuple(row) for row in table.tolist()] == expected
    assert _tile_table(counts, block, torch.device("cpu")) is table, "made and sent once for both products of a pass"
    assert not len(_tile_table((0, 0), block, torch.device("cpu")))


@pytest.mark.parametrize("block_n", [64, 256])
@pytest.mark.parametrize("processors", [1, 3])
def test_any_tile_and_any_number_of_programs_give_the_same(backend, monkeypatch, block_n, processors):
    """Columns of a tile with one scale of B, and with two; more tiles than programs, and fewer."""
    from dsv3_megatron.kernels import launch
    from dsv3_megatron.kernels.fp8_gemm import gemm, grouped_gemm
    from dsv3_megatron.kernels.fp8_tuning import GemmConfig

    monkeypatch.setattr(launch, "num_processors", lambda: processors)
    config = GemmConfig(32, block_n, 2, 4, programs_per_processor=2, specializes_warps=True)
    a, weight = random(70, 272), random(3, 300, 272, seed=1)
    a_tiles, blocks = backend.quantize(a), backend.quantize(weight, SQUARE)
    got = gemm(a_tiles.values, a_tiles.scales, blocks.values[0], blocks.scales[0], dtype=torch.float32, config=config)
    expected = a_tiles.dequantize().double() @ blocks[0].dequantize().double().T
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
    got = grouped_gemm(a_tiles.values, a_tiles.scales, blocks.values, blocks.scales, [20, 0, 50], dtype=torch.float32,
                       config=config)
    assert torch.equal(got[:20], gemm(a_tiles.values[:20], a_tiles.scales[:20], blocks.values[0], blocks.scales[0],
                                      dtype=torch.float32, config=config))
