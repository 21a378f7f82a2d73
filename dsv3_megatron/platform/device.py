"""The device of this process: what it is, which collective backend it uses, which precision it is fast in."""

from __future__ import annotations

import logging
import os
import platform as host
from dataclasses import dataclass

import torch

from dsv3_megatron.platform.notices import drop_known_notices
from dsv3_megatron.process.ranks import Processes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Device:
    """The device that one process computes on.

    Attributes:
        torch_device: "cpu", or "cuda:i" with the process's local rank.
        backend: torch.distributed backend for it, "gloo" or "nccl".
        name: What to write beside a measurement.
    """

    torch_device: torch.device
    backend: str
    name: str

    @property
    def is_cuda(self) -> bool:
        """Whether the process computes on a GPU."""
        return self.torch_device.type == "cuda"


def detect_device(local_rank: int = 0) -> Device:
    """The device for the process with this local rank: its own GPU if there is one, else the CPU.

    Raises:
        ValueError: there are GPUs, but fewer than local ranks.
    """
    if not torch.cuda.is_available():
        return Device(torch.device("cpu"), "gloo", _cpu_name())
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"local_rank={local_rank} needs {local_rank + 1} GPUs, this machine has {count}; "
                         f"start at most {count} processes per node (GPUS_PER_NODE={count})")
    return Device(torch.device("cuda", local_rank), "nccl", torch.cuda.get_device_name(local_rank))


def prepare(local_rank: int | None = None) -> Device:
    """Make this process ready for Megatron-Core and say where it computes.

    Without CUDA, installs the stand-ins of `cpu.py`; with CUDA, selects the process's GPU and touches
    nothing else. Safe to call again.

    Args:
        local_rank: Rank on this node; None reads LOCAL_RANK, as set by torchrun (0 without it).
    """
    rank = Processes.from_environment().local_rank if local_rank is None else local_rank
    drop_known_notices()
    device = detect_device(rank)
    if device.is_cuda:
        torch.cuda.set_device(device.torch_device)
    else:
        from dsv3_megatron.platform.cpu import install_stand_ins

        install_stand_ins()
    return device


def overlaps_reductions(device: Device) -> bool:
    """Whether gradients are reduced and weights gathered while a run computes, where its settings ask for it.

    On a GPU. On a CPU the same cores would do both, so that nothing is gained. The environment variable
    DSV3_OVERLAP_ON_CPU, where it is set and not 0, asks for it there too: certificates and tests do.
    """
    return device.is_cuda or os.environ.get("DSV3_OVERLAP_ON_CPU", "0") != "0"


def has_fast_bf16(device: Device) -> bool:
    """Whether bf16 products run faster than fp32 ones: a GPU from Ampere on, or a CPU with AMX or AVX512-BF16."""
    if device.is_cuda:
        return torch.cuda.get_device_capability(device.torch_device)[0] >= 8
    return has_bf16_matrix_units()


def has_bf16_matrix_units() -> bool:
    """Whether this CPU multiplies bf16 matrices in hardware (AMX tiles or AVX512-BF16)."""
    return bool(_bf16_matrix_units())


def _bf16_matrix_units() -> str:
    """What of this CPU multiplies bf16 matrices, or nothing."""
    probes = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return next((units for units, probe in probes.items() if getattr(torch.cpu, probe, bool)()), "")


def resolve_precision(precision: str, device: Device) -> str:
    """Turn "auto" into "bf16" or "fp32" by what the device is fast in; log the choice."""
    if precision != "auto":
        return precision
    chosen = "bf16" if has_fast_bf16(device) else "fp32"
    logger.info("precision auto: %s on %s", chosen, device.name)
    return chosen


def _cpu_name() -> str:
    name = host.processor() or host.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            name = next((line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), name)
    except OSError as error:
        logger.debug("no /proc/cpuinfo: %s", error)
    units = [torch.backends.cpu.get_cpu_capability(), *([_bf16_matrix_units()] if has_bf16_matrix_units() else [])]
    return f"{name} ({', '.join(units)}, {os.cpu_count()} cores)"
