"""Which device this process computes on, and what Megatron-Core needs to run on one without CUDA.

`prepare()` is called once by an entry point, before anything of Megatron-Core is imported; importing
this package changes nothing. Where CUDA is available it changes nothing at all. In reading order:

    device.py    the device, its precision and its collective backend
    cpu.py       stand-ins for CUDA, each with the call of Megatron-Core that needs it
    meta.py      models without memory, to be counted
    sending.py   a few numbers of the host, sent to a GPU without waiting for it
    notices.py   other packages' notices that are left out
    local_torchrun.py   torchrun for one machine, whose stores no other machine can reach
"""

from dsv3_megatron.platform.device import (
    Device,
    detect_device,
    has_bf16_matrix_units,
    has_fast_bf16,
    prepare,
    resolve_precision,
)
from dsv3_megatron.platform.meta import meta_device

__all__ = ["Device", "detect_device", "has_bf16_matrix_units", "has_fast_bf16", "meta_device", "prepare",
           "resolve_precision"]
