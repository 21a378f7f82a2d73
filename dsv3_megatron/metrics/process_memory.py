"""Memory of this process: resident on the host, allocated and reserved on a GPU."""

from __future__ import annotations

import resource
import sys

import torch

from dsv3_megatron.platform import Device


def memory_bytes(device: Device) -> dict[str, int]:
    """Bytes by kind; peaks are since the process began.

    Args:
        device: Device of this process; GPU kinds are there on a GPU only.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"host-peak-resident": peak if sys.platform == "darwin" else peak * 1024}
    if device.is_cuda:
        found["gpu-allocated"] = torch.cuda.memory_allocated(device.torch_device)
        found["gpu-peak-allocated"] = torch.cuda.max_memory_allocated(device.torch_device)
        found["gpu-peak-reserved"] = torch.cuda.max_memory_reserved(device.torch_device)
    return found
