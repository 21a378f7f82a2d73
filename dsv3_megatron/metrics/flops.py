"""Exact model FLOPs of a training token, and what a measured step time makes of them: tokens/s, FLOP/s, MFU.

Arithmetic on a ModelConfig alone, no torch. Model FLOPs are what the mathematics needs: recomputed
activations, the router's top-k, norms and softmax do not count.

Usage:
    flops = flops_per_token(model, seq_length)
    speed = RunSpeed(seq_length, flops, num_devices=world_size,
                     peak_flops_per_device=device_peak_flops(torch.cuda.get_device_name(), "bf16"))
    rates = speed.rates(batch_size, step_time_s)          # rates.tokens_per_second, rates.mfu

Source: DeepSeek-V3 report, section 2; 250 GFLOP/token of "Insights into DeepSeek-V3" (arXiv 2505.09343),
table 2, which is `main` of dsv3-671b at 4096 tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dsv3_megatron.config.model import ModelConfig
from dsv3_megatron.metrics.parameters import count_parameters


@dataclass(frozen=True)
class FlopsPerToken:
    """Forward and backward FLOPs of one token; attention as the causal half of the score matrix."""

    main_linear: int
    main_attention: int
    mtp_linear: int
    mtp_attention: int

    @property
    def main(self) -> int:
        """The main model, causal attention."""
        return self.main_linear + self.main_attention

    @property
    def main_noncausal(self) -> int:
        """The main model, all of the score matrix counted."""
        return self.main_linear + 2 * self.main_attention

    @property
    def mtp(self) -> int:
        """The MTP modules with their passes through the shared head, causal attention."""
        return self.mtp_linear + self.mtp_attention

    @property
    def mtp_noncausal(self) -> int:
        """The MTP modules, all of the score matrix counted."""
        return self.mtp_linear + 2 * self.mtp_attention

    @property
    def training(self) -> int:
        """Everything a training step computes for a token: main model and MTP, causal attention."""
        return self.main + self.mtp


def flops_per_token(model: ModelConfig, seq_length: int) -> FlopsPerToken:
    """Model FLOPs of one token in forward and backward.

    Linear: 2 per active parameter forward and 4 backward; the embedding table is a look-up and costs
    none. Attention: a query meets S/2 keys on average, 2 * (qk_head_dim + v_head_dim) per head and pair
    forward, twice that backward: 3 * (qk_head_dim + v_head_dim) * heads * S per layer.

    Args:
        model: Architecture of the model.
        seq_length: S, tokens in a sequence.

    Raises:
        ValueError: seq_length below 1.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length={seq_length} must be at least 1")
    table = count_parameters(model)
    head = model.vocab_size * model.hidden_size
    attention = 3 * (model.qk_head_dim + model.v_head_dim) * model.num_attention_heads * seq_length
    return FlopsPerToken(
        main_linear=6 * table.main_active_without_embedding,
        main_attention=attention * model.num_layers,
        mtp_linear=6 * (table.mtp_active + head * model.mtp_num_layers),
        mtp_attention=attention * model.mtp_num_layers,
    )


@dataclass(frozen=True)
class DevicePeak:
    """Dense (no structured sparsity) tensor-core peak of a device family, in FLOP/s."""

    pattern: str
    bf16: float
    fp8: float | None
    source: str


_HOPPER = "NVIDIA H100 datasheet, half of the figures with sparsity"
# In order: the first pattern found in the device's name counts, so the narrower ones come first.
DEVICE_PEAKS: tuple[DevicePeak, ...] = (
    DevicePeak(r"\bH[18]00 PCIe", 756e12, 1513e12, _HOPPER + ", PCIe"),
    DevicePeak(r"\bH[12]00 NVL", 835.5e12, 1671e12, _HOPPER + ", NVL"),
    DevicePeak(r"\bH800\b", 989e12, 1979e12,
               "bf16: Insights into DeepSeek-V3, arXiv 2505.09343; fp8: H100 SXM's, equality not confirmed"),
    DevicePeak(r"\bG?H[12]00\b", 989e12, 1979e12, _HOPPER + ", SXM; the same in the H200 and GH200 datasheets"),
    DevicePeak(r"\bH20\b", 148e12, 296e12, "NVIDIA H20 specification as published by vendors"),
    DevicePeak(r"\bGB300\b", 2500e12, 5000e12, "NVIDIA GB300 NVL72 datasheet, per GPU, half of those with sparsity"),
    DevicePeak(r"\bGB200\b", 2500e12, 5000e12, "NVIDIA GB200 NVL72 datasheet, per GPU, half of those with sparsity"),
    DevicePeak(r"\bB200\b", 2250e12, 4500e12, "NVIDIA HGX B200 datasheet, per GPU, half of those with sparsity"),
    DevicePeak(r"\bA[18]00\b", 312e12, None, "NVIDIA A100 datasheet"),
    DevicePeak(r"\bL40S\b", 362e12, 733e12, "NVIDIA L40S datasheet"),
)


def device_peak_flops(device_name: str, precision: str = "bf16") -> float | None:
    """Peak FLOP/s of a device for dense products, or None if it is not known.

    Args:
        device_name: Name as `torch.cuda.get_device_name()` gives it.
        precision: "bf16" or "fp8". Others, fp32 included, have no entry.

    Returns:
        FLOP/s of the whole device; None for an unknown device, for a CPU (pass a measured peak to
        RunSpeed instead) and for a MIG slice, which is a part of a device.
    """
    if precision not in ("bf16", "fp8") or re.search(r"\bMIG\b", device_name):
        return None
    for peak in DEVICE_PEAKS:
        if re.search(peak.pattern, device_name):
            return peak.bf16 if precision == "bf16" else peak.fp8
    return None


@dataclass(frozen=True)
class StepRates:
    """Speed of one step over all devices; `mfu` is None where the device's peak is not known."""

    tokens_per_second: float
    model_flops_per_second: float
    tflops_per_device: float
    mfu: float | None


@dataclass(frozen=True)
class RunSpeed:
    """What turns a step time into rates. Main model and MTP count, attention causal.

    Args:
        seq_length: Tokens in a sequence.
        flops: FLOPs of a token, as `flops_per_token` counts them.
        num_devices: Devices (on CPU: processes) that share the work.
        peak_flops_per_device: FLOP/s; None: no MFU.
    """

    seq_length: int
    flops: FlopsPerToken
    num_devices: int = 1
    peak_flops_per_device: float | None = None

    def rates(self, num_sequences: int, seconds: float) -> StepRates:
        """Rates of `num_sequences` trained in `seconds`.

        Raises:
            ValueError: seconds not above 0.
        """
        if not seconds > 0:
            raise ValueError(f"seconds={seconds} must be above 0")
        tokens_per_second = num_sequences * self.seq_length / seconds
        flops_per_second = tokens_per_second * self.flops.training
        per_device = flops_per_second / self.num_devices
        peak = self.peak_flops_per_device
        return StepRates(tokens_per_second, flops_per_second, per_device / 1e12, per_device / peak if peak else None)
