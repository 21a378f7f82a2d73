"""Transformer Engine's modules run in its context by name; the context itself is a stand-in here."""

import contextlib

import torch

from dsv3_megatron.config.precision import BF16, LinearPrecision
from dsv3_megatron.model import fp8_modules


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer_number = 4
        self.linear_proj = torch.nn.Linear(2, 2)
        self.linear_fc1 = torch.nn.Linear(2, 2)
        self.router = torch.nn.Linear(2, 2)


class Stage(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList([Layer()])


def test_each_module_is_run_in_its_own_context(monkeypatch):
    """Layer 0 of the stage is layer 3 of the model: the map's names are the model's."""
    entered = []

    @contextlib.contextmanager
    def autocast(recipe, *, enabled):
        entered.append((recipe, enabled))
        yield
        entered.append("left")

    monkeypatch.setattr(fp8_modules, "autocast", autocast)
    stage, x = Stage(), torch.ones(1, 2)
    layer = stage.decoder.layers[0]
    fp8_modules.run_in_engine_context(stage, {
        "decoder.layers.3.linear_proj": LinearPrecision(), "decoder.layers.3.linear_fc1": BF16,
        "decoder.layers.0.linear_fc1": LinearPrecision()}, "recipe")
    assert torch.equal(layer.linear_proj(x), torch.nn.functional.linear(x, layer.linear_proj.weight,
                                                                        layer.linear_proj.bias))
    layer.linear_fc1(x)
    layer.router(x)
    assert entered == [("recipe", True), "left", ("recipe", False), "left"]
