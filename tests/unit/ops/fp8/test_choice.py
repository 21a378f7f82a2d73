"""Which FP8 backend is chosen, what a missing one says, and Transformer Engine's recipe from its module surface."""

import dataclasses
from enum import Enum
from types import SimpleNamespace

import pytest
import torch

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.precision import BF16, Fp8Config, LinearPrecision, precision_map
from dsv3_megatron.config.presets import preset
from dsv3_megatron.ops.fp8 import choice as fp8_choice
from dsv3_megatron.ops.fp8.choice import local_backend, resolve_fp8_backend
from dsv3_megatron.ops.fp8.engine import block_scaling_recipe


@pytest.fixture
def hopper(monkeypatch):
    def install(capability):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA X")

    return install


def test_auto_on_a_cpu(caplog):
    with caplog.at_level("INFO"):
        assert resolve_fp8_backend("auto", transformer_impl="local") == "reference"
    assert "fp8_backend auto: reference (no CUDA device)" in caplog.text
    assert local_backend("reference").name == "reference"


def test_auto_on_gpus(hopper):
    hopper((9, 0))
    assert resolve_fp8_backend("auto", transformer_impl="local") == "triton"
    assert resolve_fp8_backend("auto", transformer_impl="local", accumulation="fp22") == "reference"
    assert resolve_fp8_backend("auto", transformer_impl="transformer_engine") == "transformer_engine"
    assert resolve_fp8_backend("triton", transformer_impl="local") == "triton"
    hopper((8, 0))
    assert resolve_fp8_backend("reference", transformer_impl="local") == "reference"
    with pytest.raises(ConfigError, match=r"fp8=blockwise on NVIDIA X needs what is not here: compute capability 9.x "
                                          r"\(Hopper; this is 8.0\); set fp8=none, or fp8_backend=reference"):
        resolve_fp8_backend("auto", transformer_impl="local")
    with pytest.raises(ConfigError, match=r"needs what is not here: compute capability 9.x \(Hopper; this is 8.0\)"):
        resolve_fp8_backend("triton", transformer_impl="local")


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="fp8_backend=triton needs what is not here: CUDA device; use "
                                          "fp8_backend=reference"):
        resolve_fp8_backend("triton", transformer_impl="local")
    with pytest.raises(ConfigError, match="fp8_backend=transformer_engine needs modules from Transformer Engine"):
        resolve_fp8_backend("transformer_engine", transformer_impl="local")
    with pytest.raises(ConfigError, match="this run is built from Transformer Engine's; set transformer_impl=local"):
        resolve_fp8_backend("reference", transformer_impl="transformer_engine")
    monkeypatch.setattr(fp8_choice.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="triton package and CUDA device"):
        resolve_fp8_backend("triton", transformer_impl="local")


# -- Transformer Engine: the names and defaults of its recipe module, version 2.20 ----------------------


@dataclasses.dataclass(frozen=True)
class QParams:
    power_2_scale: bool = False
    amax_epsilon: float = 0.0


class Format(Enum):
    E4M3 = 1
    HYBRID = 2


@dataclasses.dataclass
class Float8BlockScaling:
    fp8_format: Format = Format.E4M3
    x_block_scaling_dim: int = 1
    w_block_scaling_dim: int = 2
    grad_block_scaling_dim: int = 1
    fp8_quant_fwd_inp = QParams(power_2_scale=True)
    fp8_quant_fwd_weight = QParams(power_2_scale=True)
    fp8_quant_bwd_grad = QParams(power_2_scale=True)


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
