"""How kernels are launched here: on a Hopper GPU, or under Triton's interpreter on a CPU."""

from __future__ import annotations

import functools

import torch
import triton

# Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors: decided when they are defined.
IS_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Of the kernels that quantize. With 4 those of weights and of SwiGLU spill registers (compiled for Hopper, not timed).
QUANTIZATION_WARPS = 8


@functools.cache
def num_processors() -> int:
    """Streaming multiprocessors of the current GPU; two under the interpreter, so that persistence is exercised."""
    if IS_INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
