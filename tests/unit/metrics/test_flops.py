"""FLOPs per token against the published figures; rates and peaks."""

from __future__ import annotations

import dataclasses

import pytest

from dsv3_megatron.config.presets import preset
from dsv3_megatron.metrics.flops import RunSpeed, device_peak_flops, flops_per_token


def test_dsv3_671b_at_4096() -> None:
    flops = flops_per_token(preset("dsv3-671b").model, 4096)
    assert flops.main_linear == 6 * 36_625_603_584
    assert flops.main_attention == 3 * 2 * (192 + 128) * 128 * 2048 * 61 == 30_702_305_280
    assert flops.main == 250_455_926_784  # the 250 GFLOP/token of arXiv 2505.09343, table 2
    assert flops.main_noncausal == 281_158_232_064
    assert flops.mtp_linear == 6 * (688_100_352 + 926_679_040) == 9_688_676_352
    assert flops.mtp_attention == 503_316_480
    assert flops.training == flops.main + 10_191_992_832


def test_attention_grows_with_the_sequence_and_nothing_else_does() -> None:
    model = preset("dsv3-671b").model
    short, long = flops_per_token(model, 4096), flops_per_token(model, 32768)
    assert long.main_attention == 8 * short.main_attention
    assert long.main_linear == short.main_linear


def test_mtp_scales_with_its_depth_and_vanishes_without() -> None:
    model = preset("tiny").model
    assert flops_per_token(dataclasses.replace(model, mtp_num_layers=0), 64).mtp == 0
    once, thrice = (flops_per_token(dataclasses.replace(model, mtp_num_layers=depth), 64).mtp for depth in (1, 3))
    assert thrice == 3 * once


def test_causal_attention_counts_pairs() -> None:
    """A slow count over query-key pairs; the formula has S/2 keys per query where the mask leaves (S + 1)/2."""
    model, length = preset("tiny").model, 64
    pairs = length * length // 2
    per_pair = 2 * (model.qk_head_dim + model.v_head_dim) * model.num_attention_heads
    expected = 3 * per_pair * pairs * model.num_layers
    assert flops_per_token(model, length).main_attention * length == expected


def test_sequence_length_is_checked() -> None:
    with pytest.raises(ValueError, match="seq_length=0 must be at least 1"):
        flops_per_token(preset("tiny").model, 0)


def test_rates_of_the_published_run() -> None:
    """2048 H800s at 272.8e9 tokens a day (arXiv 2505.09343): 386 TFLOP/s each without MTP."""
    flops = dataclasses.replace(flops_per_token(preset("dsv3-671b").model, 4096), mtp_linear=0, mtp_attention=0)
    speed = RunSpeed(4096, flops, num_devices=2048, peak_flops_per_device=device_peak_flops("NVIDIA H800"))
    step_time_s = 15360 * 4096 / (272.8e9 / 86400)
    rates = speed.rates(15360, step_time_s)
    assert rates.tokens_per_second == pytest.approx(272.8e9 / 86400)
    assert rates.tflops_per_device == pytest.approx(386.13, abs=0.01)
    assert rates.mfu == pytest.approx(386.13 / 989, abs=1e-4)


def test_without_a_peak_there_is_no_mfu() -> None:
    speed = RunSpeed(256, flops_per_token(preset("tiny").model, 256))
    assert speed.rates(16, 0.5).mfu is None
    with pytest.raises(ValueError, match="seconds=0.0 must be above 0"):
        speed.rates(16, 0.0)


@pytest.mark.parametrize(("name", "bf16", "fp8"), [
    ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
    ("NVIDIA H100 PCIe", 756e12, 1513e12),
    ("NVIDIA H100 NVL", 835.5e12, 1671e12),
    ("NVIDIA H200", 989e12, 1979e12),
    ("NVIDIA GH200 480GB", 989e12, 1979e12),
    ("NVIDIA H800", 989e12, 1979e12),
    ("NVIDIA H20", 148e12, 296e12),
    ("NVIDIA A100-SXM4-80GB", 312e12, None),
    ("NVIDIA A800 80GB PCIe", 312e12, None),
    ("NVIDIA B200", 2250e12, 4500e12),
    ("NVIDIA GB200", 2500e12, 5000e12),
    ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None, None),
    ("AMD EPYC 7763 64-Core Processor", None, None),
])
def test_device_peaks(name: str, bf16: float | None, fp8: float | None) -> None:
    assert device_peak_flops(name, "bf16") == bf16
    assert device_peak_flops(name, "fp8") == fp8
    assert device_peak_flops(name, "fp32") is None
