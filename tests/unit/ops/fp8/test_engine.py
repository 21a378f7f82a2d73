"""The precision map as Transformer Engine's recipe."""

import dataclasses
from types import SimpleNamespace

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.precision import BF16, Fp8Config, LinearPrecision, precision_map
from dsv3_megatron.config.presets import preset
from dsv3_megatron.ops.fp8.engine import block_scaling_recipe
from tests.unit.ops.fp8.engine_names import Float8BlockScaling, Format, QParams

RECIPES = SimpleNamespace(Float8BlockScaling=Float8BlockScaling, QParams=QParams, Format=Format)


def recipe(precisions, version="2.20.2", recipes=RECIPES, capability=(9, 0), cuda=(12, 9)):
    return block_scaling_recipe(precisions, engine=SimpleNamespace(__version__=version), recipes=recipes,
                                capability=capability, cuda=cuda)


def test_the_reports_map_as_a_recipe(caplog):
    model = preset("dsv3-671b").model
    made = recipe(precision_map(Fp8Config("blockwise"), model).values())
    assert made.fp8_format == Format.E4M3
    for tensor in ("fp8_quant_fwd_inp", "fp8_quant_fwd_weight", "fp8_quant_bwd_grad"):
        assert getattr(made, tensor) == QParams(power_2_scale=False)
    assert "keeps the input of the projection after attention in E4M3, not in E5M6" in caplog.text
    assert Float8BlockScaling.fp8_quant_fwd_inp.power_2_scale, "the class itself stays"
    made = recipe(precision_map(Fp8Config("blockwise", fp8_power_of_2_scales=True), model).values())
    assert made.fp8_quant_bwd_grad.power_2_scale


@pytest.mark.parametrize(("changes", "message"), [
    ({"version": "2.2.0"}, "needs Transformer Engine 2.3 or newer for its Float8BlockScaling, this is 2.2.0"),
    ({"recipes": SimpleNamespace()}, "needs Transformer Engine 2.3 or newer"),
    ({"capability": (8, 9)}, r"needs compute capability 9.0 \(Hopper\) or higher and CUDA 12.9, this is 8.9 with CUDA "
                             "12.9"),
    ({"cuda": (12, 4)}, "this is 9.0 with CUDA 12.4"),
    ({"precisions": [LinearPrecision(wgrad="bf16")]}, "all three products of a module in FP8 or none, not fprop=fp8"),
    ({"precisions": [LinearPrecision(grad_grouping="block")]}, "fp8_grad_grouping=block cannot go with"),
])
def test_what_a_recipe_cannot_say(changes, message):
    with pytest.raises(ConfigError, match=message):
        recipe(**{"precisions": [LinearPrecision(), BF16], **changes})


def test_a_recipe_that_groups_otherwise_is_refused():
    @dataclasses.dataclass
    class Changed(Float8BlockScaling):
        grad_block_scaling_dim: int = 2

    with pytest.raises(ConfigError, match="Float8BlockScaling.grad_block_scaling_dim is 2, the report's recipe needs"):
        recipe([LinearPrecision()], recipes=SimpleNamespace(Float8BlockScaling=Changed, QParams=QParams, Format=Format))
