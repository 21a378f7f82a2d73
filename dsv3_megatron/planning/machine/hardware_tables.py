"""The machines that are known by name, and where each number comes from.

Sources, by the names used below:

    report   DeepSeek-V3 report, arXiv 2412.19437
    ISCA     "Insights into DeepSeek-V3", arXiv 2505.09343
    DeepGEMM README of its first release (commit a6d97a1, February 2025): FP8 products on an H800, all 132 SMs
    profile  github.com/deepseek-ai/profile-data, train.json: kernels of one overlapped forward & backward pair of
             DeepSeek-V3 on an H800, 112 SMs for compute while 20 communicate
    DeepEP   docs/legacy.md: normal kernels on H800 at 4096 tokens, hidden 7168, top-8 of 4 groups
    FA3      FlashAttention-3, arXiv 2407.08608, figures 5 and 6: H100 SXM5, head dimension 128
    MAMF     "Maximum Achievable Matmul FLOPS" of github.com/stas00/ml-engineering, compute/accelerator (August 2026)
    NVIDIA   data sheets

None of them is the length or the cost of a training run. Times of the profile are medians over its four layers, in
microseconds, read from the kernels' durations; the bytes of an element-wise kernel are those it has to read and write.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from dsv3_megatron.config.fields import ConfigError
from dsv3_megatron.metrics.flops import DEVICE_PEAKS, device_peak_flops
from dsv3_megatron.planning.machine.hardware import (
    UNVERIFIED,
    AttentionPoint,
    Figure,
    Hardware,
    ProductPoint,
    load_hardware,
    measured_product,
)

GB = 1e9
_SMS, _COMPUTE_SMS = 132, 112

# DeepGEMM: groups, rows of a group, columns, inner, TFLOP/s. Decoding's 64 and 128 rows are for thin slices.
_DEEPGEMM = (
    (1, 64, 2112, 7168, 206), (1, 64, 24576, 1536, 289), (1, 64, 32768, 512, 219), (1, 64, 7168, 16384, 336),
    (1, 64, 4096, 7168, 287), (1, 64, 7168, 2048, 295), (1, 128, 2112, 7168, 352), (1, 128, 24576, 1536, 535),
    (1, 128, 32768, 512, 358), (1, 128, 7168, 16384, 645), (1, 128, 4096, 7168, 533), (1, 128, 7168, 2048, 510),
    (1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590),
    (1, 4096, 7168, 16384, 1358), (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025),
    (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099), (8, 4096, 4096, 7168, 1288), (8, 4096, 7168, 2048, 1093),
)
_FP8_BEST = 1358e12

# Profile: weight gradients into fp32; groups, rows (out), columns (in), inner (tokens), microseconds.
_PROFILE_WGRAD = (
    (1, 7168, 16384, 4096, 1487),  # attention's output
    (1, 24576, 1536, 4096, 465),  # queries up
    (1, 32768, 512, 4096, 220),  # keys and values up
    (1, 1536, 7168, 4096, 137),  # queries down
    (1, 576, 7168, 4096, 70),  # keys and values down
    (1, 4096, 7168, 4096, 357),  # shared expert, first
    (1, 7168, 2048, 4096, 180),  # shared expert, second
)

# Share of the bandwidth by kind: bytes, microseconds, what it was read from.
_T, _H = 4096, 7168
_PROFILE_MOVEMENT = {
    "norm": (4 * _T * _H, 105.5, "ln_fwd_kernel on [4096, 7168]"),
    "norm_backward": (6 * _T * _H, 163, "ln_bwd_kernel on [4096, 7168]"),
    "cast": (3.03 * 34688 * 4096, 211, "per_token_cast_to_fp8 on [34688, 4096]"),
    "cast_wide": (3.5 * _T * 16384, 189.5, "per_token_cast_to_fp8_with_fp8_special_fmt on [4096, 16384]"),
    "cast_transposed": (3.03 * _T * 32768, 154, "per_channel_cast_and_transpose of bf16 [4096, 32768]"),
    "requantize_transposed": (2.03 * 34688 * _H, 299, "per_channel_cast_and_transpose of FP8 [34688, 7168]"),
    "swiglu": (2 * 31104 * 4096 + 1.03 * 31104 * 2048, 132, "swiglu_forward_with_weight_and_per_token_cast [31104]"),
    "swiglu_backward": ((2 * 4096 + 2 * 2048 + 2 * 4096) * 32896, 321, "swiglu_forward_backward_with_weight [32896]"),
    "permute": (2 * _H * (31104 + 28984), 294, "reduce_fused of 31104 rows to 28984"),
    "permute_narrow": (2.06 * 31104 * _H, 180, "expand_to_fused_with_scales to 31104 rows"),
    "copy": (2 * 2 * _T * 128 * 64, 126, "rotary_kernel on [4096, 128, 64] of [4096, 128, 192]"),
    "add": (3 * 2 * _T * _H, 57, "add of bf16 [4096, 7168]"),
    "attention_backward": (2 * 2 * _T * 16384 + 6 * _T * 24576, 256.5 + 219.5,
                           "FlashAttnBwdPreprocess and PostprocessConvertdQ"),
    # Top-k twice, sorting, counting and indexing; by bytes of the scores, though it is latency.
    "routing": (8 * _T * 256, 2 * 69 + 167.5 + 67.5 + 32, "gatherTopK, get_fused_mapping, clean_and_count_expert"),
}
_H100_BANDWIDTH = 3.35e12

# FA3, head dimension 128: forward causal (figure 5), backward (figure 6, published without a mask).
_FA3_FORWARD = {512: 292, 1024: 423, 2048: 521, 4096: 579, 8192: 602, 16384: 616}
_FA3_BACKWARD = {512: 316, 1024: 424, 2048: 501, 4096: 542, 8192: 559, 16384: 561}


def _peak(device_name: str, precision: str) -> float:
    value = device_peak_flops(device_name, precision)
    assert value is not None
    return value


def _peak_source(device_name: str) -> str:
    import re

    return next(peak.source for peak in DEVICE_PEAKS if re.search(peak.pattern, device_name))


def _figures(**values: tuple[float, str]) -> dict[str, Figure]:
    return {name: Figure(*value) for name, value in values.items()}


def _hopper_figures(device: str) -> dict[str, Figure]:
    """What Hopper devices have in common."""
    return _figures(
        bf16_flops=(_peak(device, "bf16"), _peak_source(device)),
        fp8_flops=(_peak(device, "fp8"), _peak_source(device)),
        bf16_best_share=(794.5 / 989, "MAMF: H100 SXM and H200"),
        fp8_best_share=(_FP8_BEST / 1979e12, "DeepGEMM: 1358 TFLOP/s at 4096 x 7168 x 16384 of 1979"),
        memory_bandwidth=(_H100_BANDWIDTH, "NVIDIA H100 SXM"),
        memory_bytes=(84943110144, "profile: totalGlobalMem of an H800; 80 GB parts"),
        context_bytes=(0.6e9, UNVERIFIED + "a CUDA context with kernels of torch, cuBLAS and NCCL on Hopper"),
        # Data, expert-data, expert, pipeline and tensor groups; a channel has buffers of 4 MiB both ways.
        nccl_bytes=(2.0e9, UNVERIFIED + "5 groups of up to 32 channels with 2 x 4 MiB (NCCL_BUFFSIZE's default), and "
                    "peers of all-to-alls"),
        fragmentation_share=(0.03, UNVERIFIED + "of torch's caching allocator with expandable segments"),
        num_sms=(_SMS, "report, section 3.5.1"),
        communication_sms=(20, "report, section 3.2.2"),
        gpus_per_node=(8, "report, section 3.1; HGX"),
        nvlink_bandwidth=(160 * GB, "report, section 3.2.2"),
        network_bandwidth=(40 * GB, "ISCA: 40 GB/s effective of 400 Gb/s, for collectives and pipeline transfers"),
        all_to_all_nvlink_bandwidth=(153 * GB, "DeepEP: dispatch of EP8"),
        # 51 GB/s count tokens that stay on their node; 7 of 8 nodes are remote.
        all_to_all_network_bandwidth=(51 * GB * 7 / 8, "DeepEP: 51 GB/s at EP64, of which 7/8 crosses the network"),
        nvlink_latency=(3.33e-6, "ISCA, table 5"),
        network_latency=(3.7e-6, "ISCA, table 5: InfiniBand across leaves"),
        stream_busy_share=(124286 / 129012, "profile: part of the pair in which a compute kernel runs"),
        # 31104, 30976, 36864, 31104, 34688, 32512, 32896, 28416 rows where 32768 are the mean over the ranks.
        routed_rows_deviation=(0.0788, "profile: standard deviation of a rank's routed rows over eight layer passes"),
    )


def _hopper_products(figures: dict[str, Figure]) -> tuple[ProductPoint, ...]:
    points = [measured_product(figures, "fp8", "fprop", groups, rows, columns, inner,
                               2 * groups * rows * columns * inner / (tflops * 1e12))
              for groups, rows, columns, inner, tflops in _DEEPGEMM]
    points += [measured_product(figures, "fp8", "wgrad", groups, rows, columns, inner, microseconds * 1e-6,
                                _COMPUTE_SMS / _SMS)
               for groups, rows, columns, inner, microseconds in _PROFILE_WGRAD]
    return tuple(points)


def _hopper_attention() -> tuple[AttentionPoint, ...]:
    return tuple(AttentionPoint(is_backward, length, tflops / 989)
                 for is_backward, table in ((False, _FA3_FORWARD), (True, _FA3_BACKWARD))
                 for length, tflops in table.items())


def _hopper_movement() -> dict[str, Figure]:
    shares = {kind: Figure(num_bytes / (microseconds * 1e-6) / _H100_BANDWIDTH, f"profile: {kernel}")
              for kind, (num_bytes, microseconds, kernel) in _PROFILE_MOVEMENT.items()}
    shares["loss"] = Figure(shares["swiglu"].value, UNVERIFIED + "as swiglu: one reading or writing of a large tensor")
    # Gradients, moments and weights as flat vectors.
    shares["optimizer"] = Figure(shares["add"].value, UNVERIFIED + "as add: several flat vectors at once")
    return shares


_HOPPER_SOURCE = "products: DeepGEMM, weight gradients: profile; attention: FA3; movement: profile"
# Tensor-core shares by shape were published for Hopper; other devices are taken to reach as much of their own peak.
_AS_HOPPER = UNVERIFIED + "shares of the peak as published for Hopper"


def _hopper(name: str, device: str, **changes: tuple[float, str]) -> Hardware:
    figures = _hopper_figures(device)
    return Hardware(name, figures | _figures(**changes), _hopper_products(figures), _hopper_attention(),
                    _hopper_movement(), _HOPPER_SOURCE)


def _h800() -> Hardware:
    return _hopper("h800", "NVIDIA H800")


_H100_NVLINK = (360 * GB, UNVERIFIED + "80% of 450 GB/s one way (NVIDIA), as 160 of 200 on an H800")
_H100_ALL_TO_ALL = (344 * GB, UNVERIFIED + "153 of 200 GB/s (DeepEP on H800) of 450")


def _h100() -> Hardware:
    return _hopper("h100", "NVIDIA H100", nvlink_bandwidth=_H100_NVLINK, all_to_all_nvlink_bandwidth=_H100_ALL_TO_ALL)


def _h200() -> Hardware:
    return _hopper("h200", "NVIDIA H200", nvlink_bandwidth=_H100_NVLINK, all_to_all_nvlink_bandwidth=_H100_ALL_TO_ALL,
                   memory_bandwidth=(4.8e12, "NVIDIA H200 data sheet"), memory_bytes=(141e9, "NVIDIA H200 data sheet"))


def _b200() -> Hardware:
    figures = _hopper_figures("NVIDIA B200")
    base = _hopper("b200", "NVIDIA H100")
    changes = _figures(
        bf16_flops=(figures["bf16_flops"].value, figures["bf16_flops"].source),
        fp8_flops=(figures["fp8_flops"].value, figures["fp8_flops"].source),
        bf16_best_share=(1745 / 2250, "MAMF: B200 SXM"), fp8_best_share=(_FP8_BEST / 1979e12, _AS_HOPPER),
        memory_bandwidth=(8.0e12, "NVIDIA HGX B200, per GPU"), memory_bytes=(180e9, "NVIDIA HGX B200, per GPU"),
        num_sms=(148, UNVERIFIED + "as reported for B200"),
        communication_sms=(24, "DeepEP README: 24 SMs at EP8 on SM100"),
        nvlink_bandwidth=(720 * GB, UNVERIFIED + "80% of 900 GB/s one way (NVIDIA)"),
        all_to_all_nvlink_bandwidth=(643 * GB, "DeepEP README: EP8 on SM100 with 24 SMs"),
    )
    # FlashMLA README, as reported by NVIDIA: 1460 TFLOP/s forward and 1000 backward, the best lengths.
    attention = tuple(AttentionPoint(point.is_backward, point.seq_length, point.share * best / longest)
                      for point in base.attention
                      for best, longest in [(1000 / 2250, 561 / 989) if point.is_backward else
                                            (1460 / 2250, 616 / 989)])
    return Hardware("b200", {**base.figures, **changes}, base.products, attention, base.movement,
                    _AS_HOPPER + "; attention: FlashMLA README at best, by length as FA3")


def _a100() -> Hardware:
    base = _hopper("a100", "NVIDIA H100")
    figures = dict(base.figures)
    for name in ("fp8_flops", "fp8_best_share"):
        del figures[name]
    figures |= _figures(
        bf16_flops=(_peak("NVIDIA A100", "bf16"), _peak_source("NVIDIA A100")),
        bf16_best_share=(271.2 / 312, "MAMF: A100 SXM"),
        memory_bandwidth=(2.039e12, "NVIDIA A100 80GB SXM data sheet"),
        memory_bytes=(80e9, "NVIDIA A100 80GB SXM data sheet"),
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
                    _AS_HOPPER + "; attention: FlashAttention-2 at best, by length as FA3")


HARDWARE: dict[str, Callable[[], Hardware]] = {
    "h800": _h800, "h100": _h100, "h200": _h200, "b200": _b200, "a100": _a100,
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
