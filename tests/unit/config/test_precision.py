"""The precision map: the report's table, overrides by name, and what is said about wrong ones."""

import dataclasses

import pytest

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.config.precision import BF16, Fp8Config, LinearPrecision, linear_shapes, precision_map
from dsv3_megatron.config.presets import preset

V3 = preset("dsv3-671b").model


def test_the_reports_map() -> None:
    precisions = precision_map(Fp8Config("blockwise"), V3)
    default = LinearPrecision()
    assert precisions["decoder.layers.0.mlp.linear_fc1"] == default
    assert precisions["decoder.layers.60.self_attention.linear_kv_down_proj"] == default
    assert precisions["decoder.layers.3.self_attention.linear_proj"] == dataclasses.replace(
        default, cached_input="e5m6", input_scales="power_of_2")
    assert precisions["mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc1"] == dataclasses.replace(
        default, input_scales="power_of_2")
    assert precisions["mtp.layers.0.mtp_model_layer.mlp.experts.linear_fc2"] == default
    assert precisions["mtp.layers.0.eh_proj"] == BF16 and not BF16.is_fp8
    for never in ("output_layer", "embedding", "router", "norm"):
        assert not any(never in name for name in precisions)


def test_shapes_add_up_to_the_reports_parameters() -> None:
    """Every linear of the spec's table but router and eh_proj, the experts' names standing for 256 each."""
    total = 0
    for name, (rows, columns) in linear_shapes(V3).items():
        if name.startswith("decoder."):
            total += rows * columns * (256 if ".experts." in name else 1)
    attention, dense, routed, shared = 187_105_280 * 61, 1_189_085_184, 653_908_770_816, 2_554_331_136
    assert total == attention + dense + routed + shared


def test_flags_change_every_fp8_line() -> None:
    fp8 = Fp8Config("blockwise", fp8_power_of_2_scales=True, fp8_accumulation="fp22", fp8_grad_grouping="block")
    precisions = precision_map(fp8, V3)
    for name, precision in precisions.items():
        if name.endswith("eh_proj"):
            assert precision == BF16
        else:
            assert (precision.input_scales, precision.scales, precision.accumulation, precision.grad_grouping) == (
                "power_of_2", "power_of_2", "fp22", "block")


def test_the_second_weights_line_says_how_swiglus_input_is_kept() -> None:
    for flag in ("e4m3", "bf16"):
        precisions = precision_map(Fp8Config("blockwise", fp8_swiglu_input=flag), V3)
        kept = {name: precision.cached_input for name, precision in precisions.items()
                if name.endswith(".linear_fc2")}
        assert set(kept.values()) == {flag} and len(kept) == 3 + 2 * 58 + 2
        assert precisions["decoder.layers.0.mlp.linear_fc1"].cached_input == "e4m3"


def test_overrides_apply_in_order() -> None:
    precisions = precision_map(Fp8Config("blockwise", fp8_override=[
        "decoder.layers.*=bf16", "decoder.layers.1?.*=fp8", "*.linear_proj=cached_input:e4m3,input_scales:arbitrary",
        "mtp.layers.0.eh_proj=fp8"]), V3)
    assert not precisions["decoder.layers.0.mlp.linear_fc1"].is_fp8
    assert not precisions["decoder.layers.60.mlp.experts.linear_fc1"].is_fp8
    assert precisions["decoder.layers.12.mlp.experts.linear_fc2"].is_fp8
    assert precisions["decoder.layers.12.self_attention.linear_proj"] == LinearPrecision()
    assert precisions["mtp.layers.0.eh_proj"].fprop == "fp8"


@pytest.mark.parametrize(("changes", "message"), [
    ({"fp8_override": ["decoder.layers.99.*=bf16"]},
     "fp8_override=decoder.layers.99.*=bf16: no module's name matches decoder.layers.99.*; names are such as "
     "decoder.layers."),
    ({"fp8_override": ["output_layer=fp8"]}, "no module's name matches output_layer"),
    ({"fp8_override": ["*.linear_proj"]},
     "fp8_override=*.linear_proj must be PATTERN=bf16, PATTERN=fp8 or PATTERN=field:value,..."),
    ({"fp8_override": ["*=wgrad:fp4"]}, "fp8_override=*=wgrad:fp4: wgrad='fp4' must be one of fp8, bf16"),
    ({"fp8_override": ["*=format:e4m3"]}, "format is no field of a precision; use bf16, fp8, or of fprop, dgrad"),
    ({"fp8": "tensorwise"}, "fp8='tensorwise' must be one of none, blockwise"),
    ({"fp8_swiglu_input": "e5m6"}, "fp8_swiglu_input='e5m6' must be one of e4m3, bf16"),
    ({"fp8": "none", "fp8_swiglu_input": "bf16"}, "fp8_swiglu_input=bf16 says how FP8 computes, and fp8=none"),
    ({"fp8_backend": "cutlass"}, "fp8_backend='cutlass' must be one of auto, transformer_engine, triton, reference"),
    ({"fp8": "none", "fp8_accumulation": "fp22"},
     "fp8_accumulation=fp22 says how FP8 computes, and fp8=none; set fp8=blockwise or leave it out"),
    ({"fp8_backend": "triton", "fp8_accumulation": "fp22"},
     "fp8_accumulation=fp22 is a model that fp8_backend=reference alone has, not triton"),
    ({"fp8_backend": "transformer_engine", "transformer_impl": "local"},
     "fp8_backend=transformer_engine needs transformer_impl=transformer_engine or auto, not local"),
    ({"fp8_backend": "reference", "transformer_impl": "transformer_engine"},
     "fp8_backend=reference computes in local modules; set transformer_impl=local"),
    ({"fp8_backend": "triton", "moe_ffn_hidden_size": 100},
     "decoder.layers.1.mlp.experts.linear_fc1 is [200, 128] on a rank (tensor_model_parallel_size=1): "
     "fp8_backend=triton takes multiples of 16"),
])
def test_what_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        preset("tiny").override(**{"fp8": "blockwise", **changes}).validate(1)
    assert message in str(error.value)


def test_dispatch_follows_fp8() -> None:
    for fp8, flag, expected in (("none", "fp8", False), ("blockwise", "fp8", True), ("blockwise", "bf16", False)):
        assert Fp8Config(fp8, fp8_dispatch=flag).dispatches_fp8 is expected


def test_what_can() -> None:
    run = preset("tiny").override(fp8="blockwise", fp8_backend="reference", moe_ffn_hidden_size=100)
    run.validate(1)
    preset("dsv3-671b").override(fp8="blockwise", fp8_backend="triton", transformer_impl="local").validate(2048)


def test_a_module_left_in_bf16_need_not_fit_the_matrix_units() -> None:
    preset("tiny").override(fp8="blockwise", fp8_backend="triton", transformer_impl="local", moe_ffn_hidden_size=100,
                            fp8_override=["*.experts.*=bf16", "*.shared_experts.*=bf16"]).validate(1)
