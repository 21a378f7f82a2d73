"""Hopper GPUs: what their kernels and links reach, and where each number comes from.

Sources, by the names used below:

    report   DeepSeek-V3 report, arXiv 2412.19437
    ISCA     "Insights into DeepSeek-V3", arXiv 2505.09343
    DeepGEMM README of its first release (commit a6d97a1, February 2025): FP8 products on an H800, all 132 SMs
    DeepGEMM 2025  its pull requests 74 (grouped, March), 95 (weight gradients, May) and 168 (dense, August) on an H800,
             and its README since April; github.com/deepseek-ai/DeepGEMM/pull/NUMBER
    profile  github.com/deepseek-ai/profile-data, train.json: kernels of one overlapped forward & backward pair of
             DeepSeek-V3 on an H800, 112 SMs for compute while 20 communicate
    DeepEP   docs/legacy.md: normal kernels on H800 at 4096 tokens, hidden 7168, top-8 of 4 groups
    DeepEP 2 README since its second version (July 2026): 8192 tokens, few SMs; github.com/deepseek-ai/DeepEP
    cuDNN    github.com/NVIDIA/cudnn-frontend, benchmark/: attention of DeepSeek-V3's shape (192 and 128 wide heads,
             causal), and norms; commit 3929da2, 2026
    FA3      FlashAttention-3, arXiv 2407.08608 (NeurIPS 2024), section 4.1 with figures 5 and 6: H100 SXM5, beside
             FlashAttention 2.5.8; head dimension 128
    MAMF     "Maximum Achievable Matmul FLOPS" of github.com/stas00/ml-engineering, compute/accelerator (August 2026)
    NVIDIA   data sheets

None of them is the length or the cost of a training run. Times of the profile are medians over its four layers, in
microseconds, read from the kernels' durations; the bytes of an element-wise kernel are those it has to read and write.
"""

from __future__ import annotations

from dsv3_megatron.metrics.flops import DEVICE_PEAKS, device_peak_flops
from dsv3_megatron.planning.machine.hardware import (
    UNVERIFIED,
    AttentionPoint,
    Figure,
    Hardware,
    ProductPoint,
    measured_product,
)

GB = 1e9
_SMS, _COMPUTE_SMS = 132, 112

# DeepGEMM: groups, rows of a group, columns, inner, TFLOP/s. Decoding's 64 and 128 rows are for thin slices.
DEEPGEMM_FIRST = (
    (1, 64, 2112, 7168, 206), (1, 64, 24576, 1536, 289), (1, 64, 32768, 512, 219), (1, 64, 7168, 16384, 336),
    (1, 64, 4096, 7168, 287), (1, 64, 7168, 2048, 295), (1, 128, 2112, 7168, 352), (1, 128, 24576, 1536, 535),
    (1, 128, 32768, 512, 358), (1, 128, 7168, 16384, 645), (1, 128, 4096, 7168, 533), (1, 128, 7168, 2048, 510),
    (1, 4096, 2112, 7168, 1058), (1, 4096, 24576, 1536, 990), (1, 4096, 32768, 512, 590),
    (1, 4096, 7168, 16384, 1358), (1, 4096, 4096, 7168, 1304), (1, 4096, 7168, 2048, 1025),
    (4, 8192, 4096, 7168, 1297), (4, 8192, 7168, 2048, 1099), (8, 4096, 4096, 7168, 1288), (8, 4096, 7168, 2048, 1093),
)
_FP8_BEST = 1358e12

# DeepGEMM 2025, in the same columns. Thin slices are those of the first release: newer ones are not published.
DEEPGEMM_2025 = (
    *(point for point in DEEPGEMM_FIRST if point[1] < 4096),
    (1, 4096, 2112, 7168, 1296), (1, 4096, 24576, 1536, 1263), (1, 4096, 32768, 512, 938),
    (1, 4096, 7168, 16384, 1484), (1, 4096, 4096, 7168, 1424), (1, 4096, 7168, 2048, 1204),
    (4, 8192, 4096, 7168, 1381), (4, 8192, 7168, 2048, 1262),
)
_FP8_BEST_2025 = 1550e12
# Weight gradients: groups, rows (out), columns (in), inner (tokens), TFLOP/s, all 132 SMs.
DEEPGEMM_2025_WGRAD = (
    (1, 2112, 7168, 4096, 920), (1, 24576, 1536, 4096, 986), (1, 32768, 512, 4096, 878), (1, 7168, 16384, 4096, 994),
    (1, 4096, 7168, 4096, 942), (1, 7168, 2048, 4096, 920), (1, 2112, 7168, 8192, 1052), (1, 24576, 1536, 8192, 1092),
    (1, 32768, 512, 8192, 1014), (4, 4096, 7168, 4096, 939), (4, 7168, 2048, 4096, 900), (4, 4096, 7168, 8192, 1044),
    (4, 7168, 2048, 8192, 1033), (8, 4096, 7168, 4096, 942),
)

# Profile: weight gradients into fp32; groups, rows (out), columns (in), inner (tokens), microseconds.
PROFILE_WGRAD = (
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

BLOCK_SCALES = "fp32 for each 1x128 and 128x128, multiplied on CUDA cores"


def peak_of(device_name: str, precision: str) -> float:
    """FLOP/s of a device that is known by its name."""
    value = device_peak_flops(device_name, precision)
    assert value is not None
    return value


def peak_source(device_name: str) -> str:
    """Source of a known device's peaks."""
    import re

    return next(peak.source for peak in DEVICE_PEAKS if re.search(peak.pattern, device_name))


def figures_of(**values: tuple[float, str]) -> dict[str, Figure]:
    """Figures by name, each of a value and a source."""
    return {name: Figure(*value) for name, value in values.items()}


def hopper_figures(device: str) -> dict[str, Figure]:
    """What Hopper devices have in common."""
    return figures_of(
        bf16_flops=(peak_of(device, "bf16"), peak_source(device)),
        fp8_flops=(peak_of(device, "fp8"), peak_source(device)),
        bf16_best_share=(794.5 / 989, "MAMF: H100 SXM and H200"),
        fp8_best_share=(_FP8_BEST / 1979e12, "DeepGEMM: 1358 TFLOP/s at 4096 x 7168 x 16384 of 1979"),
        memory_bandwidth=(_H100_BANDWIDTH, "NVIDIA H100 SXM"),
        memory_bytes=(84943110144, "profile: totalGlobalMem of an H800; 80 GB parts"),
        context_bytes=(0.6e9, UNVERIFIED + "a CUDA context with kernels of torch, cuBLAS and NCCL on Hopper"),
        # Data, expert-data, expert, pipeline and tensor groups; a channel has buffers of 4 MiB both ways.
        nccl_bytes=(2.0e9, UNVERIFIED + "5 groups of up to 32 channels with 2 x 4 MiB (NCCL_BUFFSIZE's default), and "
                    "peers of all-to-alls"),
        fragmentation_share=(0.03, UNVERIFIED + "of torch's caching allocator with expandable segments"),
        # torch attends to blocks by FlashAttention 2; the measured attention is FlashAttention 3.
        block_forward_share=(1 / 1.75, "FA3, section 4.1: 1.5 to 2.0 times as fast as FlashAttention 2 forward"),
        block_backward_share=(1 / 1.625, "FA3, section 4.1: 1.5 to 1.75 times as fast as FlashAttention 2 backward"),
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


def _first_products(figures: dict[str, Figure]) -> tuple[ProductPoint, ...]:
    points = [measured_product(figures, "fp8", "fprop", groups, rows, columns, inner,
                               2 * groups * rows * columns * inner / (tflops * 1e12))
              for groups, rows, columns, inner, tflops in DEEPGEMM_FIRST]
    points += [measured_product(figures, "fp8", "wgrad", groups, rows, columns, inner, microseconds * 1e-6,
                                _COMPUTE_SMS / _SMS)
               for groups, rows, columns, inner, microseconds in PROFILE_WGRAD]
    return tuple(points)


def _products_of_2025(figures: dict[str, Figure]) -> tuple[ProductPoint, ...]:
    return tuple(measured_product(figures, "fp8", purpose, groups, rows, columns, inner,
                                  2 * groups * rows * columns * inner / (tflops * 1e12))
                 for purpose, table in (("fprop", DEEPGEMM_2025), ("wgrad", DEEPGEMM_2025_WGRAD))
                 for groups, rows, columns, inner, tflops in table)


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


_FIRST_SOURCE = "products: DeepGEMM, weight gradients: profile; attention: FA3; movement: profile"
_SOURCE_OF_2025 = "products: DeepGEMM 2025; attention: FA3; movement: profile"
# Shares by shape were published for Hopper; other devices are taken to reach as much of their own peak.
AS_HOPPER = UNVERIFIED + "shares of the peak as published for Hopper"


def hopper(name: str, device: str, *, is_of_2025: bool = True, **changes: tuple[float, str]) -> Hardware:
    """A machine of eight Hopper GPUs a node.

    Args:
        name: Name of the machine.
        device: The GPU's name, for its peaks.
        is_of_2025: FP8 products by DeepGEMM of 2025, and DeepEP's second version for the dispatcher "flex"; else their
            first releases, which are of the time of DeepSeek-V3.
        changes: Figures that are other than an H800's, by name: value and source.
    """
    figures = hopper_figures(device)
    if is_of_2025:
        figures |= figures_of(
            fp8_best_share=(_FP8_BEST_2025 / 1979e12, "DeepGEMM 2025: README, up to 1550 TFLOP/s on an H800, of 1979"),
            flex_communication_sms=(6, "DeepEP 2: EP 8 x 4 on SM90 with 6 SMs"),
            flex_all_to_all_nvlink_bandwidth=(153 * GB, "DeepEP: dispatch of EP8; none is published of its second "
                                              "version"),
            # Logical bandwidth, of which 3 of 4 nodes are remote.
            flex_all_to_all_network_bandwidth=(
                61 * GB * 3 / 4, "DeepEP 2: 61 GB/s at EP 8 x 4, of which 3/4 crosses the network"))
    products = (_products_of_2025 if is_of_2025 else _first_products)(figures)
    return Hardware(name, figures | figures_of(**changes), products, _hopper_attention(), _hopper_movement(),
                    _SOURCE_OF_2025 if is_of_2025 else _FIRST_SOURCE, BLOCK_SCALES)
