"""The gradient study: errors of Dgrad in tiles and blocks where they are known to differ, and its tables."""

import csv

import pytest
import torch

from dsv3_megatron.config.precision import LinearPrecision
from dsv3_megatron.ops.fp8.products import Products
from dsv3_megatron.ops.fp8.reference_backend import REFERENCE
from tools.experiments.fp8_gradients import Row, draw, layer_errors, product_errors, summary, write


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("counts", [None, [128, 0, 128]])
def test_blocks_lose_tokens_with_small_gradients(counts):
    """Gradients of tokens over eight decades, one token without any; the whole is the large ones' and shows nothing."""
    grad = random(256, 128) * torch.logspace(0, -8, 256)[torch.randperm(256)].unsqueeze(1)
    grad[7] = 0
    weight = random(*(() if counts is None else (3,)), 128, 128, seed=1)
    errors = dict(product_errors(Products(LinearPrecision(), REFERENCE), grad, weight, counts))
    (tile, tile_median, tile_decile), (block, _, block_decile) = errors["tile"], errors["block"]
    assert max(tile, tile_median, tile_decile, block) < 0.06 and block_decile > 0.5


def test_errors_of_layers():
    exact = {"module.decoder.layers.1.a": torch.tensor([3.0]), "module.decoder.layers.1.b": torch.tensor([4.0]),
             "module.mtp.layers.0.decoder": torch.ones(4), "module.output_layer.weight": torch.ones(1)}
    got = {name: tensor + (1.0 if "layers.1.a" in name else 0.0) for name, tensor in exact.items()}
    assert layer_errors(got, exact) == {"layer 1": pytest.approx(0.2), "mtp": 0.0}


def test_tables_and_picture(tmp_path):
    prefixes = ("decoder.layers.2.mlp.experts", "mtp.layers.0.mtp_model_layer.mlp.experts")
    rows = [Row(seed, "product", f"{prefix}.linear_fc1", grouping, error, error / 2, 2 * error)
            for seed in (1, 2) for prefix in prefixes
            for grouping, error in (("tile", 0.03), ("block", 0.05))]
    rows += [Row(1, "gradients", "layer 0", "tile", 0.06), Row(1, "gradients", "layer 0", "block", 0.07)]
    text = summary(rows)
    assert "| mlp.experts.linear_fc1 | 3.0% | 1.5% | 6.0% | 5.0% | 2.5% | 10.0% |" in text
    assert "| layer 0 | 6.0% | 7.0% |" in text
    write(rows, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert len(read) == 10 and read[0]["token_median"] == "0.015" and read[-1]["token_median"] == ""
    draw(rows, tmp_path / "out.png", "tiny")
    assert (tmp_path / "out.png").stat().st_size > 10_000
