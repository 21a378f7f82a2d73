"""Multiprocessors of a GPU divided between computation and communication: one setting, told to all who use them.

Without it a persistent kernel starts a program on every multiprocessor, of which some are NCCL's for as long as a
message goes; the last programs wait, and the kernel takes up to twice its time. Not run on a GPU yet.

Source: DeepSeek-V3 report, section 3.2.2: 20 of 132 for communication.
"""

from __future__ import annotations

import logging

import torch

from dsv3_megatron.config.packages import is_installed
from dsv3_megatron.config.parallel import ParallelConfig
from dsv3_megatron.parallel.communicators import set_most_sms
from dsv3_megatron.platform import Device

logger = logging.getLogger(__name__)


def divide_multiprocessors(parallel: ParallelConfig, device: Device) -> None:
    """Leave to communication what a run says, in this process, for the groups and kernels that come after.

    Told are NCCL's groups that are made from now on, the persistent FP8 kernels, and cuBLAS where torch can tell it.
    On a CPU nothing is done.

    Args:
        parallel: The run's layout; `communication_sms` is the number.
        device: The device of this process.
    """
    if not device.is_cuda:
        return
    count = parallel.communication_sms
    set_most_sms(count)
    if is_installed("triton"):
        from dsv3_megatron.kernels.launch import leave_processors

        leave_processors(count)
    told = _tell_cublas(count)
    if count:
        logger.info("multiprocessors for communication: %d; left to it by NCCL and the FP8 kernels%s", count,
                    " and cuBLAS" if told else ", not by cuBLAS, which this torch cannot tell")


def _tell_cublas(count: int) -> bool:
    """Whether torch, whose function for it is experimental, could."""
    tell = getattr(torch._C, "_set_sm_carveout_experimental", None)
    if tell is None:
        return False
    wanted = count or None
    if torch._C._get_sm_carveout_experimental() != wanted:  # torch warns at each call
        tell(wanted)
    return True
