"""Numbers of the host that a GPU's kernels need: sent without waiting for the GPU."""

from __future__ import annotations

from typing import Any

import torch


def send_integers(numbers: Any, device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Send a few integers to a device; the host goes on at once.

    `torch.tensor(numbers, device="cuda")` makes the host wait until the GPU has done all that it was given before. Out
    of pinned memory a copy takes its place among the GPU's other work.

    Args:
        numbers: Integers as `torch.as_tensor` takes them: nested sequences or an array.
        device: Device of the result.
        dtype: Dtype of the result.

    Returns:
        A tensor of the numbers' shape, of its own memory.
    """
    on_host = torch.tensor(numbers, dtype=dtype)
    if device.type != "cuda":
        return on_host.to(device)
    return on_host.pin_memory().to(device, non_blocking=True)
