"""Which way a matrix product is computed, decided once per device and dtype.

A CPU without bf16 matrix units multiplies bf16 matrices at a fraction of its fp32 speed (AVX2: 85 GFLOP/s per core in
fp32, 17 in bf16, and 1.1 where the weight is not transposed), so there bf16 operands are converted to fp32, multiplied
and rounded once. With AMX or AVX512-BF16, and on GPUs, the native product is used.
"""

from __future__ import annotations

import functools
import logging

import torch

from dsv3_megatron.platform import has_bf16_matrix_units

logger = logging.getLogger(__name__)

PRODUCT_BACKENDS = ("auto", "native", "via_fp32")
_NARROW_DTYPES = (torch.bfloat16, torch.float16)


def choose_product_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve `backend` to "native" or "via_fp32".

    Args:
        backend: "auto", "native" or "via_fp32".
        device: Device of the operands.
        dtype: Dtype of the operands; only bf16 and fp16 are ever converted.

    Raises:
        ValueError: `backend` is not one of the three.
    """
    if backend not in PRODUCT_BACKENDS:
        raise unknown_backend("matrix products", backend, PRODUCT_BACKENDS)
    if dtype not in _NARROW_DTYPES:
        return "native"
    if backend != "auto":
        return backend
    return _choose_automatically(device.type, dtype)


def unknown_backend(operation: str, backend: str, known: tuple[str, ...]) -> ValueError:
    """The error for a backend that does not exist or cannot run here."""
    return ValueError(f"backend={backend!r} of {operation} must be one of {', '.join(known)}; try 'auto'")


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums, norms and softmax are computed: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def log_choice(operation: str, backend: str, where: str) -> None:
    """Log a choice made by "auto", once for each (operation, backend, device and dtype)."""
    logger.info("%s: backend %s (%s)", operation, backend, where)


@functools.cache
def _choose_automatically(device_type: str, dtype: torch.dtype) -> str:
    slow = device_type == "cpu" and not has_bf16_matrix_units()
    choice = "via_fp32" if slow else "native"
    reason = "no bf16 matrix units, " if slow else ""
    log_choice("matrix products", choice, f"{device_type}, {dtype}, {reason}{torch.backends.cpu.get_cpu_capability()}")
    return choice
