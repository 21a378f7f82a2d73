"""The machines that are known by name; `hopper_tables.py` and `blackwell_tables.py` say where each number comes from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.planning.machine.blackwell_tables import b200, gb200, gb300
from dsv3_megatron.planning.machine.hardware import UNVERIFIED, AttentionPoint, Hardware, load_hardware
from dsv3_megatron.planning.machine.hopper_tables import AS_HOPPER, GB, figures_of, hopper, peak_of, peak_source


def _h800() -> Hardware:
    """DeepSeek-V3's own machine, with kernels of its time."""
    return hopper("h800", "NVIDIA H800", is_of_2025=False)


def _h800_today() -> Hardware:
    return hopper("h800-today", "NVIDIA H800")


_H100_NVLINK = (360 * GB, UNVERIFIED + "80% of 450 GB/s one way (NVIDIA), as 160 of 200 on an H800")
_H100_ALL_TO_ALL = (344 * GB, UNVERIFIED + "153 of 200 GB/s (DeepEP on H800) of 450")


def _h100() -> Hardware:
    return hopper("h100", "NVIDIA H100", nvlink_bandwidth=_H100_NVLINK, all_to_all_nvlink_bandwidth=_H100_ALL_TO_ALL)


def _h200() -> Hardware:
    return hopper("h200", "NVIDIA H200", nvlink_bandwidth=_H100_NVLINK, all_to_all_nvlink_bandwidth=_H100_ALL_TO_ALL,
                   memory_bandwidth=(4.8e12, "NVIDIA H200 data sheet"), memory_bytes=(141e9, "NVIDIA H200 data sheet"))


def _a100() -> Hardware:
    base = hopper("a100", "NVIDIA H100")
    figures = dict(base.figures)
    for name in [name for name in figures if name.startswith(("fp8_", "flex_"))]:  # of which it has nothing
        del figures[name]
    figures |= figures_of(
        bf16_flops=(peak_of("NVIDIA A100", "bf16"), peak_source("NVIDIA A100")),
        bf16_best_share=(271.2 / 312, "MAMF: A100 SXM"),
        memory_bandwidth=(2.039e12, "NVIDIA A100 80GB SXM data sheet"),
        memory_bytes=(80e9, "NVIDIA A100 80GB SXM data sheet"),
        block_forward_share=(1.0, "the measured attention is FlashAttention 2 too"),
        block_backward_share=(1.0, "the measured attention is FlashAttention 2 too"),
        num_sms=(108, "NVIDIA A100 data sheet"), communication_sms=(16, UNVERIFIED + "20 of 132, as on an H800"),
        nvlink_bandwidth=(240 * GB, UNVERIFIED + "80% of 300 GB/s one way (NVIDIA)"),
        all_to_all_nvlink_bandwidth=(230 * GB, UNVERIFIED + "153 of 200 GB/s (DeepEP on H800) of 300"),
        network_bandwidth=(20 * GB, UNVERIFIED + "40 of 50 GB/s (ISCA) of a 200 Gb/s card"),
        all_to_all_network_bandwidth=(22 * GB, UNVERIFIED + "as DeepEP, of a 200 Gb/s card"),
    )
    # FlashAttention-2, arXiv 2307.08691: up to 73% of an A100's peak forward and 63% backward.
    attention = tuple(AttentionPoint(point.is_backward, point.seq_length, point.share * best / longest)
                      for point in base.attention
                      for best, longest in [(0.63, 561 / 989) if point.is_backward else (0.73, 616 / 989)])
    return Hardware("a100", figures, (), attention, base.movement,
                    AS_HOPPER + "; attention: FlashAttention-2 at best, by length as FA3")


HARDWARE: dict[str, Callable[[], Hardware]] = {
    "h800": _h800, "h800-today": _h800_today, "h100": _h100, "h200": _h200, "b200": b200, "gb200": gb200,
    "gb300": gb300, "a100": _a100,
}


@lru_cache(maxsize=32)
def find_hardware(name: str) -> Hardware:
    """The machine called `name`, or one from a file that ends with .json.

    Raises:
        ConfigError: there is none.
    """
    if name.endswith(".json"):
        return load_hardware(name)
    if name not in HARDWARE:
        raise ConfigError(f"hardware={name!r} is not known; choose one of {', '.join(HARDWARE)}, cpu, which measures "
                          "this machine, or a .json file that --save-hardware wrote")
    return HARDWARE[name]()
