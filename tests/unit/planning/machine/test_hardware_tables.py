"""The machines that are known: every number has a source, and published products take the published time."""

from __future__ import annotations

import pytest

from dsv3_megatron.planning.machine.blackwell_tables import GB200_ATTENTION, GB300_ATTENTION
from dsv3_megatron.planning.machine.hardware_tables import HARDWARE, find_hardware
from dsv3_megatron.planning.machine.hopper_tables import (
    DEEPGEMM_2025,
    DEEPGEMM_2025_WGRAD,
    DEEPGEMM_FIRST,
    PROFILE_WGRAD,
)


@pytest.mark.parametrize("name", HARDWARE)
def test_every_number_has_a_source_and_is_possible(name: str) -> None:
    hardware = find_hardware(name)
    for figure_name, figure in {**hardware.figures, **hardware.movement}.items():
        assert len(figure.source) > 8 and figure.value > 0, figure_name
        if figure_name.endswith("_share"):
            assert figure.value <= 1
    assert all(figure.value < 1 for figure in hardware.movement.values())
    assert all(0 < point.share < 1 for point in hardware.attention)
    assert {"bf16_flops", "memory_bytes", "memory_bandwidth", "nvlink_bandwidth", "network_bandwidth"} <= set(
        hardware.figures)


@pytest.mark.parametrize(("groups", "rows", "columns", "inner", "tflops"), DEEPGEMM_FIRST)
def test_published_products_take_the_published_time(groups, rows, columns, inner, tflops) -> None:
    seconds = find_hardware("h800").product_seconds("fp8", "fprop", groups=groups, rows=rows, columns=columns,
                                                    inner=inner)
    assert 2 * groups * rows * columns * inner / seconds == pytest.approx(tflops * 1e12, rel=1e-9)


def test_published_weight_gradients_take_the_published_time_on_their_multiprocessors() -> None:
    for groups, rows, columns, inner, microseconds in PROFILE_WGRAD:
        seconds = find_hardware("h800").product_seconds(
            "fp8", "wgrad", groups=groups, rows=rows, columns=columns, inner=inner, sm_share=112 / 132)
        assert seconds == pytest.approx(microseconds * 1e-6, rel=1e-9)


@pytest.mark.parametrize("name", ["h800-today", "h100"])
def test_products_of_2025_take_the_published_time(name: str) -> None:
    hardware = find_hardware(name)
    for purpose, table in (("fprop", DEEPGEMM_2025), ("wgrad", DEEPGEMM_2025_WGRAD)):
        for groups, rows, columns, inner, tflops in table:
            seconds = hardware.product_seconds("fp8", purpose, groups=groups, rows=rows, columns=columns, inner=inner)
            published = 2 * groups * rows * columns * inner / (tflops * 1e12)
            assert seconds == pytest.approx(published, rel=1e-9)
    assert max(point[4] for point in DEEPGEMM_2025) > max(point[4] for point in DEEPGEMM_FIRST)


@pytest.mark.parametrize(("name", "tables"), [("gb200", GB200_ATTENTION), ("gb300", GB300_ATTENTION)])
def test_published_attention_takes_the_published_time(name, tables) -> None:
    for is_backward, table in zip((False, True), tables, strict=True):
        for length, tflops in table.items():
            seconds = find_hardware(name).attention_seconds(1e15, is_backward=is_backward, seq_length=length)
            assert 1e15 / seconds == pytest.approx(tflops * 1e12, rel=1e-9)


def test_each_machine_is_itself() -> None:
    """Multiprocessors, FP8's peak and scales, memory and domains are a device's own."""
    machines = {name: find_hardware(name) for name in ("h200", "b200", "gb200", "gb300")}
    of = {figure: [machine[figure] for machine in machines.values()]
          for figure in ("num_sms", "fp8_flops", "memory_bytes", "gpus_per_node", "flex_communication_sms")}
    assert of["num_sms"] == [132, 148, 152, 152]
    assert of["fp8_flops"] == [1979e12, 4500e12, 5000e12, 5000e12]
    assert of["memory_bytes"] == [141e9, 180e9, 186e9, 288e9]
    assert of["gpus_per_node"] == [8, 8, 72, 72]
    assert of["flex_communication_sms"] == [6, 24, 32, 32]
    assert "MXFP8" in machines["b200"].fp8_scales and "CUDA cores" in machines["h200"].fp8_scales
    assert not find_hardware("a100").has("flex_communication_sms")


def test_a_run_has_as_many_devices_in_each_domain() -> None:
    gb200 = find_hardware("gb200")
    devices = (1, 36, 72, 144, 256, 2048, 100)
    assert [gb200.ranks_per_node(number) for number in devices] == [1, 36, 72, 72, 64, 64, 50]
    assert [find_hardware("h800").ranks_per_node(devices) for devices in (4, 8, 12, 2048)] == [4, 8, 6, 8]


def test_a_library_of_its_own_has_figures_of_its_own() -> None:
    h100 = find_hardware("h100")
    assert h100.for_dispatcher("communication_sms", "flex") == 6
    assert h100.for_dispatcher("communication_sms", "node") == 20
    a100 = find_hardware("a100")
    assert a100.for_dispatcher("communication_sms", "flex") == a100["communication_sms"]
