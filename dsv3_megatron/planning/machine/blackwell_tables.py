"""Blackwell GPUs: B200 in nodes of eight, GB200 and GB300 in NVLink domains of 72, and where each number comes from.

What is not published is as on Hopper, by share of the device's own peak, and marked so. Sources, beside those of
`hopper_tables.py`:

    ml-engineering  github.com/stas00/ml-engineering, compute/accelerator/README.md (commit 744d01e, August 2026):
                    memory, and MAMF, the best matrix product that torch reaches, in BF16 and in FP8
    HybridEP        Hybrid-EP_Implementation.md of github.com/deepseek-ai/DeepEP, branch hybrid-ep: 4096 tokens, hidden
                    7168, top-8; kernels alone
    FlashMLA        README of github.com/deepseek-ai/FlashMLA: attention on B200, as reported by NVIDIA
    NVL72           nvidia.com/en-us/data-center/gb200-nvl72 and gb300-nvl72

None of them is the length or the speed of a training run.
"""

from __future__ import annotations

from dsv3_megatron.config.presets import preset
from dsv3_megatron.ops.row_bytes import record_bytes
from dsv3_megatron.planning.machine.hardware import UNVERIFIED, AttentionPoint, Figure, Hardware
from dsv3_megatron.planning.machine.hopper_tables import AS_HOPPER, GB, figures_of, hopper, peak_of, peak_source

MX_SCALES = "E8M0 for each 1x32, multiplied in the tensor core (MXFP8)"

# cuDNN, BF16, causal, two sequences, 128 heads: TFLOP/s by length, forward and backward.
GB200_ATTENTION = ({2048: 1072, 4096: 1406, 8192: 1585, 16384: 1678, 32768: 1743},
                   {2048: 846, 4096: 1057, 8192: 1193, 16384: 1134, 32768: 1076})
GB300_ATTENTION = ({2048: 1285, 4096: 1590, 8192: 1825, 16384: 1967, 32768: 1991},
                   {2048: 914, 4096: 1143, 8192: 1291, 16384: 1302, 32768: 1289})
# cuDNN, RMSNorm of [4096, 8192] in BF16: GB/s forward and backward.
_GB200_NORM, _GB300_NORM = (5934.0, 4885.9), (5976.0, 4908.6)
_BANDWIDTH = 8.0e12
# HybridEP on 32 GPUs of a domain with 32 SMs: GB/s of dispatch in FP8 and of combine.
_HYBRID_DISPATCH, _HYBRID_COMBINE, _HYBRID_SMS = 538.86, 605.15, 32
_NVL72_SIZE = 72


def _attention(tables: tuple[dict[int, int], dict[int, int]], peak: float) -> tuple[AttentionPoint, ...]:
    return tuple(AttentionPoint(is_backward, length, tflops * 1e12 / peak)
                 for is_backward, table in zip((False, True), tables, strict=True) for length, tflops in table.items())


def _there_and_back(dispatch: float, combine: float) -> float:
    """One bandwidth, in GB/s, in which a token's row goes out in FP8 and comes home in BF16, at DeepSeek-V3's width."""
    hidden = preset("dsv3-671b").model.hidden_size
    out, home = record_bytes(hidden), 2 * hidden
    return (out + home) / (out / dispatch + home / combine)


def _norms(measured: tuple[float, float]) -> dict[str, Figure]:
    return {kind: Figure(gbs * 1e9 / _BANDWIDTH, "cuDNN: RMSNorm of [4096, 8192], BF16")
            for kind, gbs in zip(("norm", "norm_backward"), measured, strict=True)}


def _blackwell(name: str, device: str, attention: tuple[AttentionPoint, ...], norms: dict[str, Figure],
               tables_source: str, **changes: tuple[float, str]) -> Hardware:
    """A machine of Blackwell GPUs; what is not changed is as on Hopper."""
    base = hopper(name, "NVIDIA H100")
    own = {
        "bf16_flops": (peak_of(device, "bf16"), peak_source(device)),
        "fp8_flops": (peak_of(device, "fp8"), peak_source(device)),
        "memory_bandwidth": (_BANDWIDTH, "ml-engineering: 8 TB/s"),
        "communication_sms": (20, UNVERIFIED + "NCCL limited as on Hopper"),
        "nvlink_bandwidth": (720 * GB, UNVERIFIED + "80% of 900 GB/s one way (NVIDIA), as 160 of 200 on an H800"),
    }
    movement = {kind: Figure(figure.value, UNVERIFIED + f"as on Hopper ({figure.source})")
                for kind, figure in base.movement.items()}
    figures = {**base.figures, **figures_of(**{**own, **changes})}
    return Hardware(name, figures, base.products, attention, movement | norms,
                    AS_HOPPER + "; " + tables_source, MX_SCALES)


def b200() -> Hardware:
    """Eight B200 a node, 400 Gb/s a GPU."""
    peak = peak_of("NVIDIA B200", "bf16")
    # FlashMLA has the best lengths only: 1460 TFLOP/s forward and 1000 backward; by length as on GB200.
    lengths = tuple({length: round(tflops * best / max(table.values())) for length, tflops in table.items()}
                    for table, best in zip(GB200_ATTENTION, (1460, 1000), strict=True))
    return _blackwell(
        "b200", "NVIDIA B200", _attention((lengths[0], lengths[1]), peak), {},
        "attention: FlashMLA at best, by length as cuDNN on GB200",
        bf16_best_share=(1745 / 2250, "ml-engineering: MAMF of B200 SXM in BF16"),
        fp8_best_share=(3432.5 / 4500, "ml-engineering: MAMF of B200 SXM in FP8"),
        memory_bytes=(180e9, "ml-engineering: 180 GB"),
        num_sms=(148, UNVERIFIED + "as reported for B200"),
        all_to_all_nvlink_bandwidth=(643 * GB, "DeepEP 2: dispatch of EP 8 on SM100 with 24 SMs"),
        flex_communication_sms=(24, "DeepEP 2: the fewest for EP 8 on SM100"),
        flex_all_to_all_nvlink_bandwidth=(_there_and_back(643, 675) * GB, "DeepEP 2: EP 8 on SM100 with 24 SMs"),
        flex_all_to_all_network_bandwidth=(90 * GB / 2, "DeepEP 2: 90 GB/s at EP 8 x 2 on SM100, of which half crosses "
                                           "the network"))


def _of_a_domain(**changes: tuple[float, str]) -> dict[str, tuple[float, str]]:
    """What GB200 and GB300 have in common."""
    bandwidth = _there_and_back(_HYBRID_DISPATCH, _HYBRID_COMBINE) * GB
    source = "HybridEP: 32 GPUs of a GB200 domain, 32 SMs; dispatch in FP8 and combine, by their bytes"
    return {
        "gpus_per_node": (_NVL72_SIZE, "NVL72: GPUs of an NVLink domain"),
        "num_sms": (152, UNVERIFIED + "as reported for GB200"),
        "all_to_all_nvlink_bandwidth": (bandwidth, UNVERIFIED + f"NCCL as {source}"),
        "flex_communication_sms": (_HYBRID_SMS, source),
        "flex_all_to_all_nvlink_bandwidth": (bandwidth, source),
        **changes,
    }


def gb200() -> Hardware:
    """Domains of 72 GB200, 400 Gb/s a GPU between them."""
    peak = peak_of("NVIDIA GB200", "bf16")
    return _blackwell(
        "gb200", "NVIDIA GB200", _attention(GB200_ATTENTION, peak), _norms(_GB200_NORM), "attention, norms: cuDNN",
        **_of_a_domain(
            bf16_best_share=(1822 / 2500, "ml-engineering: MAMF of GB200 in BF16"),
            fp8_best_share=(3615.6 / 5000, "ml-engineering: MAMF of GB200 in FP8"),
            memory_bytes=(186e9, "ml-engineering: 186 GB")))


def gb300() -> Hardware:
    """Domains of 72 GB300, 800 Gb/s a GPU between them."""
    peak = peak_of("NVIDIA GB300", "bf16")
    doubled = UNVERIFIED + "twice a 400 Gb/s card's: ConnectX-8, 800 Gb/s"
    return _blackwell(
        "gb300", "NVIDIA GB300", _attention(GB300_ATTENTION, peak), _norms(_GB300_NORM), "attention, norms: cuDNN",
        **_of_a_domain(
            bf16_best_share=(1769 / 2250, UNVERIFIED + "share as of B300 (ml-engineering, MAMF in BF16)"),
            fp8_best_share=(3353.3 / 4500, UNVERIFIED + "share as of B300 (ml-engineering, MAMF in FP8)"),
            memory_bytes=(288e9, UNVERIFIED + "as of B300 (ml-engineering)"),
            network_bandwidth=(80 * GB, doubled), all_to_all_network_bandwidth=(2 * 51 * GB * 7 / 8, doubled),
            flex_all_to_all_network_bandwidth=(2 * 61 * GB * 3 / 4, doubled)))
