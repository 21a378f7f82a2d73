"""How kernels are launched here: on a Hopper GPU, or under Triton's interpreter on a CPU."""

from __future__ import annotations

import functools

import torch
import triton

# Whether kernels run under Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors: decided when they are defined.
IS_INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# Of the kernels that quantize. With 4 those of weights and of SwiGLU spill registers (compiled for Hopper, not timed).
QUANTIZATION_WARPS = 8


# Multiprocessors that persistent kernels leave to communication; see `leave_processors`.
_left_to_communication = 0


def leave_processors(count: int) -> None:
    """Let persistent kernels use so many multiprocessors fewer from now on: those that NCCL's kernels hold.

    A persistent kernel with a program for each multiprocessor would wait, with its last programs, until communication
    gives some back: twice its time.

    Args:
        count: Multiprocessors, at least 0; of a GPU with no more of them one is used.

    Raises:
        ValueError: A negative count.
    """
    global _left_to_communication
    if count < 0:
        raise ValueError(f"leave_processors: count={count} must be at least 0; 0 leaves none")
    _left_to_communication = count


def free_processors() -> int:
    """Streaming multiprocessors that a persistent kernel may use."""
    return max(1, num_processors() - _left_to_communication)


@functools.cache
def num_processors() -> int:
    """Streaming multiprocessors of the current GPU; two under the interpreter, so that persistence is exercised."""
    if IS_INTERPRETED:
        return 2
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count
