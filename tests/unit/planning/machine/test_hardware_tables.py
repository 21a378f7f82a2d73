"""The machines that are known: every number has a source, and published products take the published time."""

from __future__ import annotations

import pytest

from dsv3_megatron.planning.machine.hardware_tables import _DEEPGEMM, _PROFILE_WGRAD, HARDWARE, find_hardware


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


@pytest.mark.parametrize(("groups", "rows", "columns", "inner", "tflops"), _DEEPGEMM)
def test_published_products_take_the_published_time(groups, rows, columns, inner, tflops) -> None:
    seconds = find_hardware("h800").product_seconds("fp8", "fprop", groups=groups, rows=rows, columns=columns,
                                                    inner=inner)
    assert 2 * groups * rows * columns * inner / seconds == pytest.approx(tflops * 1e12, rel=1e-9)


def test_published_weight_gradients_take_the_published_time_on_their_multiprocessors() -> None:
    for groups, rows, columns, inner, microseconds in _PROFILE_WGRAD:
        seconds = find_hardware("h800").product_seconds(
            "fp8", "wgrad", groups=groups, rows=rows, columns=columns, inner=inner, sm_share=112 / 132)
        assert seconds == pytest.approx(microseconds * 1e-6, rel=1e-9)
